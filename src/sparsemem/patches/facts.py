"""Many tasks' patches as one scope, in which a newer fact wins over an older one.

What a model of several tasks does depends on the list of their patches alone: not on what was taught and
taken back in between, nor on when.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layer.scope import Scope
from .patch import RowPatch

# Cosine of two answer starts' states from which two questions about one subject ask the same.
SAME_FACT = 0.85


@dataclass(frozen=True)
class Fact:
    """What one record taught: `start` and `num_centres` are its place among its patch's centres.

    Attributes:
        key: what it is about, where two records of one key contradict each other; empty: unknown.
        subject: the name in its question; empty: none was found.
        question: as it was asked, for people to read.
    """

    start: int
    num_centres: int
    key: str
    subject: str
    question: str


def facts_of(patch: RowPatch) -> list[Fact]:
    """The facts that a patch of `Stream` holds, in the order of its centres; of other patches none."""
    facts, start = [], 0
    for one in patch.info.get("facts", []):
        facts.append(Fact(start, one["centres"], one["key"], one["subject"], one["question"]))
        start += one["centres"]
    return facts


def composed(name: str, patches: Sequence[RowPatch], space: Scope) -> Scope | None:
    """The scope of a layer with the patches applied in this order; None where nothing is left of them.

    Args:
        space: a scope without centres in the space that the patches refer to.
    """
    parts = []
    for patch, kept in zip(patches, _speaking(name, patches), strict=True):
        scope = patch.layers[name].scope
        assert scope is not None
        parts.append([getattr(scope, key)[kept] for key in ("centres", "lo", "hi", "rows")])
    if not any(len(part[0]) for part in parts):
        return None
    centres, lo, hi, rows = (torch.cat(several) for several in zip(*parts, strict=True))
    return replace(space, centres=centres, lo=lo, hi=hi, rows=rows)


def owners(name: str, patches: Sequence[RowPatch]) -> list[int]:
    """For each centre of the `composed` scope, the place in the list of the patch that it comes from."""
    kept = _speaking(name, patches)
    return [place for place, centres in enumerate(kept) for _ in range(int(centres.sum()))]


def _speaking(name: str, patches: Sequence[RowPatch]) -> list[Tensor]:
    """For each patch, [num_centres] bool: which of its centres no later fact takes the place of."""
    silent, speaking = silenced(name, patches), []
    for place, patch in enumerate(patches):
        scope = patch.layers[name].scope
        assert scope is not None
        kept = torch.ones(len(scope.centres), dtype=torch.bool)
        for fact in silent.get(place, []):
            kept[fact.start : fact.start + fact.num_centres] = False
        speaking.append(kept)
    return speaking


def silenced(name: str, patches: Sequence[RowPatch]) -> dict[int, list[Fact]]:
    """Facts that a later patch's fact takes the place of, by the place of their own patch in the list."""
    silent: dict[int, list[Fact]] = {}
    by_key: dict[str, list[tuple[int, Fact]]] = {}
    by_subject: dict[str, list[tuple[int, Fact]]] = {}
    for index, patch in enumerate(patches):
        scope = patch.layers[name].scope
        assert scope is not None
        for fact in facts_of(patch):
            older = list(by_key.get(fact.key, [])) if fact.key else []
            for one in by_subject.get(fact.subject, []) if fact.subject else []:
                other = patches[one[0]].layers[name].scope
                assert other is not None
                if _near(scope.centres[fact.start], other.centres[one[1].start]):
                    older.append(one)
            for place, one in older:
                if place < index and one not in silent.setdefault(place, []):
                    silent[place].append(one)
            by_key.setdefault(fact.key, []).append((index, fact))
            by_subject.setdefault(fact.subject, []).append((index, fact))
    return {place: facts for place, facts in silent.items() if facts}


def _near(a: Tensor, b: Tensor) -> bool:
    return float(a @ b) >= SAME_FACT
