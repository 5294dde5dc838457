"""Damaged and hostile files: the right content or one clear error, quickly, and nothing else happens."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model

import mutants
from sparsemem import ArtifactError, RowPatch, SparseMemoryConfig, calibrate, memory_layers
from sparsemem.folders.publish import public_files
from tiny import SMALL, batch, scope_of, tiny_model


def make_folder(folder):
    """The files of a folder that train makes, from a tiny model without training."""
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


@given(place=st.integers(0), byte=st.integers(1, 255))
@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_of_a_patch_is_seen_or_means_nothing(made, tmp_path, place, byte):
    data = bytearray((made / "patch.safetensors").read_bytes())
    data[place % len(data)] ^= byte
    path = tmp_path / "patch.safetensors"
    path.write_bytes(data)
    expected = mutants.loaded_patch(made / "patch.safetensors")
    try:
        found = mutants.loaded_patch(path)
    except ArtifactError:
        return
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
