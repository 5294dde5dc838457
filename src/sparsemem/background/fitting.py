"""How a scope and keys are fitted to data: whitening, thresholds, k-means."""

import torch
from torch import Tensor

from ..layer.scope import KNOWN_WEIGHT, nearest_known

# Share of known answer starts that may lie past `lo`; of all states, where the background has no answers.
START_QUANTILE, STATE_QUANTILE = 0.98, 0.999
# `hi` lies this far on the way from `lo` to where an unseen wording of something taught is expected.
RAMP = 1 / 3
# The quantile of taught states' scores, without their own example, that `hi` may reach up to.
REACH = 0.02
# Taught states that are drawn to find the thresholds.
DRAWN_SIZE = 2_048
# Share of all states of general text that may lie past `lo`.
GENERAL_SHARE = 2e-4
# The share of taught states to be in scope, also where taught and known cannot be told apart; the ramp then,
# and the least ramp in any case: below it float32 could make lo and hi the same.
OWN_SHARE, WIDE_RAMP, LEAST_RAMP = 0.95, 0.1, 1e-3


def whitening(covariance: Tensor) -> Tensor:
    """W [d, d] float32: W C W^T = identity, C = covariance + 1e-3 of the mean variance on the diagonal."""
    covariance = covariance.double()
    ridge = 1e-3 * covariance.diagonal().mean().clamp_min(1e-12)
    variance, basis = torch.linalg.eigh(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64))
    return (basis / variance.clamp_min(ridge * 1e-3).sqrt()).T.float().contiguous()


def thresholds(
    taught: Tensor,
    example: Tensor,
    centres: Tensor,
    known: Tensor,
    decides: Tensor,
    general: Tensor,
    quantile: float,
    width: float,
) -> tuple[float, float, bool]:
    """The pair (lo, hi) of one kind of centre from data, and whether taught and known can be told apart.

    Every state is scored against the others alone: a known one without itself, a taught one without its own
    example. `lo` lies where known states of the same kind and general text are shut. `hi` lies RAMP of the
    way from there to the taught states' median, or at their quantile REACH where that is higher: these scores
    foretell those of unseen wordings, so `hi` need not be lower (dev/LOG.md, section 14).

    Args:
        taught: [n, d] whitened taught states of this kind; example: [n] which record each comes from.
        centres: [num_centres, d] of this kind.
        known: [num_known, d] all known states; decides: [num_known] bool, those of this kind.
        general: [m, d] whitened states of any text; at most GENERAL_SHARE of them may lie past `lo`.
        quantile: of the deciding known states' scores, where `lo` lies.
        width: `lo` is raised to this far below `hi`.
    """
    lo = 0.0
    if decides.any():
        # The nearest known state of a known one is itself: the second nearest counts.
        among = (known[decides] @ known.T).topk(min(2, len(known)), dim=-1).values
        among = among[:, 1].clamp_min(0) if among.shape[1] > 1 else 0.0
        lo = float(((known[decides] @ centres.T).amax(-1) - KNOWN_WEIGHT * among).quantile(quantile))
    if len(general):
        scores = (general @ centres.T).amax(-1) - KNOWN_WEIGHT * nearest_known(general, known)
        lo = max(lo, float(scores.quantile(1 - GENERAL_SHARE)))
    drawn = torch.randperm(len(taught), generator=torch.Generator().manual_seed(0))[:DRAWN_SIZE]
    among_known = KNOWN_WEIGHT * nearest_known(taught[drawn], known)
    # What is taught must itself be in scope, or it could not be learnt, even where it is as good as known.
    own = float((1 - among_known).quantile(1 - OWN_SHARE))
    alone = None
    if len(example.unique()) > 1:
        same = example[drawn][:, None] == example[None, :]
        alone = (taught[drawn] @ taught.T).masked_fill(same, -1.0).amax(-1) - among_known
    typical = own if alone is None else float(alone.median())
    if typical <= lo or own <= lo:
        lo = min(lo, own - WIDE_RAMP)
        return lo, lo + WIDE_RAMP, False
    hi = lo + RAMP * (typical - lo)
    if alone is not None:
        hi = max(hi, float(alone.quantile(REACH)))
    hi = max(min(hi, own), lo + LEAST_RAMP)
    return max(lo, hi - width), hi, True


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
