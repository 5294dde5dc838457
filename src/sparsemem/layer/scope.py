"""The relevance gate of one memory layer: how far inside the taught region a hidden state lies.

A scope is a set of centres (what is taught) with a threshold pair each, and a set of known states (answer
starts of the background), all of them unit vectors in whitened space. For a state x:

    z = normalise(W (x - mean))
    s_c(x) = z . c - known_weight * max(0, max_b z . b)
    g(x) = max_c clip((s_c(x) - lo_c) / (hi_c - lo_c), 0, 1)

g is exactly 0 outside, so a token out of scope leaves the model as it was, to the bit. Thresholds belong to
centres, so the union of several taught tasks is the concatenation of their centres. The gate has no gradient.

A centre may have a row of its own. Then the nearest open centre adds its row to what the memory reads, and no
other centre's row is read there: tasks that have rows of their own cannot change each other.

Reference: ours (no paper). The known states are what tells a taught subject from a known one of the same
question form; dev/LOG.md has the measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

# How much nearness to something known counts against nearness to something taught.
KNOWN_WEIGHT = 0.5


@dataclass(frozen=True)
class Scope:
    """What one memory layer takes as taught; all float32.

    Attributes:
        mean [d], whitener [d, d], known [num_known, d], known_weight [1]: the space.
        task_known [num_task_known, d]: known states that belong to what is taught.
        centres [num_centres, d], lo, hi [num_centres]: what is taught in it, with a threshold pair each.
        rows [num_centres, d_out]: the centres' own rows; [0, 0] where none has one.
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
        return all(torch.equal(getattr(self, key), getattr(other, key)) for key in SPACE_PARTS)

    def joined(self, other: "Scope") -> "Scope":
        """The union with a scope of the same space."""
        assert self.same_space(other)
        parts = {key: torch.cat([getattr(self, key), getattr(other, key)]) for key in TASK_PARTS}
        return replace(self, **parts, rows=_rows_of([self, other]))

    def without(self, other: "Scope") -> "Scope | None":
        """What is left when the other's centres and known states, blocks of this scope's, are taken away.

        Returns:
            None if nothing is left.

        Raises:
            ValueError: the other is not in this scope.
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
        """A copy on the CPU, where a memory layer's own scope is a view of its buffers."""
        return Scope(
            **{field.name: getattr(self, field.name).detach().cpu().clone() for field in fields(self)}
        )

    def gate(self, states: Tensor) -> Tensor:
        """g [tokens] float32 in [0, 1] of states [tokens, d]; exactly 0 out of scope."""
        score = self._scores(states)
        return ((score - self.lo) / (self.hi - self.lo)).clamp(0, 1).amax(-1)

    def own_read(self, states: Tensor) -> Tensor:
        """[tokens, d_out] of states [tokens, d]: the row of the nearest open centre, the last one of equals.

        Zeros where no centre is open. A scope without rows gives [tokens, 0].
        """
        if not len(self.rows):
            return states.new_zeros(len(states), 0)
        score = self._scores(states)
        score = score.masked_fill(score <= self.lo, -torch.inf).flip(-1)
        best, place = score.max(-1)
        return self.rows[score.shape[1] - 1 - place] * best.isfinite()[:, None]

    def _scores(self, states: Tensor) -> Tensor:
        z = whiten(states, self.mean, self.whitener)
        among_known = torch.maximum(nearest_known(z, self.known), nearest_known(z, self.task_known))
        return z @ self.centres.T - self.known_weight * among_known[:, None]


# The space that all taught tasks share, and what a scope holds of each of them beside its rows.
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
    """[n] bool: which of `rows` [n, k] are left when `block` [m, k], some rows in a row, is taken away."""
    kept = torch.ones(len(rows), dtype=torch.bool)
    for start in range(len(rows) - len(block), -1, -1):
        if torch.equal(rows[start : start + len(block)], block):
            kept[start : start + len(block)] = False
            return kept
    raise ValueError("these centres are not in the scope")


def whiten(states: Tensor, mean: Tensor, whitener: Tensor) -> Tensor:
    """Unit vectors [tokens, d] float32 in whitened space, of states [tokens, d]."""
    return F.normalize((states.float() - mean) @ whitener.T, dim=-1)


def nearest_known(z: Tensor, known: Tensor) -> Tensor:
    return (z @ known.T).amax(-1).clamp_min(0) if len(known) else z.new_zeros(len(z))
