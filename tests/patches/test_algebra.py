"""Merge, dial and subset of patches."""

import pytest
import torch

from sparsemem import ArtifactError
from sparsemem.layer.scope import Scope
from sparsemem.patches.algebra import dial, merge, subset
from sparsemem.patches.layers import LayerPatch
from sparsemem.patches.patch import RowPatch
from sparsemem.patches.tensors import TensorPatch

WIDTH = 3


def table_patch(slots, value, *, base="b", before=0.0, tensors=None):
    slots = torch.tensor(slots)
    rows = torch.full((len(slots), WIDTH), before)
    return RowPatch({"l": LayerPatch(slots, rows, rows + value, "a")}, base, {}, tensors or {})


def own_patch(task, question, value, centres):
    """A patch as `Stream` makes it: one fact of two centres with rows of their own."""
    facts = [{"key": question, "subject": "", "question": question, "centres": 2}]
    centres = torch.eye(6)[centres]
    two = torch.tensor([0.5, 0.5])
    scope = Scope(
        torch.zeros(6), torch.eye(6), torch.zeros(0, 6), torch.tensor([0.1]), torch.zeros(0, 6), centres,
        two, two + 0.1, torch.full((2, WIDTH), value),
    )  # fmt: skip
    none = torch.zeros(0, WIDTH)
    layer = LayerPatch(torch.zeros(0, dtype=torch.int64), none, none, "a", scope)
    return RowPatch({"l": layer}, "b", {"task": task, "facts": facts}).referring()


def test_patches_that_share_nothing_are_a_union():
    merged, report = merge([table_patch([1, 5], 1.0), table_patch([0, 3], 2.0)])
    assert not report
    layer = merged.layers["l"]
    assert layer.slots.tolist() == [0, 1, 3, 5]
    assert layer.after[:, 0].tolist() == [2.0, 1.0, 2.0, 1.0]
    assert not layer.before.any()


def test_shared_rows_are_refused_summed_or_the_last_one_s():
    patches = [table_patch([1, 5], 1.0, before=4.0), table_patch([5, 7], 2.0, before=4.0)]
    with pytest.raises(ArtifactError, match="disagree about 1 rows of l"):
        merge(patches)
    summed, report = merge(patches, "sum")
    assert report.rows == {"l": [5]}
    assert summed.layers["l"].after[:, 0].tolist() == [5.0, 7.0, 6.0]
    last, _ = merge(patches, "last")
    assert last.layers["l"].after[:, 0].tolist() == [5.0, 6.0, 6.0]
    assert last.layers["l"].before[:, 0].tolist() == [4.0, 4.0, 4.0]


def test_shared_tensors_are_named():
    alpha = [{"alpha": TensorPatch(torch.ones(1), torch.full((1,), value))} for value in (3.0, 5.0)]
    patches = [table_patch([1], 1.0, tensors=alpha[0]), table_patch([2], 1.0, tensors=alpha[1])]
    with pytest.raises(ArtifactError, match="the tensor alpha"):
        merge(patches)
    assert merge(patches, "sum")[0].tensors["alpha"].after.tolist() == [7.0]
    assert merge(patches, "last")[0].tensors["alpha"].after.tolist() == [5.0]


def test_patches_of_different_starts_or_bases_are_refused():
    with pytest.raises(ArtifactError, match="different rows of l"):
        merge([table_patch([1], 1.0), table_patch([1], 1.0, before=2.0)], "last")
    with pytest.raises(ArtifactError, match="different base models"):
        merge([table_patch([1], 1.0), table_patch([2], 1.0, base="c")])
    with pytest.raises(ValueError, match="got 1; a merge needs two"):
        merge([table_patch([1], 1.0)])
    with pytest.raises(ValueError, match="on_conflict='first' is unknown"):
        merge([table_patch([1], 1.0), table_patch([2], 1.0)], "first")


def test_contradicting_facts_are_named_and_the_last_one_wins():
    patches = [own_patch("old", "who?", 1.0, [0, 1]), own_patch("new", "who?", 2.0, [0, 2])]
    with pytest.raises(ArtifactError, match="the answer to 'who\\?'"):
        merge(patches)
    last, report = merge(patches, "last")
    assert report.facts == ["who?"]
    assert last.layers["l"].scope.rows[:, 0].tolist() == [2.0, 2.0]
    both, _ = merge(patches, "sum")
    assert both.layers["l"].scope.rows[:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]


def test_a_subset_of_a_merge_is_the_tasks_own_patch(tmp_path):
    patches = [own_patch("a", "who?", 1.0, [0, 1]), own_patch("b", "where?", 2.0, [2, 3])]
    merged, report = merge(patches)
    assert not report
    merged.save(tmp_path / "m.safetensors")
    part = subset(RowPatch.load(tmp_path / "m.safetensors"), ["b"])
    for key in ("centres", "lo", "hi", "rows"):
        assert torch.equal(getattr(part.layers["l"].scope, key), getattr(patches[1].layers["l"].scope, key))
    with pytest.raises(ValueError, match="sun not in the patch; it holds a, b"):
        subset(merged, ["sun"])
    with pytest.raises(ValueError, match="it holds none"):
        subset(table_patch([1], 1.0), ["a"])


def test_dial_scales_every_change():
    patch = table_patch([1, 2], 2.0, before=4.0)
    assert dial(patch, 1) is patch
    assert dial(patch, 0.5).layers["l"].after.tolist() == [[5.0] * WIDTH] * 2
    assert len(dial(patch, 0).layers["l"].slots) == 0
    own = own_patch("a", "who?", 1.0, [0, 1])
    assert torch.equal(dial(own, 0.25).layers["l"].scope.rows, torch.full((2, WIDTH), 0.25))
    assert dial(own, 0).layers["l"].scope is None
    with pytest.raises(ValueError, match="out of range"):
        dial(patch, 1.5)


def test_a_patch_that_refers_to_its_space_is_small(tmp_path):
    patch = own_patch("a", "who?", 1.0, [0, 1])
    patch.save(tmp_path / "p.safetensors")
    loaded = RowPatch.load(tmp_path / "p.safetensors")
    scope = loaded.layers["l"].scope
    assert len(scope.mean) == len(scope.known) == 0
    assert loaded.layers["l"].space == patch.layers["l"].space
    assert torch.equal(scope.rows, patch.layers["l"].scope.rows)
