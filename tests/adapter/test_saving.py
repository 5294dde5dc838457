"""A saved adapter: whole after a kill, and refused when a bit has flipped or the base is another one."""

import copy
import json
import logging
import os
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file

from killing import killed_while
from sparsemem import ArtifactError, SparseMemoryConfig, memory_layers
from sparsemem.adapter.memories import memory_layers as layers_of
from sparsemem.artifacts import RUNS, SAMPLED, WHOLE, fingerprint_base, fits_base
from sparsemem.atomic import finish_save, new_part, save_into, write_atomically, write_json
from sparsemem.data import models
from started import Started
from tiny import SMALL, scope_of, tiny_batch, tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def taught(value=1.0, centres=0):
    model = get_peft_model(tiny_model(), SparseMemoryConfig(**SMALL))
    with torch.no_grad():
        for memory in memory_layers(model).values():
            memory.values.fill_(value)
            if centres:
                memory.scope = scope_of(torch.eye(16)[:centres], torch.zeros(centres), torch.ones(centres))
    return model


def flipped(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@torch.no_grad()
def logits(model):
    return model.eval()(**tiny_batch()).logits


def loaders(folder, base_folder):
    """Every way by which an adapter is loaded, each from an undamaged base."""
    first = taught(0.0)
    return {
        "from_pretrained": lambda: PeftModel.from_pretrained(tiny_model(), folder),
        "a new name": lambda: first.load_adapter(folder, "another"),
        "an old name": lambda: first.load_adapter(folder, "default"),
        "ours": lambda: models.load(str(folder), base=str(base_folder)),
        "auto": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
    }


@pytest.fixture
def base_folder(tmp_path, tokenizer):
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path, base_folder):
    model = taught(centres=2)
    model.peft_config["default"].base_model_name_or_path = str(base_folder)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_config_has_a_digest_of_each_tensor_and_the_bases_fingerprint(folder):
    config = json.loads((folder / CONFIG).read_text())
    assert config["digests"].keys() == load_file(folder / WEIGHTS).keys()
    assert config["base_fingerprint"] == fingerprint_base(tiny_model())


@pytest.mark.parametrize("place", [0.02, 0.5, 0.97])
def test_a_flipped_bit_is_refused_by_every_loader_and_nothing_is_loaded(place, folder, base_folder):
    every = loaders(folder, base_folder)
    for load in every.values():
        load()
    flipped(folder / WEIGHTS, int(place * (folder / WEIGHTS).stat().st_size))
    model = taught(0.0)
    before = logits(model)
    for name, load in {**every, "again": lambda: model.load_adapter(folder, "default")}.items():
        with pytest.raises(ArtifactError, match=r"damaged|cannot be read") as error:
            load()
        assert str(error.value).count("\n") == 0, name
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"num_heads": 2', '"num_heads": 1'), ('"top_k": 3', '"top_k": 2'),
     ('"write": "last"', '"write": "own"'),
     ('"num_heads"', '"num_hecds"'), ('"digests"', '"digestr"'), ('"sha256"', '"sha257"')],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_a_changed_config_is_refused(old, new, folder, base_folder):
    path = folder / CONFIG
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    every = loaders(folder, base_folder)
    for name in ("from_pretrained", "ours", "a new name"):
        with pytest.raises(ArtifactError, match="damaged or was changed by hand"):
            every[name]()


def test_where_the_base_is_may_be_edited(folder):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "elsewhere/base"}))
    assert PeftModel.from_pretrained(tiny_model(), folder)


def test_another_base_is_refused_before_it_is_changed(folder):
    other = tiny_model(seed=1)
    before, names = other.state_dict(), list(other.state_dict())
    with pytest.raises(ArtifactError, match="does not fit the base model"):
        PeftModel.from_pretrained(other, folder)
    assert list(other.state_dict()) == names
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in names)
    assert PeftModel.from_pretrained(tiny_model().to(torch.bfloat16), folder)


def test_a_base_in_float16_cannot_be_compared_and_gives_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, "sparsemem"):
        PeftModel.from_pretrained(tiny_model().to(torch.float16), folder)
    assert "float16" in caplog.text


def test_files_without_digests_load_with_a_warning(folder, caplog):
    path = folder / CONFIG
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in content.keys() - {"digests", "sha256"}}))
    with caplog.at_level(logging.WARNING, "sparsemem"):
        model = PeftModel.from_pretrained(tiny_model(), folder)
    assert torch.equal(logits(model), logits(taught(centres=2)))
    assert "has no digests" in caplog.text


def test_another_format_takes_the_old_ones_place(folder):
    taught(3.0).save_pretrained(folder, safe_serialization=False)
    assert not (folder / WEIGHTS).exists()
    model = PeftModel.from_pretrained(tiny_model(), folder)
    assert torch.equal(logits(model), logits(taught(3.0)))


