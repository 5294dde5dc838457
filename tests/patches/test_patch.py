import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from sparsemem import (
    ArtifactError,
    Background,
    RowAdamW,
    RowPatch,
    SparseMemoryConfig,
    calibrate,
    memory_layers,
    set_scope,
)
from sparsemem.background.calibration import observe
from sparsemem.patches.tensors import other_tensors
from tiny import SMALL, batch


def _teach(model, background, seed, steps=3, scope=True):
    """Train a few steps and return the patch."""
    before = RowPatch.snapshot(model)
    if scope:
        set_scope(model, [batch(seed)], background, extend=True)
    optimizer = RowAdamW(model, 0.1, top_t=7, rule="tf")
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(seed)).loss.backward()
        optimizer.step()
    return RowPatch.diff(model, since=before, info={"seed": seed})


def _bytes(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(model, state):
    now = model.state_dict()
    return all(torch.equal(now[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("scope", [True, False])
def test_apply_and_revert_restore_every_byte(model, background, tmp_path, scope):
    """Law 6."""
    untouched = _bytes(model)
    patch = _teach(model, background, 50, scope=scope)
    taught = _bytes(model)
    patch.save(tmp_path / "patch.safetensors")
    patch = RowPatch.load(tmp_path / "patch.safetensors")
    assert patch.info == {"seed": 50}
    assert sum(len(layer.slots) for layer in patch.layers.values()) > 0
    patch.revert(model)
    assert _same(model, untouched)
    patch.apply(model)
    assert _same(model, taught)


def test_two_patches_add_and_remove_their_scopes(model, background):
    untouched = _bytes(model)
    first = _teach(model, background, 50)
    between = _bytes(model)
    second = _teach(model, background, 60)
    second.revert(model)
    assert _same(model, between)
    second.apply(model)
    second.revert(model)
    first.revert(model)
    assert _same(model, untouched)


def test_the_first_of_two_patches_is_refused_where_the_second_changed_its_rows(model, background):
    untouched = _bytes(model)
    first = _teach(model, background, 50)
    second = _teach(model, background, 60)
    taught = _bytes(model)
    assert any(
        set(one.slots.tolist()) & set(second.layers[n].slots.tolist()) for n, one in first.layers.items()
    )
    with pytest.raises(ArtifactError, match="revert in reverse order"):
        first.revert(model)
    assert _same(model, taught)
    second.revert(model)
    first.revert(model)
    assert _same(model, untouched)


def test_patches_that_share_no_row_are_reverted_in_any_order(model, background):
    untouched = _bytes(model)
    first = _teach(model, background, 50)
    only_first = _bytes(model)
    before = RowPatch.snapshot(model)
    set_scope(model, [batch(60)], background, extend=True)
    for name, memory in memory_layers(model).items():
        free = sorted(set(range(memory.num_slots)) - set(first.layers[name].slots.tolist()))[:3]
        memory.values.data[free] += 1
    second = RowPatch.diff(model, since=before)
    first.revert(model)
    second.revert(model)
    assert _same(model, untouched)
    second.apply(model)
    first.apply(model)
    second.revert(model)
    assert _same(model, only_first)


def test_since_may_be_an_adapter_folder_or_a_dict_of_tables(model, background, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    tables = {name: memory.values.detach().clone() for name, memory in memory_layers(model).items()}
    expected = _teach(model, background, 50)
    for since in (tmp_path / "adapter", str(tmp_path / "adapter"), tables):
        patch = RowPatch.diff(model, since=since)
        for name, layer in patch.layers.items():
            assert torch.equal(layer.slots, expected.layers[name].slots)
            assert torch.equal(layer.after, expected.layers[name].after)
            scope, wanted = layer.scope, expected.layers[name].scope
            assert (scope is None) == (wanted is None)
            assert scope is None or torch.equal(scope.centres, wanted.centres)
        assert any(layer.scope is not None for layer in patch.layers.values())


def test_refused_patches_change_nothing(model, background, tiny_llama, tmp_path):
    patch = _teach(model, background, 50)
    patch.revert(model)
    cases = []

    twice = model
    patch.apply(twice)
    cases.append((twice, "apply patches in order"))

    other_base = get_peft_model(tiny_llama(seed=5), SparseMemoryConfig(**SMALL))
    cases.append((other_base, "another base"))

    other_keys = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
    calibrate(other_keys, [batch(3)], seed=9)
    cases.append((other_keys, "another addressing"))

    elsewhere = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL, layers_to_transform=[0]))
    cases.append((elsewhere, "has memories only at"))

    for target, words in cases:
        before = _bytes(target)
        with pytest.raises(ArtifactError, match=words):
            patch.apply(target)
        assert _same(target, before)

    patch.revert(model)
    before = _bytes(model)
    with pytest.raises(ArtifactError, match="revert in reverse"):
        patch.revert(model)
    assert _same(model, before)


def test_one_changed_row_refuses_the_whole_patch(model, background):
    patch = _teach(model, background, 50)
    patch.revert(model)
    last = list(patch.layers)[-1]
    row = patch.layers[last].slots[-1]
    memory_layers(model)[last].values.data[row, 0] = 1e-30
    before = _bytes(model)
    with pytest.raises(ArtifactError):
        patch.apply(model)
    assert _same(model, before)


def test_a_scope_is_not_added_to_rows_written_without_one(model, background):
    scoped = _teach(model, background, 50)
    scoped.revert(model)
    _teach(model, background, 60, scope=False)
    for memory in memory_layers(model).values():
        for slot in scoped.layers[next(iter(scoped.layers))].slots:
            memory.values.data[slot] = 0
    for name, layer in scoped.layers.items():
        memory_layers(model)[name].values.data[layer.slots] = 0
    with pytest.raises(ArtifactError, match="written without one"):
        scoped.apply(model)


def test_a_patch_file_is_applied_to_a_fresh_model(model, background, tiny_llama, tmp_path):
    model.save_pretrained(tmp_path / "empty")
    patch = _teach(model, background, 50)
    patch.save(tmp_path / "patch.safetensors")
    expected = model(**batch(50)).logits
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / "empty", is_trainable=True)
    RowPatch.load(tmp_path / "patch.safetensors").apply(fresh)
    assert torch.equal(fresh(**batch(50)).logits, expected)


def _tamper(path, change):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def test_damaged_files_are_artifact_errors(model, background, tmp_path):
    path = tmp_path / "patch.safetensors"
    patch = _teach(model, background, 50)
    whole = lambda: patch.save(path) or path.read_bytes()  # noqa: E731

    blob = bytearray(whole())
    for data in (blob[: len(blob) // 2], b"", b"x" * 100, bytes([*blob[:-3], blob[-3] ^ 1, *blob[-2:]])):
        path.write_bytes(bytes(data))
        with pytest.raises(ArtifactError):
            RowPatch.load(path)
    with pytest.raises(ArtifactError, match="no such file"):
        RowPatch.load(tmp_path / "nowhere")

    name = next(iter(patch.layers))
    changes = [
        lambda t, m: t[f"{name}/after"].mul_(2),
        lambda t, m: t.pop(f"{name}/slots"),
        lambda t, m: m.update(sparsemem=json.dumps({**json.loads(m["sparsemem"]), "base": "0"})),
        lambda t, m: m.clear(),
    ]
    for change in changes:
        whole()
        _tamper(path, change)
        with pytest.raises(ArtifactError):
            RowPatch.load(path)
    background.save(path)
    with pytest.raises(ArtifactError, match="row patch"):
        RowPatch.load(path)
    patch.save(path)
    with pytest.raises(ArtifactError, match="background"):
        Background.load(path)


@pytest.mark.parametrize("damage", ["duplicate", "negative", "nan", "far"])
def test_contradictory_patches_are_refused(model, background, tmp_path, damage):
    patch = _teach(model, background, 50)
    layer = patch.layers[next(iter(patch.layers))]
    if damage == "duplicate":
        layer.slots[1] = layer.slots[0]
    elif damage == "negative":
        layer.slots[0] = -1
    elif damage == "nan":
        layer.after[0, 0] = float("nan")
    else:
        layer.slots[-1] = 10**6
    patch.save(tmp_path / "patch.safetensors")
    before = _bytes(model)
    with pytest.raises(ArtifactError):
        RowPatch.load(tmp_path / "patch.safetensors").revert(model)
    assert _same(model, before)


OTHERS = {
    "values+scale": {"trainable": "values+scale"},
    "memory": {"trainable": "memory"},
    "silu": {"trainable": "memory", "value_gate": "silu"},
    "modules_to_save": {"modules_to_save": ["lm_head", "model.norm"]},
}


def _trained_beside(tiny_llama, changes, seed=0):
    """A model in which more than value rows trains, and its background."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL | changes))
    return model, calibrate(model, [batch(seed) for seed in range(8)])


@pytest.mark.parametrize("kind", OTHERS)
def test_other_trained_tensors_are_reverted_and_applied_exactly(tiny_llama, tmp_path, kind):
    """Law 6 for alpha, keys and saved modules."""
    model, background = _trained_beside(tiny_llama, OTHERS[kind])
    untouched = _bytes(model)
    model.save_pretrained(tmp_path / "before")
    patch = _teach(model, background, 50)
    taught = _bytes(model)
    changed = {name for name, tensor in taught.items() if not torch.equal(tensor, untouched[name])}
    beside = {n for n in changed if not n.rpartition(".")[2].startswith(("values", "scope_"))}
    assert len(patch.tensors) == len(beside) > 0
    patch.save(tmp_path / "patch.safetensors")
    for one in (RowPatch.load(tmp_path / "patch.safetensors"), RowPatch.diff(model, tmp_path / "before")):
        one.revert(model)
        assert _same(model, untouched)
        one.apply(model)
        assert _same(model, taught)
    model.save_pretrained(tmp_path / "after")
    assert patch.is_in(tmp_path / "after")
    next(iter(patch.tensors.values())).after.view(-1)[0] += 1
    assert not patch.is_in(tmp_path / "after")


@pytest.mark.parametrize("kind", OTHERS)
def test_patches_with_other_tensors_are_applied_to_a_fresh_model(tiny_llama, tmp_path, kind):
    model, background = _trained_beside(tiny_llama, OTHERS[kind])
    model.save_pretrained(tmp_path / "empty")
    _teach(model, background, 50).save(tmp_path / "one.safetensors")
    background = observe(model, [batch(seed) for seed in range(8)])
    _teach(model, background, 60).save(tmp_path / "two.safetensors")
    expected = model(**batch(60)).logits
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / "empty", is_trainable=True)
    for name in ("one", "two"):
        RowPatch.load(tmp_path / f"{name}.safetensors").apply(fresh)
    assert torch.equal(fresh(**batch(60)).logits, expected)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_changed_byte_in_another_tensor_refuses_the_patch(tiny_llama, kind):
    model, background = _trained_beside(tiny_llama, OTHERS[kind])
    patch = _teach(model, background, 50)
    tensor = other_tensors(model)[list(patch.tensors)[-1]].view(-1)
    for move in (patch.revert, patch.apply):
        kept = tensor[0].clone()
        tensor[0] = 0.123
        before = _bytes(model)
        with pytest.raises(ArtifactError):
            move(model)
        assert _same(model, before)
        tensor[0] = kept
        move(model)


def test_an_adapter_without_the_tensor_refuses_the_patch(tiny_llama):
    model, background = _trained_beside(tiny_llama, OTHERS["modules_to_save"])
    patch = _teach(model, background, 50)
    patch.revert(model)
    other, _ = _trained_beside(tiny_llama, {})
    before = _bytes(other)
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight.*does not have"):
        patch.apply(other)
    assert _same(other, before)


def test_since_must_have_all_trained_tensors(tiny_llama):
    model, _ = _trained_beside(tiny_llama, OTHERS["values+scale"])
    tables = {name: memory.values.detach().clone() for name, memory in memory_layers(model).items()}
    with pytest.raises(ValueError, match=r"has no .*\.scale, which trains in this model"):
        RowPatch.diff(model, since=tables)


@pytest.mark.parametrize("damage", ["half", "nan", "form"])
def test_other_tensors_that_are_damaged_are_refused(tiny_llama, tmp_path, damage):
    model, background = _trained_beside(tiny_llama, OTHERS["values+scale"])
    patch = _teach(model, background, 50)
    name, tensor = next(iter(patch.tensors.items()))
    if damage == "half":
        tensor.after = tensor.before[:0]
    elif damage == "nan":
        tensor.after[0] = float("nan")
    else:
        tensor.after = tensor.after.double()
    patch.save(tmp_path / "patch.safetensors")
    with pytest.raises(ArtifactError, match=name):
        RowPatch.load(tmp_path / "patch.safetensors")
