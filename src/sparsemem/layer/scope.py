"""The relevance gate of one memory layer: which tokens are inside the taught region.

A scope has two parts. *Facts* open where their subject is named and their question is asked (see `facts`).
*Centres* stand for a taught domain: unit vectors in whitened space, each with its own pair of thresholds, lo
and hi. Known states stand for what the base model already knows (states of answers in the background). For a
state x:

    z = normalise(W (x - mean))
    s_c(x) = z . c - known_weight * max(0, max_b z . b)
    g(x) = max_c clip((s_c(x) - lo_c) / (hi_c - lo_c), 0, 1), and 1 where a fact's answer is given

g is exactly 0 out of scope, so for such a token the memory adds nothing and the output is bit-identical to
the base model's. The scopes of several tasks are joined by concatenation, because each centre and each fact
has its own thresholds. The gate has no gradient.

Reference: ours (no paper). The known states let the gate tell a taught subject from a known subject in the
same form of question. dev/LOG.md has the measurement.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .facts import FACT_TENSORS, Facts, joined_facts, no_facts
from .space import SPACE_TENSORS, Space, nearest_known

# Weight of the similarity to known states, which is subtracted from the similarity to a centre.
KNOWN_WEIGHT = 0.5
CENTRE_TENSORS = ("task_known", "centres", "lo", "hi")
SCOPE_TENSORS = (*SPACE_TENSORS, *CENTRE_TENSORS, *FACT_TENSORS)


@dataclass(frozen=True)
class Scope:
    """The scope of one memory layer. All tensors are float32, or int64 where they hold whole numbers.

    Attributes:
        space: what all tasks share.
        task_known [num_task_known, d]: further known states, given for the taught tasks.
        centres [num_centres, d], lo, hi [num_centres]: taught states of a domain, and their thresholds.
        facts: what is taught fact by fact.
    """

    space: Space
    task_known: Tensor
    centres: Tensor
    lo: Tensor
    hi: Tensor
    facts: Facts = field(default_factory=no_facts)

    @property
    def is_empty(self) -> bool:
        return not len(self.centres) and not len(self.facts)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names of SCOPE_TENSORS."""
        own = {key: getattr(self, key) for key in CENTRE_TENSORS}
        return vars_of(self.space, SPACE_TENSORS) | own | vars_of(self.facts, FACT_TENSORS)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Scope":
        """The opposite of `tensors`."""
        return cls(
            Space(**{key: tensors[key] for key in SPACE_TENSORS}),
            **{key: tensors[key] for key in CENTRE_TENSORS},
            facts=Facts(**{key: tensors[key] for key in FACT_TENSORS}),
        )

    def same_space(self, other: "Scope") -> bool:
        """Whether both scopes come from the same background."""
        return self.space.same(other.space)

    def joined(self, other: "Scope") -> "Scope":
        """The union of this scope and another one of the same space."""
        assert self.same_space(other)
        parts = {key: _cat([getattr(self, key), getattr(other, key)]) for key in CENTRE_TENSORS}
        return replace(self, **parts, facts=joined_facts([self.facts, other.facts]))

    def without(self, other: "Scope") -> "Scope | None":
        """This scope without the centres, task_known states and facts of another one that was joined to it.

        Returns:
            The remaining scope, or None if nothing is left.

        Raises:
            ValueError: this scope does not contain the other one.
        """
        taught = [torch.cat([one.centres, one.lo[:, None], one.hi[:, None]], 1) for one in (self, other)]
        kept = _rows_without(*taught)
        facts = self.facts.without(other.facts)
        if not kept.any() and not len(facts):
            return None
        known = _rows_without(self.task_known, other.task_known)
        parts = {"task_known": self.task_known[known]}
        parts |= {key: getattr(self, key)[kept] for key in ("centres", "lo", "hi")}
        return replace(self, **parts, facts=facts)

    def copy(self) -> "Scope":
        """A copy on the CPU. The scope of a memory layer shares the layer's buffers; a copy does not."""
        return Scope.from_tensors({key: part.detach().cpu().clone() for key, part in self.tensors().items()})

    def gate(self, states: Tensor) -> Tensor:
        """Gate g [tokens] float32, from 0 to 1, of states [tokens, d], by the centres alone."""
        if not len(self.centres):
            return states.new_zeros(len(states), dtype=torch.float32)
        z = self.space.late(states)
        among = torch.maximum(nearest_known(z, self.space.known), nearest_known(z, self.task_known))
        score = z @ self.centres.T - self.space.known_weight * among[:, None]
        return ((score - self.lo) / (self.hi - self.lo)).clamp(0, 1).amax(-1)


def centre_scope(space: Space, task_known: Tensor, centres: Tensor, lo: Tensor, hi: Tensor) -> Scope:
    """A scope of a domain, without facts."""
    return Scope(space, task_known if len(task_known) else empty_tensor("task_known"), centres, lo, hi)


def fact_scope(space: Space, facts: Facts) -> Scope:
    """A scope of facts alone."""
    return Scope(space, *(empty_tensor(key) for key in CENTRE_TENSORS), facts=facts)


def empty_tensor(key: str) -> Tensor:
    """The tensor of this name of a layer without a scope."""
    return _EMPTY[key].clone()


def vars_of(held: object, keys: tuple[str, ...]) -> dict[str, Tensor]:
    return {key: getattr(held, key) for key in keys}


def _rows_without(rows: Tensor, block: Tensor) -> Tensor:
    """[n] bool: False for the rows of `rows` [n, k] that are `block` [m, k], found as consecutive rows."""
    kept = torch.ones(len(rows), dtype=torch.bool)
    if not len(block):
        return kept
    for start in range(len(rows) - len(block), -1, -1):
        if torch.equal(rows[start : start + len(block)], block):
            kept[start : start + len(block)] = False
            return kept
    raise ValueError("these centres are not in the scope")


def _cat(tensors: list[Tensor]) -> Tensor:
    """Tensors one after another; an empty one may have another width."""
    held = [one for one in tensors if len(one)]
    return torch.cat(held) if held else tensors[0]


def _nothing() -> Scope:
    none, nothing = torch.zeros(0), torch.zeros(0, 0)
    whole = torch.zeros(0, dtype=torch.int64)
    space = Space(none, nothing, nothing, none, none, nothing, whole, whole, whole)
    return Scope(space, nothing, nothing, none, none)


_EMPTY = _nothing().tensors()
