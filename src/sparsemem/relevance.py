"""The relevance gate of one memory layer: how far inside the taught region a hidden state lies.

A scope is a set of centres (what is taught) with a threshold pair each, and a set of known states (answer
starts of the background), all of them unit vectors in whitened space. For a state x:

    z = normalise(W (x - mean))
    s_c(x) = z . c - KNOWN_WEIGHT * max(0, max_b z . b)
    g(x) = max_c clip((s_c(x) - lo_c) / (hi_c - lo_c), 0, 1)

g is exactly 0 outside, so a token out of scope leaves the model as it was, to the bit. Thresholds belong to
centres, so the union of several taught tasks is the concatenation of their centres. The gate has no gradient.

Reference: ours (no paper). The known states are what tells a taught subject from a known one of the same
question form; dev/LOG.md has the measurement.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

# How much nearness to something known counts against nearness to something taught.
KNOWN_WEIGHT = 0.5
# Share of known answer starts that may lie past `lo`; of all states, where the background has no answers.
START_QUANTILE, STATE_QUANTILE = 0.98, 0.999
# `hi` lies this far on the way from `lo` to where an unseen wording of something taught is expected.
RAMP = 1 / 3
# Where taught and known cannot be told apart: the share of taught answers to be in scope, and the ramp.
OWN_SHARE, LEAST_RAMP = 0.95, 0.1


@dataclass(frozen=True)
class Scope:
    """What one memory layer takes as taught; all float32.

    Attributes:
        mean [d], whitener [d, d], known [num_known, d]: the space.
        centres [num_centres, d], lo, hi [num_centres]: what is taught in it, with a threshold pair each.
    """

    mean: Tensor
    whitener: Tensor
    known: Tensor
    centres: Tensor
    lo: Tensor
    hi: Tensor

    def same_space(self, other: "Scope") -> bool:
        return all(
            torch.equal(getattr(self, key), getattr(other, key)) for key in ("mean", "whitener", "known")
        )

    def joined(self, other: "Scope") -> "Scope":
        """The union with a scope of the same space."""
        assert self.same_space(other)
        mine, theirs = self._rows(), other._rows()
        return self._with(torch.cat([mine, theirs]))

    def without(self, other: "Scope") -> "Scope | None":
        """What is left when the other's centres, a block of this scope, are taken away; None if nothing is.

        Raises:
            ValueError: the other's centres are not in this scope.
        """
        mine, block = self._rows(), other._rows()
        for start in range(len(mine) - len(block), -1, -1):
            if torch.equal(mine[start : start + len(block)], block):
                rest = torch.cat([mine[:start], mine[start + len(block) :]])
                return self._with(rest) if len(rest) else None
        raise ValueError("these centres are not in the scope")

    def copy(self) -> "Scope":
        """A copy on the CPU, where a memory layer's own scope is a view of its buffers."""
        return Scope(
            **{field.name: getattr(self, field.name).detach().cpu().clone() for field in fields(self)}
        )

    def gate(self, states: Tensor) -> Tensor:
        """g [tokens] float32 in [0, 1] of states [tokens, d]; exactly 0 out of scope."""
        z = whiten(states, self.mean, self.whitener)
        score = z @ self.centres.T - KNOWN_WEIGHT * _nearest_known(z, self.known)[:, None]
        return ((score - self.lo) / (self.hi - self.lo)).clamp(0, 1).amax(-1)

    def _rows(self) -> Tensor:
        return torch.cat([self.centres, self.lo[:, None], self.hi[:, None]], 1)

    def _with(self, rows: Tensor) -> "Scope":
        return Scope(self.mean, self.whitener, self.known, rows[:, :-2], rows[:, -2], rows[:, -1])


