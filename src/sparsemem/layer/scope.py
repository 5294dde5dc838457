"""The relevance gate of one memory layer: how far a hidden state lies inside the taught region.

A scope has centres, which stand for what is taught, and known states, which stand for what the base model
already knows (states of answers in the background). Both are unit vectors in whitened space. Each centre has
its own pair of thresholds, lo and hi. For a state x:

    z = normalise(W (x - mean))
    s_c(x) = z . c - known_weight * max(0, max_b z . b)
    g(x) = max_c clip((s_c(x) - lo_c) / (hi_c - lo_c), 0, 1)

g is exactly 0 out of scope, so for such a token the memory adds nothing and the output is bit-identical to
the base model's. The scopes of several tasks are joined by concatenating their centres, because each centre
has its own thresholds. The gate has no gradient.

A centre may have a row of its own. Then the nearest open centre adds its row to what the memory reads, and no
other centre's row is read there: tasks that have rows of their own cannot change each other.

Reference: ours (no paper). The known states let the gate tell a taught subject from a known subject in the
same form of question. dev/LOG.md has the measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

# Weight of the similarity to known states, which is subtracted from the similarity to a centre.
KNOWN_WEIGHT = 0.5


@dataclass(frozen=True)
class Scope:
    """The scope of one memory layer. All tensors are float32.

    Attributes:
        mean [d], whitener [d, d], known [num_known, d], known_weight [1]: from the background, and the same
            for all tasks ("the space").
        task_known [num_task_known, d]: further known states, given for the taught tasks.
        centres [num_centres, d], lo, hi [num_centres]: the taught states, and the thresholds of each centre.
        rows [num_centres, d_out]: the centres' own rows; [0, 0] if no centre has one.
    """

    mean: Tensor
    whitener: Tensor
    known: Tensor
    known_weight: Tensor
    task_known: Tensor
    centres: Tensor
    lo: Tensor
    hi: Tensor
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def same_space(self, other: "Scope") -> bool:
        """Whether both scopes come from the same background."""
        return all(torch.equal(getattr(self, key), getattr(other, key)) for key in SPACE_PARTS)

    def joined(self, other: "Scope") -> "Scope":
        """The union of this scope and another one of the same space."""
        assert self.same_space(other)
        parts = {key: torch.cat([getattr(self, key), getattr(other, key)]) for key in TASK_PARTS}
        return replace(self, **parts, rows=_rows_of([self, other]))

    def without(self, other: "Scope") -> "Scope | None":
        """This scope without the centres and task_known states of another scope, which was joined to it.

        Returns:
            The remaining scope, or None if no centre is left.

        Raises:
            ValueError: this scope does not contain the other one.
        """
        taught = [torch.cat([one.centres, one.lo[:, None], one.hi[:, None]], 1) for one in (self, other)]
        kept = _rows_without(*taught)
        if not kept.any():
            return None
        known = _rows_without(self.task_known, other.task_known)
        parts = {"task_known": self.task_known[known]}
        parts |= {key: getattr(self, key)[kept] for key in ("centres", "lo", "hi")}
        rows = self.rows[kept] if len(self.rows) else self.rows
        return replace(self, **parts, rows=rows if rows.any() else rows.new_zeros(0, 0))

    def copy(self) -> "Scope":
        """A copy on the CPU. The scope of a memory layer shares the layer's buffers; a copy does not."""
        return Scope(
            **{field.name: getattr(self, field.name).detach().cpu().clone() for field in fields(self)}
        )

    def gate(self, states: Tensor) -> Tensor:
        """Gate g [tokens] float32, from 0 to 1, of states [tokens, d]. Exactly 0 out of scope."""
        score = self._scores(states)
        return ((score - self.lo) / (self.hi - self.lo)).clamp(0, 1).amax(-1)

    def own_read(self, states: Tensor) -> Tensor:
        """[tokens, d_out] of states [tokens, d]: the row of the nearest open centre, the last one of equals.

        Zeros where no centre is open. A scope without rows gives [tokens, 0].
        """
        if not len(self.rows):
            return states.new_zeros(len(states), 0)
        place = self.nearest_open(states)
        return self.rows[place] * (place >= 0)[:, None]

    def nearest_open(self, states: Tensor) -> Tensor:
        """[tokens] int64: which centre each of the states [tokens, d] is in, the last of equals; -1: none."""
        score = self._scores(states)
        score = score.masked_fill(score <= self.lo, -torch.inf).flip(-1)
        best, place = score.max(-1)
        return (score.shape[1] - 1 - place).masked_fill(~best.isfinite(), -1)

    def _scores(self, states: Tensor) -> Tensor:
        z = whiten(states, self.mean, self.whitener)
        among_known = torch.maximum(nearest_known(z, self.known), nearest_known(z, self.task_known))
        return z @ self.centres.T - self.known_weight * among_known[:, None]


# The fields that all tasks share, and those that each task has for itself beside its rows.
SPACE_PARTS = ("mean", "whitener", "known", "known_weight")
TASK_PARTS = ("task_known", "centres", "lo", "hi")


def _rows_of(scopes: Sequence[Scope]) -> Tensor:
    """The rows of all centres, scope after scope, zeros for those without; [0, 0] if none has any."""
    width = max(scope.rows.shape[1] for scope in scopes)
    parts = [
        scope.rows if len(scope.rows) else scope.centres.new_zeros(len(scope.centres), width)
        for scope in scopes
    ]
    return torch.cat(parts) if width else scopes[0].rows


def _rows_without(rows: Tensor, block: Tensor) -> Tensor:
    """[n] bool: False for the rows of `rows` [n, k] that are `block` [m, k], found as consecutive rows."""
    kept = torch.ones(len(rows), dtype=torch.bool)
    for start in range(len(rows) - len(block), -1, -1):
        if torch.equal(rows[start : start + len(block)], block):
            kept[start : start + len(block)] = False
            return kept
    raise ValueError("these centres are not in the scope")


def whiten(states: Tensor, mean: Tensor, whitener: Tensor) -> Tensor:
    """Whiten states [tokens, d] and scale them to length 1: [tokens, d] float32."""
    return F.normalize((states.float() - mean) @ whitener.T, dim=-1)


def nearest_known(z: Tensor, known: Tensor) -> Tensor:
    """Largest cosine of each state z [tokens, d] to a known state, at least 0: [tokens]."""
    return (z @ known.T).amax(-1).clamp_min(0) if len(known) else z.new_zeros(z.shape[0])
