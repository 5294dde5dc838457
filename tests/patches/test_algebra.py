"""Merge, dial and subset of patches."""

from dataclasses import replace

import pytest
import torch

from sparsemem import ArtifactError
from sparsemem.layer.scope import fact_scope
from sparsemem.patches.algebra import dial, merge, subset
from sparsemem.patches.layers import LayerPatch
from sparsemem.patches.patch import RowPatch
from sparsemem.patches.tensors import TensorPatch
from tiny import facts_with, scope_of

WIDTH = 3


def table_patch(slots, value, *, base="b", before=0.0, tensors=None):
    slots = torch.tensor(slots)
    rows = torch.full((len(slots), WIDTH), before)
    return RowPatch({"l": LayerPatch(slots, rows, rows + value, "a")}, base, {}, tensors or {})


def fact_patch(task, question, value):
    """A patch as `Stream` makes it: one fact of two tokens with rows of their own."""
    told = [{"key": question, "subject": "", "question": question, "answers": 1}]
    facts = facts_with([[5, 6]], torch.eye(4)[:1], rows=torch.full((2, WIDTH), value))
    facts = replace(facts, fact_ids=torch.tensor([sum(map(ord, task))]))
    none = torch.zeros(0, WIDTH)
    scope = fact_scope(scope_of(torch.eye(4)[:0], [], []).space, facts)
    layer = LayerPatch(torch.zeros(0, dtype=torch.int64), none, none, "a", scope)
    return RowPatch({"l": layer}, "b", {"task": task, "facts": told}).referring()


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
    patches = [fact_patch("old", "who?", 1.0), fact_patch("new", "who?", 2.0)]
    with pytest.raises(ArtifactError, match="the answer to 'who\\?'"):
        merge(patches)
    last, report = merge(patches, "last")
    assert report.facts == ["who?"]
    assert last.layers["l"].scope.facts.rows[:, 0].tolist() == [2.0, 2.0]
    both, _ = merge(patches, "sum")
    assert both.layers["l"].scope.facts.rows[:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]


def test_a_subset_of_a_merge_is_the_tasks_own_patch(tmp_path):
    patches = [fact_patch("a", "who?", 1.0), fact_patch("b", "where?", 2.0)]
    merged, report = merge(patches)
    assert not report
    merged.save(tmp_path / "m.safetensors")
    part = subset(RowPatch.load(tmp_path / "m.safetensors"), ["b"])
    held, alone = (one.layers["l"].scope.tensors() for one in (part, patches[1]))
    assert all(torch.equal(held[key], alone[key]) for key in held)
    with pytest.raises(ValueError, match="sun not in the patch; it holds a, b"):
        subset(merged, ["sun"])
    with pytest.raises(ValueError, match="it holds none"):
        subset(table_patch([1], 1.0), ["a"])


def test_dial_scales_every_change():
    patch = table_patch([1, 2], 2.0, before=4.0)
    assert dial(patch, 1) is patch
    assert dial(patch, 0.5).layers["l"].after.tolist() == [[5.0] * WIDTH] * 2
    assert len(dial(patch, 0).layers["l"].slots) == 0
    own = fact_patch("a", "who?", 1.0)
    assert torch.equal(dial(own, 0.25).layers["l"].scope.facts.rows, torch.full((2, WIDTH), 0.25))
    assert dial(own, 0).layers["l"].scope is None
    with pytest.raises(ValueError, match="out of range"):
        dial(patch, 1.5)


def test_a_patch_that_refers_to_its_space_is_small(tmp_path):
    patch = fact_patch("a", "who?", 1.0)
    patch.save(tmp_path / "p.safetensors")
    loaded = RowPatch.load(tmp_path / "p.safetensors")
    scope = loaded.layers["l"].scope
    assert len(scope.space.mean) == len(scope.space.known) == 0
    assert loaded.layers["l"].space == patch.layers["l"].space
    assert torch.equal(scope.facts.rows, patch.layers["l"].scope.facts.rows)