def whitening(covariance: Tensor) -> Tensor:
    """W [d, d] float32: W C W^T = identity, C = covariance + 1e-3 of the mean variance on the diagonal."""
    covariance = covariance.double()
    ridge = 1e-3 * covariance.diagonal().mean().clamp_min(1e-12)
    variance, basis = torch.linalg.eigh(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64))
    return (basis / variance.clamp_min(ridge * 1e-3).sqrt()).T.float().contiguous()


def whiten(states: Tensor, mean: Tensor, whitener: Tensor) -> Tensor:
    """Unit vectors [tokens, d] float32 in whitened space, of states [tokens, d]."""
    return F.normalize((states.float() - mean) @ whitener.T, dim=-1)


def thresholds(
    taught: Tensor, example: Tensor, starts: Tensor, centres: Tensor, known: Tensor, quantile: float
) -> tuple[float, float, bool]:
    """The pair (lo, hi) from data, and whether what is taught and what is known can be told apart.

    An answer is decided at its start, and there taught and known are hardest to tell apart. Every state is
    scored against the others alone: a known one without itself, a taught one without its own example.

    Args:
        taught: [n, d] whitened states of the supervised positions; example: [n] which record each comes from;
            starts: [n] bool, the first position of each answer.
        centres: [num_centres, d].
        known: [num_known, d].
        quantile: of the known states' scores, where `lo` lies.
    """
    others_known = (known @ known.T).fill_diagonal_(-1.0).amax(-1).clamp_min(0) if len(known) > 1 else 0.0
    scores = (known @ centres.T).amax(-1) - KNOWN_WEIGHT * others_known
    lo = float(scores.quantile(quantile)) if len(known) else 0.0
    chosen = starts if starts.any() else torch.ones_like(starts)
    same = example[chosen][:, None] == example[None, :]
    others = (taught[chosen] @ taught.T).masked_fill(same, -1.0).amax(-1)
    among_known = KNOWN_WEIGHT * _nearest_known(taught[chosen], known)
    typical = float((others - among_known).median())
    # What is taught must itself be in scope, or it could not be learnt, even where it is as good as known.
    own = float((1 - among_known).quantile(1 - OWN_SHARE))
    if typical > lo and own > lo:
        return lo, min(lo + RAMP * (typical - lo), own), True
    lo = min(lo, own - LEAST_RAMP)
    return lo, lo + LEAST_RAMP, False


def k_means(points: Tensor, num_centres: int, generator: torch.Generator, steps: int = 20) -> Tensor:
    """Centroids [num_centres, d] of points [n, d]: k-means++, then Lloyd's; deterministic by generator.

    Empty clusters restart at the points that are farthest from their centroid. With fewer points than
    centres, points repeat with a little noise, so that no two centroids coincide.
    """
    n = len(points)
    if n < num_centres:
        repeated = points[torch.arange(num_centres) % n]
        noise = torch.randn(repeated.shape, generator=generator)
        return repeated + 1e-2 * points.std(unbiased=False).clamp_min(1e-6) * noise
    centres = _seeds(points, num_centres, generator)
    for _ in range(steps):
        distance, nearest = _nearest(points, centres)
        sizes = torch.bincount(nearest, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = sums / sizes.clamp_min(1)[:, None]
        empty = (sizes == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = points[distance.topk(len(empty)).indices]
    return centres


def _seeds(points: Tensor, num_centres: int, generator: torch.Generator) -> Tensor:
    """k-means++: each seed is drawn in proportion to its squared distance to the seeds before it."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    distance = (points - points[chosen[0]]).square().sum(-1)
    while len(chosen) < num_centres:
        weights = distance if distance.any() else torch.ones_like(distance)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(-1))
    return points[chosen].clone()


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [torch.cdist(part, centres).min(-1) for part in points.split(4096)]
    return torch.cat([p.values for p in pairs]), torch.cat([p.indices for p in pairs])


def _nearest_known(z: Tensor, known: Tensor) -> Tensor:
    return (z @ known.T).amax(-1).clamp_min(0) if len(known) else z.new_zeros(len(z))
