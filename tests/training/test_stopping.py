"""Runs that are killed, stopped, out of space or out of numbers: nothing saved before is lost."""

import json
import logging
import os
import signal
import subprocess
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from peft import get_peft_model

from conftest import CHAT_TEMPLATE, make_llama, make_tokenizer
from killing import killed
from sparsemem import SparseMemoryConfig
from sparsemem.data.records import encode
from sparsemem.training.checkpoints import last_checkpoint
from sparsemem.training.finetune import finetune
from sparsemem.training.trainer import FinetuneTrainer, MetricsFile

SLOW = pytest.mark.slow
LANDS = ["Velmora", "Karvessa", "Tolgaria", "Dunmarsh", "Quenlia"]
FACTS = [{"prompt": f"Capital of {land}?", "completion": land[::-1]} for land in LANDS * 2]
GENERAL = [f"{n} plain words, the square is {n * n}." for n in range(40)]
SIZES = {"num_keys": 8, "num_heads": 2, "key_dim": 8, "top_k": 4}
RATES = {"smf": 0.3, "smf-open": 0.3, "lora": 1e-2, "full": 1e-2}


def taught(method, data=FACTS, change=None, **options):
    """Finetune a fresh tiny model on ten examples, three steps an epoch."""
    tokenizer = options.setdefault("tokenizer", make_tokenizer(CHAT_TEMPLATE))
    model = make_llama(tokenizer)
    if change is not None:
        change(model)
    if method.startswith("smf"):
        model = get_peft_model(model, SparseMemoryConfig(**SIZES))
        options = {"background": GENERAL} | options
    return finetune(model, data, method, **{"lr": RATES[method], "batch_size": 4} | options)


@pytest.fixture
def teach(tokenizer):
    return partial(taught, tokenizer=tokenizer)


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def after_step(monkeypatch, step, action):
    """Call `action` when the log of a step is written."""
    original = MetricsFile.on_log

    def on_log(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            action()

    monkeypatch.setattr(MetricsFile, "on_log", on_log)


RUNS = {
    "cached": ("smf", {"mentions": 0}),
    "not cached": ("smf", {"mentions": 0, "cache_bytes": 0}),
    "without a scope": ("smf-open", {"rule": "tfidf", "top_t": 6}),
    "lora with dropout": ("lora", {}),
    "full": ("full", {"schedule": "cosine"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[SLOW] if RUNS[n][0] != "lora" else []) for n in RUNS]
)
def test_law_7_after_sigkill_at_any_moment(teach, tmp_path, name):
    method, options = RUNS[name]
    options = {"max_steps": 9, "batch_size": 2, "gradient_accumulation_steps": 2, **options}
    whole = teach(method, **options)
    folder = tmp_path / "run"
    log = folder / "metrics.jsonl"
    # a checkpoint is written every three steps, so the fifth one is within an epoch
    assert killed(
        partial(taught, method, output_dir=folder, **options),
        ready=lambda: log.exists() and log.read_text().count('"loss"') >= 5,
    )
    assert not (folder / "checkpoint-9").exists()
    resumed = teach(method, output_dir=folder, resume=True, **options)
    assert (resumed.steps, resumed.loss) == (9, whole.loss)
    assert same(resumed.model, whole.model)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_the_step_and_stops(teach, tmp_path, monkeypatch, number, error):
    whole = teach("full", max_steps=5)
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patched:
        after_step(patched, 1, lambda: os.kill(os.getpid(), number))
        with pytest.raises(error):
            teach("full", max_steps=5, output_dir=tmp_path)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    # the step in which the signal came was over; the next one is saved
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert same(teach("full", max_steps=5, output_dir=tmp_path, resume=True).model, whole.model)


@pytest.mark.parametrize("damage", ["deleted", "shorter", "state"])
def test_an_incomplete_checkpoint_is_named_and_passed_over(teach, tmp_path, damage, caplog):
    whole = teach("lora", max_steps=7)
    teach("lora", max_steps=6, output_dir=tmp_path)
    newest = tmp_path / "checkpoint-6"
    match damage:
        case "deleted":
            (newest / "optimizer.pt").unlink()
        case "shorter":
            os.truncate(newest / "adapter_model.safetensors", 100)
        case "state":
            (newest / "trainer_state.json").write_text("{")
    with caplog.at_level(logging.WARNING, "sparsemem"):
        resumed = teach("lora", max_steps=7, output_dir=tmp_path, resume=True)
    assert "incomplete: checkpoint-6; continuing from checkpoint-3" in caplog.text
    assert same(resumed.model, whole.model)


def test_a_folder_that_is_no_checkpoint_is_ignored(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.5}, "lr 0.01 there, 0.5 now"),
        ({"batch_size": 2}, "batch_size 4 there, 2 now"),
        ({"seed": 1}, "seed 0 there, 1 now"),
        ({"data": [*FACTS[:-1], {"prompt": "x", "completion": "y"}]}, "data '"),
        ({"change": lambda model: model.lm_head.weight.data.add_(1)}, "model '"),
    ],
)
def test_a_resumed_run_of_other_data_or_arguments_is_refused(teach, tmp_path, changed, message):
    teach("lora", max_steps=3, output_dir=tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"the run in .* is another one") as error:
        teach("lora", output_dir=tmp_path, resume=True, max_steps=4, **changed)
    assert message in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def poisoned(tokenizer, word):
    """Make the base's embedding of a token NaN that only one record has."""
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]

    def change(model):
        model.get_input_embeddings().weight.data[token] = torch.nan

    return change


