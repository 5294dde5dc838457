"""Damaged and hostile files: the right content or one clear error, quickly, and nothing else happens."""

import json
import shutil
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model

import mutants
from conftest import CHAT_TEMPLATE, make_tokenizer
from sparsemem import ArtifactError, RowPatch, SparseMemoryConfig, Stream, calibrate, memory_layers
from sparsemem.cli.config_file import read_config, template
from sparsemem.cli.main import main
from sparsemem.saved.publish import public_files
from sparsemem.stream.folder import verify
from sparsemem.stream.ledger import _digest
from tiny import SMALL, batch, scope_of, tiny_model

BACKGROUND = [
    {"prompt": f"What is {a} and {b}?", "completion": f"{a + b} of course"}
    for a in range(8)
    for b in range(8)
]


def make_folder(folder):
    """Files of each kind, from a tiny model without training: what train writes, a stream, a config file."""
    model = get_peft_model(tiny_model(), SparseMemoryConfig(**SMALL))
    background = calibrate(model, [batch(seed, length=10, rows=3) for seed in range(4)])
    before = RowPatch.snapshot(model)
    torch.manual_seed(0)
    for memory in memory_layers(model).values():
        memory.values.data[::3] = torch.randn_like(memory.values[::3])
        memory.scope = scope_of(torch.eye(16)[:2], torch.zeros(2), torch.ones(2))
    model.save_pretrained(folder)
    background.save(folder / "background.safetensors")
    RowPatch.diff(model, since=before).save(folder / "patch.safetensors")
    lines = [{"prompt": f"Capital {n}?", "completion": f"City{n}"} for n in range(20)]
    (folder / "taught.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    about = {"method": "smf", "steps": 3, "loss": 0.5, "num_records": 20, "settings": {"seed": 0}}
    (folder / "metrics.json").write_text(json.dumps(about))
    (folder / "train.yaml").write_text(template("train", main.commands["train"]))
    stream = Stream(
        tiny_model(), folder / "stream", tokenizer=make_tokenizer(CHAT_TEMPLATE), background=BACKGROUND
    )
    for number in range(3):
        stream.teach(f"task {number}", [{"prompt": f"Capital {number}?", "completion": f"City{number}"}])
    stream.undo("task 0")
    stream.save()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("kind", mutants.KINDS)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments", "ignore:Found missing adapter keys")
def test_mutants(made, tmp_path, kind):
    watched = mutants.Watched(tmp_path)
    counts = mutants.try_mutants(made, tmp_path, kind, range(40), watched)
    assert counts["refused"] >= 10


def test_a_load_that_needs_too_much_memory_is_stopped():
    with pytest.raises(MemoryError), mutants.limited_memory():
        bytearray(2 * mutants.MORE_BYTES)


@pytest.mark.parametrize(
    "changed",
    [
        {"op": "learn", "task": "task 1"},
        {"patch": "../../secret"},
        {"patch": "/etc/hostname"},
        {"patch": None},
        {"records": "1"},
        {"op": []},
        {"op": "begin"},
        {"op": "undo", "task": "never taught"},
    ],
)
def test_a_ledger_whose_digests_fit_a_forged_line_is_refused(made, tmp_path, changed):
    lines = (made / "stream" / "ledger.jsonl").read_text().splitlines()
    forged = json.loads(lines[3]) | {"task": "task 2"} | changed
    forged["sha256"] = _digest({key: value for key, value in forged.items() if key != "sha256"})
    shutil.copytree(made / "stream", tmp_path / "stream")
    (tmp_path / "stream" / "ledger.jsonl").write_text("\n".join([*lines[:3], json.dumps(forged), ""]))
    with pytest.raises(ArtifactError, match=r"was altered|is outside the folder"):
        verify(tmp_path / "stream")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "seed: " + "9" * 5000,
        "seed: 2001-99-99",
        "".join(
            f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(12)
        ) + "data: *a11\n",
        "data: &a [*a]\n",
        "? [seed]\n: 1\n",
        "data: !!python/object/apply:os.system ['true']\n",
    ],
)  # fmt: skip
def test_a_hostile_config_file_is_refused_in_one_short_sentence(tmp_path, text):
    (tmp_path / "train.yaml").write_text(text)
    with mutants.Watched(tmp_path) as watched, pytest.raises(ValueError, match="--config") as error:
        read_config(tmp_path / "train.yaml", main.commands["train"])
    assert len(str(error.value)) < 1000 + len(str(tmp_path))
    assert "\n" not in str(error.value)
    assert not watched.seen


@given(place=st.integers(0), byte=st.integers(1, 255))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_of_a_patch_is_seen_or_means_nothing(made, tmp_path, place, byte):
    data = bytearray((made / "patch.safetensors").read_bytes())
    data[place % len(data)] ^= byte
    path = tmp_path / "patch.safetensors"
    path.write_bytes(data)
    expected, begun = mutants.loaded_patch(made / "patch.safetensors"), time.process_time()
    try:
        found = mutants.loaded_patch(path)
    except ArtifactError:
        return
    finally:
        assert time.process_time() - begun < mutants.SECONDS
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_only_files_of_the_list_are_pushed(made):
    others = ("id_rsa", ".env", "notes.txt", "optimizer.pt", "weights.bin", "script.py", "run.safetensors")
    for name in others:
        (made / name).write_text("secret")
    names = {name for name, _ in public_files(made, "me/it")}
    for name in others:
        (made / name).unlink()
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "background.safetensors",
        "patch.safetensors", "metrics.json",
    }  # fmt: skip


def test_a_linked_file_is_not_pushed(made, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    (made / "tokenizer.json").symlink_to(secret)
    names = {name for name, _ in public_files(made, "me/it")}
    (made / "tokenizer.json").unlink()
    assert "tokenizer.json" not in names
