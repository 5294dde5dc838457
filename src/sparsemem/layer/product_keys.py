"""Product keys: scores of sub-keys, and the exact top_k over all pairs of them.

Every slot of a memory is a pair (i, j) of sub-keys, slot = i * num_keys + j, and its score is the sum of the
scores of i (first half of the query) and j (second half). The best top_k of all num_keys ** 2 sums are found
among few candidates: a pair whose halves rank i-th and j-th (from 0) is beaten by at least (i + 1)(j + 1) - 1
others, so only pairs with (i + 1)(j + 1) <= top_k can be chosen.

Reference: Lample 2019 (1907.05242), section 3.1; the candidate bound is ours.
"""

from functools import lru_cache

import torch
from torch import Tensor


def sub_key_scores(queries: Tensor, keys: Tensor, key_bias: Tensor) -> Tensor:
    """Score every sub-key of both halves.

    Args:
        queries: [tokens, heads, 2, half], half = key_dim / 2.
        keys: [heads, 2, num_keys, half].
        key_bias: [heads, 2, num_keys]; zero in the paper, -|key|^2 terms after `calibrate`.

    Returns:
        [tokens, heads, 2, num_keys].
    """
    return torch.einsum("thpc,hpnc->thpn", queries, keys) + key_bias


def top_k_slots(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The exact top_k slots by summed sub-key scores.

    Args:
        scores: [tokens, heads, 2, num_keys].
        top_k: at most num_keys ** 2.

    Returns:
        slots [tokens, heads, top_k] int64, and their scores [tokens, heads, top_k], best first. Where scores
        tie, the choice among equals is torch.topk's.
    """
    num_keys = scores.shape[-1]
    best, sub_keys = scores.topk(min(top_k, num_keys), dim=-1)
    first, second = _candidates(top_k, best.shape[-1], scores.device)
    sums = best[..., 0, :][..., first] + best[..., 1, :][..., second]
    top, chosen = sums.topk(top_k, dim=-1)
    slots = sub_keys[..., 0, :].gather(-1, first[chosen]) * num_keys + sub_keys[..., 1, :].gather(
        -1, second[chosen]
    )
    return slots, top


def exhaustive_top_k_slots(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The naive twin of `top_k_slots`: same arguments and result, over all num_keys ** 2 sums."""
    sums = (scores[..., 0, :, None] + scores[..., 1, None, :]).flatten(-2)
    top, slots = sums.topk(top_k, dim=-1)
    return slots, top


@lru_cache(maxsize=64)
def _candidates(top_k: int, num_best: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pairs = [(i, j) for i in range(num_best) for j in range(num_best) if (i + 1) * (j + 1) <= top_k]
    # Cached, so it must not be born an inference tensor, which no later backward pass could use.
    with torch.inference_mode(False):
        first, second = torch.tensor(pairs, device=device).unbind(1)
    return first, second
