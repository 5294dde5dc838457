"""Patches made from patches: several merged into one, one turned down, some tasks of one.

A merge names what its patches disagree about: rows that more than one of them writes, tensors that more than
one of them changes, and facts that a later one contradicts. Rows of a task's own never meet.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..artifacts import ArtifactError
from ..choices import CONFLICTS
from ..layer.scope import Scope
from .facts import facts_of, replaced_facts
from .layers import LayerPatch
from .patch import RowPatch
from .tensors import TensorPatch, same_bytes


@dataclass(frozen=True)
class Report:
    """What the patches of a merge disagree about.

    Attributes:
        rows: by layer name, the slots that more than one patch writes, ascending.
        tensors: names of the tensors that more than one patch changes.
        facts: questions whose answer a later patch contradicts.
    """

    rows: dict[str, list[int]] = field(default_factory=dict)
    tensors: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.rows or self.tensors or self.facts)

    def __str__(self) -> str:
        parts = [f"{len(slots)} rows of {name}" for name, slots in self.rows.items()]
        parts += [f"the tensor {name}" for name in self.tensors]
        parts += [f"the answer to {question!r}" for question in self.facts]
        return ", ".join(parts) or "nothing"


def merge(patches: Sequence[RowPatch], on_conflict: str = "refuse") -> tuple[RowPatch, Report]:
    """One patch that does what the patches do in this order, and what they disagree about.

    Args:
        patches: made on one base model and memory, each from the same rows before.
        on_conflict: "refuse"; "sum": changes of one row or tensor add up, and contradicting facts stay side
            by side; "last": the last patch decides.

    Raises:
        ValueError: fewer than two patches, or an unknown word.
        ArtifactError: the patches do not belong together, or disagree and `on_conflict` is "refuse".
    """
    if on_conflict not in CONFLICTS:
        raise ValueError(f"on_conflict={on_conflict!r} is unknown; use one of {', '.join(CONFLICTS)}")
    if len(patches) < 2:
        raise ValueError(f"patches: got {len(patches)}; a merge needs two or more")
    if len({patch.base for patch in patches}) > 1:
        raise ArtifactError("patches: were made on different base models; merge those of one model")
    names = list(dict.fromkeys(name for patch in patches for name in patch.layers))
    layers, shared = {}, {}
    facts: list[str] = []
    for name in names:
        having = [place for place, patch in enumerate(patches) if name in patch.layers]
        silent = {}
        if all(patches[place].layers[name].scope for place in having):
            silent = replaced_facts([patches[place] for place in having])
        facts += [fact.question for several in silent.values() for fact in several]
        if on_conflict == "last":
            dropped = {having[index]: several for index, several in silent.items()}
            patches = [_without_facts(name, one, dropped.get(n, [])) for n, one in enumerate(patches)]
        parts = [patches[place].layers[name] for place in having]
        layers[name], slots = _merged_layer(name, parts, on_conflict)
        if slots:
            shared[name] = slots
    tensors, met = _merged_tensors(patches, on_conflict)
    report = Report(shared, met, list(dict.fromkeys(facts)))
    if report and on_conflict == "refuse":
        raise ArtifactError(
            f"patches: disagree about {report}; merge them with 'sum' or 'last', or leave one out"
        )
    return RowPatch(layers, patches[0].base, _merged_info(patches, report, on_conflict), tensors), report


def dial(patch: RowPatch, amount: float) -> RowPatch:
    """The patch turned down: every change is `amount` times as large. 1: the patch itself, 0: no change.

    Raises:
        ValueError: an amount out of 0 to 1.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount={amount} is out of range; give 0 (nothing) to 1 (the whole patch)")
    if amount == 1:
        return patch
    layers = {}
    for name, layer in patch.layers.items():
        after = _between(layer.before, layer.after, amount)
        changed = (after != layer.before).any(1) if len(after) else torch.zeros(0, dtype=torch.bool)
        scope = layer.scope
        if scope is not None and len(scope.facts.rows):
            facts = replace(scope.facts, rows=scope.facts.rows * amount)
            scope = replace(scope, facts=facts) if amount else None
        parts = (layer.slots[changed], layer.before[changed], after[changed])
        space = layer.space if scope is not None else None
        layers[name] = LayerPatch(*parts, layer.addressing, scope, space)
    tensors = {
        name: TensorPatch(one.before, _between(one.before, one.after, amount))
        for name, one in patch.tensors.items()
    }
    tensors = {name: one for name, one in tensors.items() if not same_bytes(one.before, one.after)}
    return replace(patch, layers=layers, tensors=tensors, info={**patch.info, "dial": amount})