def test_what_was_written_on_the_card_and_other_files_stay(folder):
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMy own words.\n")
    (folder / "notes.txt").write_text("x")
    taught(2.0).save_pretrained(folder)
    assert "My own words." in (folder / "README.md").read_text()
    assert (folder / "notes.txt").read_text() == "x"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_trained_after_loading_the_old_digests_do_not_stay(folder):
    model = PeftModel.from_pretrained(tiny_model(), folder, is_trainable=True)
    with torch.no_grad():
        for memory in layers_of(model).values():
            memory.values.add_(1)
    model.save_pretrained(folder)
    model.load_adapter(folder, "default")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), folder)), logits(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_saves_itself(duplicate, folder, tmp_path):
    model = taught(1.0)
    other = duplicate(model)
    with torch.no_grad():
        for memory in memory_layers(other).values():
            memory.values.fill_(5.0)
    other.save_pretrained(tmp_path / "copy")
    saved = load_file(tmp_path / "copy" / WEIGHTS)
    assert all((tensor == 5).all() for name, tensor in saved.items() if name.endswith("values"))
    assert json.loads((tmp_path / "copy" / CONFIG).read_text())["digests"]


@pytest.mark.parametrize("moved", range(4))
def test_a_save_killed_between_its_moves_is_finished_by_the_next_load(moved, folder, tmp_path):
    taught(7.0, centres=3).save_pretrained(tmp_path / "new")
    saved = folder / ".saved"
    (tmp_path / "new").rename(saved)
    for file in sorted(saved.iterdir())[:moved]:
        file.replace(folder / file.name)
    model = PeftModel.from_pretrained(tiny_model(), folder)
    assert torch.equal(logits(model), logits(taught(7.0, centres=3)))
    assert not saved.exists()


def test_a_failed_save_leaves_the_old_files(tmp_path):
    save_into(tmp_path / "f", lambda part: [(part / name).write_text("old") for name in "ab"])

    def fails(part):
        (part / "a").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_into(tmp_path / "f", fails)
    assert {path.name: path.read_text() for path in (tmp_path / "f").iterdir()} == {"a": "old", "b": "old"}


def _stops_in_two_saves(folder):
    new_part(folder / "out")
    write_atomically(folder / "file", lambda part: os._exit(0))


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path):
    with Started(_stops_in_two_saves, tmp_path) as process:
        assert process.wait() == 0
    assert len(list(tmp_path.iterdir())) == 2
    ours = tmp_path / ".out.elsewhere-1.x.part"
    ours.mkdir()
    new_part(tmp_path / "out").rename(tmp_path / "out")
    write_json(tmp_path / "file", 1)
    # a temporary folder of another machine may be in use
    assert {path.name for path in tmp_path.iterdir()} == {"out", "file", ours.name}


def test_finish_save_of_a_folder_without_one_changes_nothing(tmp_path):
    finish_save(tmp_path)
    finish_save(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_samples_large_parameters_and_sees_a_change_of_many():
    model = torch.nn.ParameterDict({"a": torch.zeros(WHOLE + 1), "b": torch.zeros(WHOLE)})
    before = fingerprint_base(model)
    assert before.startswith("sampled-")
    with torch.no_grad():
        model["b"][-1] = 1
        assert fingerprint_base(model) != before
        model["b"][-1] = 0
        model["a"][SAMPLED // RUNS] = 1
        assert fingerprint_base(model) == before
        model["a"] += 1
        assert fingerprint_base(model) != before


def test_a_fingerprint_of_all_elements_from_before_still_fits():
    model = torch.nn.ParameterDict({"a": torch.arange(4.0)})
    assert not fits_base(model, "52c1")
    import hashlib

    digest = hashlib.sha256(b"a [4] " + model["a"].detach().bfloat16().view(torch.uint8).numpy().tobytes())
    assert fits_base(model, digest.hexdigest())


def two_adapters():
    """Of different scope, so that a mixture of their files is seen."""
    return [taught(1.0, centres=1), taught(2.0, centres=3)]


def saves_in_turn(folder):
    models = two_adapters()
    return lambda number: models[number % 2].save_pretrained(folder)


@pytest.mark.slow
def test_a_killed_save_over_an_adapter_leaves_the_old_or_the_new_one(tmp_path):
    folder = tmp_path / "adapter"
    models = two_adapters()
    models[0].save_pretrained(folder)
    expected = [logits(model) for model in models]
    for attempt in range(12):
        killed_while(saves_in_turn, folder, wait=0.0137 * attempt)
        found = logits(PeftModel.from_pretrained(tiny_model(), folder))
        assert any(torch.equal(found, one) for one in expected)
    models[0].save_pretrained(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