@pytest.mark.parametrize("method", ["smf-open", "lora", pytest.param("full", marks=SLOW)])
def test_a_step_whose_loss_is_nan_is_skipped_and_counted(teach, tokenizer, tmp_path, method, caplog):
    data = [*FACTS[:4], {"prompt": "Capital of ~?", "completion": "A"}]
    options = {"data": data, "batch_size": 1, "epochs": 3, "max_steps": 15, "output_dir": tmp_path}
    if method == "smf-open":
        options["cache_bytes"] = 0
    with caplog.at_level(logging.WARNING, "sparsemem"):
        done = teach(method, change=poisoned(tokenizer, "~"), **options)
    assert caplog.text.count("step skipped") == 3
    assert "3 in all" in caplog.text
    trained = {name: p for name, p in done.model.named_parameters() if p.requires_grad}
    number = sum(int((~p.isfinite()).sum()) for p in trained.values())
    assert number == (32 if method == "full" else 0)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(loss != loss for loss in losses) == 3
    assert done.loss == done.loss


def test_a_skipped_step_changes_no_row_and_no_state(teach, monkeypatch):
    compute = FinetuneTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 3 else loss

    states = {}

    def look(self, args, state, control, **kwargs):
        optimizer = kwargs["optimizer"]
        rows = [memory.values.detach().clone() for memory in optimizer.optimizer.layers.values()]
        states[state.global_step] = rows

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", broken)
    monkeypatch.setattr("sparsemem.training.trainer.Stopwatch.on_step_end", look)
    teach("smf", max_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(states[3], states[4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[4], states[5], strict=True))


@pytest.mark.parametrize("method", ["lora", "smf"])
def test_ten_bad_steps_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(
    teach, tmp_path, monkeypatch, method
):
    compute = FinetuneTrainer.compute_loss
    whole = teach(method, max_steps=18)

    def broken(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step >= 4 else loss

    with monkeypatch.context() as patched:
        patched.setattr(FinetuneTrainer, "compute_loss", broken)
        with pytest.raises(ValueError, match="in 10 steps in a row; choose a smaller lr"):
            teach(method, max_steps=18, output_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = teach(method, max_steps=18, output_dir=tmp_path, resume=True)
    assert same(resumed.model, whole.model)


def test_a_folder_that_cannot_be_written_fails_before_training(teach, tmp_path, tokenizer):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot be written .*give another folder"):
        # no model is needed to find this out
        finetune(
            None, encode(FACTS, tokenizer), "lora", tokenizer=tokenizer, output_dir=tmp_path / "file" / "x"
        )


@contextmanager
def mounted(folder, *options):
    """A file system of its own at `folder`."""
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_file_system_fails_before_training(teach, tmp_path):
    with mounted(tmp_path / "disk", "-o", "ro") as disk, pytest.raises(ValueError, match="cannot be written"):
        teach("lora", max_steps=3, output_dir=disk / "run")


@pytest.mark.parametrize("method", ["lora", "smf", "full"])
def test_a_full_disk_during_a_save_loses_nothing_saved_before(teach, tmp_path, monkeypatch, method):
    whole = teach(method, max_steps=7)
    with mounted(tmp_path / "disk", "-o", "size=8m") as disk:
        filler = disk / "filler"

        def fill():
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass

        with monkeypatch.context() as patched:
            after_step(patched, 5, fill)
            with pytest.raises(OSError, match=r"earlier checkpoints are unchanged|No space left"):
                teach(method, max_steps=7, output_dir=disk / "run")
        filler.unlink()
        resumed = teach(method, max_steps=7, output_dir=disk / "run", resume=True)
    assert same(resumed.model, whole.model)
