"""Several processes that train one model, as torchrun starts them: two on this machine, over gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cached_property, partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from conftest import CHAT_TEMPLATE, make_tokenizer
from sparsemem import RowAdamW, SparseMemoryConfig, calibrate, finetune, memory_layers, processes
from sparsemem.atomic import new_folder
from sparsemem.data.records import batches, collate, encode
from sparsemem.saved.making import checkpoints_of
from sparsemem.training.checkpoints import last_checkpoint
from started import several
from tiny import SMALL, tiny_model

FACTS = [{"prompt": f"Capital {n}?", "completion": f"City{n * 7}"} for n in range(8)]
GENERAL = [f"{n} plain words, the square is {n * n}." for n in range(24)]
TWELVE = [{"prompt": f"Capital {n}?", "completion": f"City{n * 7}"} for n in range(12)]
# A limit for what waits for processes on a busy machine.
SECONDS = 600
OPTIONS = {"lr": 0.3, "epochs": 3, "batch_size": 4, "top_t": 6}


def run(method, rank, out, data=FACTS, **options):
    """Teach as one process of those that the environment names; its tables and figures go to a file.

    Each process has a background of its own, which moves the addresses and the scope.
    """
    torch.set_num_threads(1)
    model = tiny_model()
    if method.startswith("smf"):
        scale = {"trainable": "values+scale"} if method == "smf" else {}
        model = get_peft_model(model, SparseMemoryConfig(**SMALL, **scale))
        options = {"background": GENERAL[rank:]} | options
    options = OPTIONS | options
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        options["lr"] = 1e-2
    done = finetune(model, data, method, tokenizer=make_tokenizer(CHAT_TEMPLATE), **options)
    state = {name: tensor.clone() for name, tensor in done.model.state_dict().items()}
    slots = {} if done.patch is None else {n: layer.slots for n, layer in done.patch.layers.items()}
    torch.save({"state": state, "slots": slots, "steps": done.steps, "loss": done.loss}, f"{out}.{rank}")
    return done


UNEVEN = {"ten": {"data": TWELVE[:10]}, "five": {"data": TWELVE[:5], "batch_size": 1}}


def run_uneven(method, rank, out, output_dir=None, **options):
    method, _, without = method.partition(", ")
    options |= {"precision": "float32"} | ({"cache_bytes": 0} if without else {})
    for part, chosen in UNEVEN.items():
        folder = output_dir and f"{output_dir}-{part}"
        run(method, rank, f"{out}.{part}", output_dir=folder, **options, **chosen)
    torch.save({}, f"{out}.{rank}")


def plain(rule, rank, out, **options):
    """Teach with RowAdamW and transformers' own Trainer, which wraps the model in DDP."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    arguments = TrainingArguments(
        max_steps=3, learning_rate=0.3, lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
        **{"output_dir": f"{out}.folder", "per_device_train_batch_size": 2, **options},
    )  # fmt: skip
    model = get_peft_model(tiny_model(), SparseMemoryConfig(**SMALL))
    general = batches(encode([{"text": one} for one in GENERAL], tokenizer, loss_on="all"), 4, 0)
    background = calibrate(model, general)
    optimizer = RowAdamW(model, 0.3, top_t=6, rule=rule, background=background)
    sent = []
    for name in ("all_reduce", "broadcast"):
        original = getattr(dist, name)

        def counted(tensor, *args, original=original, **kwargs):
            sent.append(tensor.numel() * tensor.element_size())
            return original(tensor, *args, **kwargs)

        setattr(processes.dist, name, counted)
    step = optimizer.step
    per_step = []

    def counted_step(*args, **kwargs):
        sent.clear()
        result = step(*args, **kwargs)
        per_step.append(sum(sent))
        return result

    optimizer.step = counted_step
    trainer = Trainer(
        model=model, args=arguments, train_dataset=encode(TWELVE, tokenizer),
        data_collator=partial(collate, pad_token_id=0), optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    wrapped = trainer.model_wrapped
    held = {n: memory.values.detach().clone() for n, memory in memory_layers(model).items()}
    scales = [memory.scale.item() for memory in memory_layers(model).values()]
    # of a table or key, DDP's buckets hold nothing
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    in_ddp = [names[id(p)] for p in getattr(wrapped, "_module_parameters", []) if p.requires_grad]
    torch.save({"state": held, "bytes": per_step, "ddp": in_ddp, "scales": scales}, f"{out}.{rank}")


def most_bytes(rule, num_layers):
    """What a step of `plain` may send: counts and a flag are int64, rows float32, ids int64.

    Rule "grad" selects by the gradients of all rows that are read, so these are sent.
    """
    num_slots, top_t, d = SMALL["num_keys"] ** 2, 6, 16
    rows = num_slots if rule == "grad" else top_t
    return num_layers * (8 * (num_slots + 1) + 4 * rows * d + 8 * top_t)


def work(call, folder, method, options):
    """What one process does: `call`, which writes its results to the file two.RANK of a folder."""
    rank = int(os.environ["RANK"])
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    call(method, rank, str(folder / "two"), output_dir=str(folder / "run"), **options)
    dist.destroy_process_group()


def several_processes(method, folder, number=2, call=run, **options):
    """What each process has written, and the folder of checkpoints."""
    several(number, work, call, folder, method, options)
    return [torch.load(folder / f"two.{rank}") for rank in range(number)], folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smf", "smf-open", "full"])
def test_two_processes_are_one_that_takes_twice_as_much(method, tmp_path):
    (first, second), folder = several_processes(method, tmp_path)
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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smf", "smf-open", "smf, not cached", "lora"])
def test_three_processes_train_a_last_batch_that_is_too_small_once(method, tmp_path):
    """Of ten records the third process has two, and in a second case, of five in batches of one, none.

    In float32: in bfloat16 three times a number is rounded, so gradients differ by its rounding.
    """
    several_processes(method, tmp_path, 3, call=run_uneven)
    run_uneven(method, 0, str(tmp_path / "one"), gradient_accumulation_steps=3)
    for part in UNEVEN:
        one = torch.load(tmp_path / f"one.{part}.0")
        each = [torch.load(tmp_path / f"two.{part}.{rank}") for rank in range(3)]
        assert [other["steps"] for other in each] == [one["steps"]] * 3
        assert each[0]["loss"] == pytest.approx(one["loss"], rel=1e-4)
        for name, slots in one["slots"].items():
            assert torch.equal(each[0]["slots"][name], slots)
        for name, tensor in one["state"].items():
            assert all(torch.equal(each[0]["state"][name], other["state"][name]) for other in each)
            torch.testing.assert_close(each[0]["state"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


_PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_processes import LONG, run, work
work(run, Path({folder!r}), "smf", LONG)
"""


LONG = {"batch_size": 1, "epochs": 12, "background": GENERAL}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return several_processes("smf", tmp_path_factory.mktemp("whole"), **LONG)[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint(tmp_path, uninterrupted, rank):
    """An epoch is four steps and ends in a checkpoint; the kill comes after the tenth step."""
    program = _PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    (tmp_path / "worker.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    folder = tmp_path / "run"
    log, end = folder / "metrics.jsonl", time.monotonic() + SECONDS
    with subprocess.Popen([*command, str(tmp_path / "worker.py")], env=environment) as run:
        try:
            while not log.exists() or log.read_text().count('"loss"') < 10:
                assert run.poll() is None
                assert time.monotonic() < end
                time.sleep(0.001)
            os.kill(int((tmp_path / f"pid.{rank}").read_text()), signal.SIGKILL)
            assert run.wait(SECONDS) != 0
        finally:
            # torchrun ends its processes
            run.terminate()
    for other in range(2):
        assert not psutil.pid_exists(int((tmp_path / f"pid.{other}").read_text()))
    reached = last_checkpoint(folder)
    assert reached is not None
    assert Path(reached).name != "checkpoint-48"
    found, _ = several_processes("smf", tmp_path, resume=True, **LONG)
    for each in found:
        assert each["steps"] == 48
        assert each["loss"] == uninterrupted["loss"]
        assert all(torch.equal(each["state"][name], one) for name, one in uninterrupted["state"].items())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "rule"), [(2, "kl"), (3, "kl"), (2, "grad")])
def test_plain_trainer_on_several_processes_trains_the_rows_of_one(number, rule, tmp_path):
    found, _ = several_processes(rule, tmp_path, number, call=plain)
    plain(rule, 0, str(tmp_path / "one"), gradient_accumulation_steps=number)
    one = torch.load(tmp_path / "one.0")
    assert one["ddp"] == []
    for rank in range(number):
        # DDP was there, and had nothing of the memory but alpha of the first layer, which stays as it was
        assert found[rank]["ddp"] == ["scale"]
        assert found[rank]["scales"] == one["scales"]
        for name, table in one["state"].items():
            assert table.any()
            assert torch.equal(found[rank]["state"][name], found[0]["state"][name])
            torch.testing.assert_close(found[rank]["state"][name], table, rtol=1e-3, atol=1e-4, msg=name)
    assert all(0 < size <= most_bytes(rule, len(one["state"])) for size in found[0]["bytes"])


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
