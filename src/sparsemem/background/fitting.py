"""Functions that fit a scope and keys to data: whitening, thresholds, k-means."""

import torch
from torch import Tensor

from ..layer.scope import KNOWN_WEIGHT
from ..layer.space import nearest_known

# `lo` is at least this quantile of the scores of known states. START_QUANTILE is for known states of answers,
# STATE_QUANTILE is for a background without answers.
START_QUANTILE, STATE_QUANTILE = 0.98, 0.999
# `hi` is this share of the way from `lo` to the expected score of an unseen wording of what is taught.
RAMP = 1 / 3
# `hi` may be raised to this quantile of the scores of taught states, computed without their own example.
REACH = 0.02
# Maximum number of taught states that are used to find the thresholds, drawn at random.
DRAWN_SIZE = 2_048
# At most this share of the states of general text may have a score above `lo`.
GENERAL_SHARE = 2e-4
# OWN_SHARE: at least this share of the taught states must be in scope. WIDE_RAMP: hi - lo if taught and known
# states cannot be told apart. LEAST_RAMP: the smallest hi - lo, so that they differ in float32.
OWN_SHARE, WIDE_RAMP, LEAST_RAMP = 0.95, 0.1, 1e-3


def whitening(covariance: Tensor) -> Tensor:
    """The matrix W [d, d] float32 with W C W^T = identity, for a covariance [d, d].

    C is the covariance with 1e-3 of the mean variance added to its diagonal.
    """
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
    """Find the thresholds lo and hi of one kind of centre from data.

    The score of a state is computed without the state itself: a known state is compared with the other known
    states, a taught state with the taught states of other examples. `lo` is chosen so that the gate is 0 for
    most known states of this kind and for nearly all general text. `hi` is RAMP of the way from `lo` to the
    median score of the taught states, or their quantile REACH if that is higher. These scores predict those
    of unseen wordings, so `hi` need not be lower (dev/LOG.md, section 14).

    Args:
        taught: [n, d], whitened taught states of this kind.
        example: [n], the record that each taught state comes from.
        centres: [num_centres, d] of this kind.
        known: [num_known, d], all known states.
        decides: [num_known] bool, which known states are of this kind.
        general: [m, d], whitened states of any text. At most GENERAL_SHARE of them may have a score above
            `lo`.
        quantile: `lo` is at least this quantile of the scores of the known states of this kind.
        width: `lo` is raised if it is more than this below `hi`.

    Returns:
        lo, hi, and whether taught and known states can be told apart.
    """
    lo = 0.0
    if decides.any():
        # The nearest known state of a known state is itself, so the second nearest is used.
        among = (known[decides] @ known.T).topk(min(2, len(known)), dim=-1).values
        among = among[:, 1].clamp_min(0) if among.shape[1] > 1 else 0.0
        lo = float(((known[decides] @ centres.T).amax(-1) - KNOWN_WEIGHT * among).quantile(quantile))
    if len(general):
        scores = (general @ centres.T).amax(-1) - KNOWN_WEIGHT * nearest_known(general, known)
        lo = max(lo, float(scores.quantile(1 - GENERAL_SHARE)))
    drawn = torch.randperm(len(taught), generator=torch.Generator().manual_seed(0))[:DRAWN_SIZE]
    among_known = KNOWN_WEIGHT * nearest_known(taught[drawn], known)
    # Taught states must be in scope, even if they are very similar to known states, or nothing is learnt.
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
    """Centroids [num_centres, d] of points [n, d], by k-means++ and then Lloyd's algorithm.

    The result depends only on the arguments and the state of `generator`. An empty cluster is moved to the
    point that is farthest from its centroid. If there are fewer points than centres, points are repeated with
    a little noise, so that all centroids differ.
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
    """k-means++: each new seed is drawn in proportion to its squared distance to the nearest seed."""
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
