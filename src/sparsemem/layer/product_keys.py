"""Product keys: score the sub-keys, then find the exact top_k slots over all pairs of sub-keys.

Every slot of a memory is a pair (i, j) of sub-keys, slot = i * num_keys + j. Its score is the sum of the
score of i (first half of the query) and the score of j (second half). Only a few of the num_keys ** 2 pairs
can be in the top_k. If a pair's halves have ranks i and j (from 0), at least (i + 1)(j + 1) - 1 other pairs
score as high or higher. So only pairs with (i + 1)(j + 1) <= top_k are candidates.

Reference: Lample 2019 (1907.05242), section 3.1; the candidate bound is ours.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def sub_key_scores(queries: Tensor, keys: Tensor, key_bias: Tensor) -> Tensor:
    """Score every sub-key of both halves.

    Args:
        queries: [tokens, heads, 2, half], half = key_dim / 2.
        keys: [heads, 2, num_keys, half].
        key_bias: [heads, 2, num_keys]. Zero in the paper; `calibrate` sets it to -|centroid|^2, scaled.

    Returns:
        [tokens, heads, 2, num_keys].
    """
    # in place: a second tensor of this size would cost more than the sum
    return torch.einsum("thpc,hpnc->thpn", queries, keys).add_(key_bias)


def best_sub_keys(queries: Tensor, keys: Tensor, key_bias: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """The best sub-keys of both halves, of the arguments of `sub_key_scores`.

    If only the queries need a gradient, it is computed from these sub-keys alone. So the backward pass does
    not grow with num_keys.

    Returns:
        Scores and indices, each [tokens, heads, 2, num_best], best first.
    """
    only_queries = queries.requires_grad and not (keys.requires_grad or key_bias.requires_grad)
    if torch.is_grad_enabled() and only_queries:
        return _BestSubKeys.apply(queries, keys, key_bias, num_best)  # type: ignore[return-value]
    return sub_key_scores(queries, keys, key_bias).topk(num_best, dim=-1)  # type: ignore[return-value]


class _BestSubKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, key_bias, num_best):
        best, sub_keys = sub_key_scores(queries, keys, key_bias).topk(num_best, dim=-1)
        ctx.save_for_backward(keys, sub_keys)
        ctx.mark_non_differentiable(sub_keys)
        return best, sub_keys

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        keys, sub_keys = ctx.saved_tensors
        heads, halves, num_keys, width = keys.shape
        first = torch.arange(heads * halves, device=keys.device).view(heads, halves, 1) * num_keys
        rows = (sub_keys + first).view(-1, sub_keys.shape[-1])
        weights = grad_outputs[0].reshape(rows.shape)
        table = keys.reshape(-1, width)
        grad = F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")
        return grad.view(*sub_keys.shape[:-1], width), None, None, None


def best_pairs(best: Tensor, sub_keys: Tensor, num_keys: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The exact top_k slots by summed sub-key scores.

    Args:
        best, sub_keys: [..., heads, 2, n], scores and indices of the best n = min(top_k, num_keys) sub-keys
            of both halves, as from `best_sub_keys`.
        top_k: at most num_keys ** 2.

    Returns:
        slots [..., heads, top_k] int64, and their scores [..., heads, top_k], best first. Ties are broken as
        `torch.topk` breaks them.
    """
    # a compiler traces the function, and would warn of its cache
    candidates = _candidates.__wrapped__ if torch.compiler.is_compiling() else _candidates
    first, second = candidates(top_k, best.shape[-1], best.device)
    sums = best[..., 0, :][..., first] + best[..., 1, :][..., second]
    top, chosen = sums.topk(top_k, dim=-1)
    slots = sub_keys[..., 0, :].gather(-1, first[chosen]) * num_keys + sub_keys[..., 1, :].gather(
        -1, second[chosen]
    )
    return slots, top


@lru_cache(maxsize=64)
def _candidates(top_k: int, num_best: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pairs = [(i, j) for i in range(num_best) for j in range(num_best) if (i + 1) * (j + 1) <= top_k]
    # The result is cached. An inference tensor could not be used in a later backward pass.
    with torch.inference_mode(False):
        first, second = torch.tensor(pairs, device=device).unbind(1)
    return first, second