def subset(patch: RowPatch, tasks: Collection[str]) -> RowPatch:
    """The part of a merged patch that some of its tasks made; only rows of their own can be told apart.

    Raises:
        ValueError: a task that the patch does not hold.
        ArtifactError: the patch writes rows or tensors that all of its tasks share.
    """
    held = {fact["task"] for fact in patch.info.get("facts", []) if "task" in fact}
    if missing := sorted(set(tasks) - held):
        raise ValueError(
            f"tasks: {', '.join(missing)} not in the patch; it holds {', '.join(sorted(held)) or 'none'}"
        )
    if patch.tensors or any(len(layer.slots) for layer in patch.layers.values()):
        raise ArtifactError("patch: its tasks share rows, which cannot be told apart; teach them with learn")
    dropped = [
        fact
        for fact, one in zip(facts_of(patch), patch.info["facts"], strict=True)
        if one["task"] not in tasks
    ]
    layers = {name: _without_facts(name, patch, dropped).layers[name] for name in patch.layers}
    facts = [one for one in patch.info["facts"] if one["task"] in tasks]
    return replace(patch, layers=layers, info={**patch.info, "facts": facts})


def _without_facts(name: str, patch: RowPatch, facts: Sequence[Any]) -> RowPatch:
    """The patch without these facts and their rows in one layer."""
    layer = patch.layers[name]
    if not facts or layer.scope is None:
        return patch
    kept = torch.ones(len(layer.scope.facts), dtype=torch.bool)
    for fact in facts:
        kept[fact.start : fact.start + fact.num_answers] = False
    gone = {fact.start for fact in facts}
    told = [
        one for fact, one in zip(facts_of(patch), patch.info["facts"], strict=True) if fact.start not in gone
    ]
    scope = replace(layer.scope, facts=layer.scope.facts.chosen(kept))
    layers = {**patch.layers, name: replace(layer, scope=scope)}
    return replace(patch, layers=layers, info={**patch.info, "facts": told})


def _merged_layer(name: str, parts: Sequence[LayerPatch], on_conflict: str) -> tuple[LayerPatch, list[int]]:
    """The layer's merge, and the slots that several parts write."""
    if len({part.addressing for part in parts}) > 1:
        raise ArtifactError(
            f"patches: were made on different addressings of {name}; merge those of one memory"
        )
    every = torch.cat([part.slots for part in parts])
    slots, counts = every.unique(return_counts=True)
    width = parts[0].after.shape[1]
    before, after = (torch.zeros(len(slots), width, dtype=parts[0].after.dtype) for _ in range(2))
    seen = torch.zeros(len(slots), dtype=torch.bool)
    for part in parts:
        place = torch.searchsorted(slots, part.slots)
        again = seen[place]
        if not same_bytes(before[place][again], part.before[again]):
            raise ArtifactError(
                f"patches: begin from different rows of {name}; merge patches that were made side by side"
            )
        if on_conflict == "sum":
            after[place] = torch.where(again[:, None], after[place] + part.after - part.before, part.after)
        else:
            after[place] = part.after
        before[place], seen[place] = part.before, True
    scope, space = _joined([part for part in parts if part.scope is not None], name)
    layer = LayerPatch(slots, before, after, parts[0].addressing, scope, space)
    return layer, slots[counts > 1].tolist()


def _joined(parts: Sequence[LayerPatch], name: str) -> tuple[Scope | None, str | None]:
    if not parts:
        return None, None
    first = parts[0].referring()
    for part in parts[1:]:
        if part.referring().space != first.space:
            raise ArtifactError(f"patches: have different spaces in {name}; merge those of one background")
    # one that contains the space, if there is one, since the others can be filled in from it
    whole = next((part for part in parts if part.space is None), parts[0])
    assert whole.scope is not None
    assert parts[0].scope is not None
    joined = replace(parts[0].scope, space=whole.scope.space)
    for part in parts[1:]:
        assert part.scope is not None
        joined = joined.joined(replace(part.scope, space=whole.scope.space))
    return joined, whole.space


def _merged_tensors(
    patches: Sequence[RowPatch], on_conflict: str
) -> tuple[dict[str, TensorPatch], list[str]]:
    merged: dict[str, TensorPatch] = {}
    met = []
    for patch in patches:
        for name, one in patch.tensors.items():
            if name not in merged:
                merged[name] = one
                continue
            met.append(name)
            there = merged[name]
            if not same_bytes(there.before, one.before):
                raise ArtifactError(f"patches: begin from different values of {name}; they cannot be merged")
            after = there.after + one.after - one.before if on_conflict == "sum" else one.after
            merged[name] = TensorPatch(there.before, after)
    return merged, list(dict.fromkeys(met))


def _merged_info(patches: Sequence[RowPatch], report: Report, on_conflict: str) -> dict[str, Any]:
    """Where the parts come from, and the facts with the task of each, in the order of the answers."""
    facts: list[Mapping[str, Any]] = []
    # the places of facts are known only where all that is taught is facts
    scoped = [patch for patch in patches if any(layer.scope for layer in patch.layers.values())]
    for patch in scoped if all("facts" in patch.info for patch in scoped) else []:
        own = patch.info.get("task")
        facts += [{"task": own, **one} if own else one for one in patch.info.get("facts", [])]
    merged = [{key: value for key, value in patch.info.items() if key != "facts"} for patch in patches]
    info: dict[str, Any] = {"merged": merged, "on_conflict": on_conflict, "conflicts": str(report)}
    return {**info, "facts": facts} if facts else info


def _between(before: Tensor, after: Tensor, amount: float) -> Tensor:
    return (before.float() + amount * (after.float() - before.float())).to(after.dtype)
