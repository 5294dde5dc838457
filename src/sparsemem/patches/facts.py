"""Many tasks' patches as one scope, in which a newer fact replaces an older one that it contradicts.

What a model of several tasks does depends on the list of their patches alone: not on what was taught and
taken back in between, nor on when.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layer.facts import joined_facts
from ..layer.scope import Scope, fact_scope
from ..layer.space import Space
from .patch import RowPatch


@dataclass(frozen=True)
class Fact:
    """What one record taught: `start` and `num_answers` are the place of its answers in its patch.

    Attributes:
        key: what it is about, where two records of one key contradict each other; empty: unknown.
        subject: the name in its question; empty: none was found.
        question: as it was asked, for people to read.
    """

    start: int
    num_answers: int
    key: str
    subject: str
    question: str


def facts_of(patch: RowPatch) -> list[Fact]:
    """The facts that a patch of `Stream` holds, in the order of its answers; of other patches none."""
    facts, start = [], 0
    for one in patch.info.get("facts", []):
        facts.append(Fact(start, one["answers"], one["key"], one["subject"], one["question"]))
        start += one["answers"]
    return facts


def composed(name: str, patches: Sequence[RowPatch], space: Space) -> Scope | None:
    """The scope of a layer with the patches applied in this order; None where nothing is left of them.

    Args:
        space: that the patches refer to.
    """
    parts = []
    for patch, kept in zip(patches, _kept(name, patches), strict=True):
        scope = patch.layers[name].scope
        assert scope is not None
        parts.append(scope.facts if bool(kept.all()) else scope.facts.chosen(kept))
    joined = joined_facts(parts) if parts else None
    return fact_scope(space, joined) if joined is not None and len(joined) else None


def origins(name: str, patches: Sequence[RowPatch]) -> list[tuple[int, str]]:
    """For each fact of the `composed` scope: the place of its patch in the list, and its question."""
    found = []
    for place, (patch, kept) in enumerate(zip(patches, _kept(name, patches), strict=True)):
        asked = [fact.question for fact in facts_of(patch) for _ in range(fact.num_answers)]
        found += [(place, question) for question, held in zip(asked, kept.tolist(), strict=True) if held]
    return found


def _kept(name: str, patches: Sequence[RowPatch]) -> list[Tensor]:
    """For each patch, [num_facts] bool: which of its facts no later fact replaces."""
    replaced, kept = replaced_facts(patches), []
    for place, patch in enumerate(patches):
        scope = patch.layers[name].scope
        assert scope is not None
        held = torch.ones(len(scope.facts), dtype=torch.bool)
        for fact in replaced.get(place, []):
            held[fact.start : fact.start + fact.num_answers] = False
        kept.append(held)
    return kept


def replaced_facts(patches: Sequence[RowPatch]) -> dict[int, list[Fact]]:
    """Facts that a later patch's fact replaces, by the place of their own patch in the list.

    A fact is replaced by one of the same key alone: the same question, or the same subject and relation where
    the records give both.
    """
    replaced: dict[int, list[Fact]] = {}
    by_key: dict[str, list[tuple[int, Fact]]] = {}
    for index, patch in enumerate(patches):
        for fact in facts_of(patch):
            if not fact.key:
                continue
            for place, one in by_key.get(fact.key, []):
                if place < index and one not in replaced.setdefault(place, []):
                    replaced[place].append(one)
            by_key.setdefault(fact.key, []).append((index, fact))
    return {place: facts for place, facts in replaced.items() if facts}
