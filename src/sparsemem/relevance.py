"""The relevance gate of one memory layer: how far inside the taught region a hidden state lies.

A scope is a set of centres in whitened space with a threshold pair each. For a state x:

    z(x) = normalise(W (x - mean)),  g(x) = max_c clip((z(x) . c - lo_c) / (hi_c - lo_c), 0, 1)

g is exactly 0 outside, so a token out of scope leaves the model as it was, to the bit. Thresholds belong to centres,
so the union of several taught tasks is the concatenation of their centres. The gate is not differentiated.

Reference: ours (no paper); DESIGN of the thresholds in `thresholds`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Share of background states that may lie past `lo`, and how far between `lo` and the taught states `hi` is set.
BACKGROUND_QUANTILE = 0.999


def whitening(covariance: Tensor) -> Tensor:
    """W [d, d] float32 with W C W^T = identity, for C = covariance + 1e-3 of the mean variance on the diagonal."""
    covariance = covariance.double()
    ridge = 1e-3 * covariance.diagonal().mean().clamp_min(1e-12)
    variance, basis = torch.linalg.eigh(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64))
    return (basis / variance.clamp_min(ridge * 1e-3).sqrt()).T.float().contiguous()


def whiten(states: Tensor, mean: Tensor, whitener: Tensor) -> Tensor:
    """Unit vectors [tokens, d] float32 in whitened space, of states [tokens, d]."""
    return F.normalize((states.float() - mean) @ whitener.T, dim=-1)


def gate(states: Tensor, mean: Tensor, whitener: Tensor, centres: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """g in [0, 1], [tokens] float32; exactly 0 out of scope.

    Args:
        states: [tokens, d]; mean: [d]; whitener: [d, d]; centres: [num_centres, d], unit length; lo, hi: [num_centres].
    """
    cosine = whiten(states, mean, whitener) @ centres.T
    return ((cosine - lo) / (hi - lo)).clamp(0, 1).amax(-1)


def thresholds(taught: Tensor, example: Tensor, background: Tensor, centres: Tensor) -> tuple[float, float, bool]:
    """The pair (lo, hi) from data, and whether taught and background states can be told apart.

    Args:
        taught: [n, d] whitened states of the supervised positions; example: [n] which record each comes from.
        background: [m, d] whitened states of the background.
        centres: [num_centres, d].
    """
    nearest = _max_cosine(background, centres)
    lo = float(nearest.quantile(BACKGROUND_QUANTILE)) if len(nearest) else 0.0
    others = example[:, None] != example[None, :]
    cosine = (taught @ taught.T).masked_fill(~others, -1.0).amax(-1)
    typical = float(cosine.median())
    separable = typical > lo
    return lo, (lo + typical) / 2 if separable else (lo + 1) / 2, separable


def k_means(points: Tensor, num_centres: int, generator: torch.Generator, steps: int = 20) -> Tensor:
    """Centroids [num_centres, d] of points [n, d] by Lloyd's algorithm; deterministic by generator.

    Empty clusters restart at the points that are farthest from their centroid. With fewer points than centres, points
    repeat with a little noise, so that no two centroids coincide.
    """
    n = len(points)
    order = torch.randperm(n, generator=generator)
    centres = points[order[torch.arange(num_centres) % n]].clone()
    if n < num_centres:
        scale = points.std().clamp_min(1e-6) * 1e-2
        return centres + scale * torch.randn(centres.shape, generator=generator)
    for _ in range(steps):
        distance, nearest = _nearest(points, centres)
        sizes = torch.bincount(nearest, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = sums / sizes.clamp_min(1)[:, None]
        empty = (sizes == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = points[distance.topk(len(empty)).indices]
    return centres


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [torch.cdist(part, centres).min(-1) for part in points.split(4096)]
    return torch.cat([p.values for p in pairs]), torch.cat([p.indices for p in pairs])


def _max_cosine(states: Tensor, centres: Tensor) -> Tensor:
    return torch.cat([(part @ centres.T).amax(-1) for part in states.split(4096)]) if len(states) else states[:, 0]
