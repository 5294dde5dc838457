"""Several processes that train one model, as torchrun starts them: two on this machine, over gloo."""

import json
import os
import socket
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from conftest import CHAT_TEMPLATE, make_tokenizer
from sparsemem import SparseMemoryConfig, finetune, memory_layers
from sparsemem.folders.staging import checkpoints_of, new_folder
from tiny import SMALL, tiny_model

FACTS = [{"prompt": f"Capital {n}?", "completion": f"City{n * 7}"} for n in range(8)]
GENERAL = [f"{n} plain words, the square is {n * n}." for n in range(24)]
OPTIONS = {"lr": 0.3, "epochs": 3, "batch_size": 4, "top_t": 6}


def run(method, rank, out, **options):
    """Teach as one process of those that the environment names; its tables and figures go to a file.

    Each process has a background of its own, which moves the addresses and the scope.
    """
    torch.set_num_threads(1)
    model = tiny_model()
    if method.startswith("smf"):
        scale = {"trainable": "values+scale"} if method == "smf" else {}
        model = get_peft_model(model, SparseMemoryConfig(**SMALL, **scale))
        options["background"] = GENERAL[rank:]
    done = finetune(model, FACTS, method, tokenizer=make_tokenizer(CHAT_TEMPLATE), **OPTIONS, **options)
    state = {name: tensor.clone() for name, tensor in done.model.state_dict().items()}
    slots = {} if done.patch is None else {n: layer.slots for n, layer in done.patch.layers.items()}
    torch.save({"state": state, "slots": slots, "steps": done.steps, "loss": done.loss}, f"{out}.{rank}")
    return done


_WORKER = """
import os, sys, warnings
sys.path[:0] = {path!r}
from test_processes import run
import torch.distributed as dist
run({method!r}, int(os.environ["RANK"]), {out!r}, output_dir={folder!r})
dist.destroy_process_group()
"""


def two_processes(method, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script, out, folder = tmp_path / "worker.py", str(tmp_path / "two"), str(tmp_path / "run")
    script.write_text(
        _WORKER.format(path=[str(Path(__file__).parent)], method=method, out=out, folder=folder)
    )
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [worker.wait(240) for worker in workers] == [0, 0]
    return [torch.load(f"{out}.{rank}") for rank in range(2)], Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smf", "smf-open", "full"])
def test_two_processes_are_one_that_takes_twice_as_much(method, tmp_path):
    (first, second), folder = two_processes(method, tmp_path)
    run(method, 0, str(tmp_path / "one"), gradient_accumulation_steps=2)
    one = torch.load(tmp_path / "one.0")
    assert first["steps"] == second["steps"] == one["steps"] == 3
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
        torch.testing.assert_close(tensor, one["state"][name], rtol=1e-3, atol=1e-4, msg=name)
    for name, slots in one["slots"].items():
        assert torch.equal(first["slots"][name], slots)
        assert torch.equal(second["slots"][name], slots)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    assert [step for step, _ in losses] == [1, 2, 3]
    # an epoch is one step
    assert first["loss"] == losses[-1][1] == pytest.approx(one["loss"], rel=1e-3)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_the_first_process_makes_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    out = tmp_path / "out"
    with checkpoints_of(out, {"seed": 0}, False) as checkpoints, new_folder(out) as part:
        (part / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "0")
    with checkpoints_of(out, {"seed": 0}, False), new_folder(out) as part:
        (part / "file").write_text("x")
        assert (tmp_path / "out.partial" / "settings.json").exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert checkpoints == tmp_path / "out.partial"


def test_several_devices_in_one_process_are_no_data_parallel_model(monkeypatch):
    """As `python train.py` on a machine with two GPUs."""
    from transformers import TrainingArguments

    devices = TrainingArguments._setup_devices.func

    def two_devices(arguments):
        device = devices(arguments)
        arguments._n_gpu = 2
        return device

    fake = cached_property(two_devices)
    fake.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", fake)

    class Wrapped(torch.nn.DataParallel):
        def __init__(self, *_, **__):
            raise AssertionError("the model was wrapped")

    monkeypatch.setattr(torch.nn, "DataParallel", Wrapped)
    model = get_peft_model(tiny_model(), SparseMemoryConfig(**SMALL))
    options = {"tokenizer": make_tokenizer(CHAT_TEMPLATE), "background": GENERAL, "max_steps": 3}
    assert finetune(model, FACTS, "smf", **options).steps == 3
    assert any(memory.values.any() for memory in memory_layers(model).values())
