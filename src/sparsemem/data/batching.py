"""Batches of sequences of different lengths, and a key-value cache of the tokens they all begin with."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..precision import autocast, device_of, takes


def read_beginning(
    model: Any, prompts: Sequence[Sequence[int]], *, precision: str | None
) -> tuple[int, DynamicCache | None]:
    """The number of tokens that all prompts begin with (a system prompt, worked examples), and their cache.

    At least one token of every prompt is left out of the shared beginning. Without shared tokens the cache is
    None.
    """
    differ = (place for place, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    num_shared = next(differ, min(map(len, prompts)) - 1)
    if not num_shared:
        return 0, None
    ids = torch.tensor([list(prompts[0][:num_shared])], device=device_of(model))
    with autocast(model, precision=precision):
        out = model(input_ids=ids, use_cache=True, **accepted(model, logits_to_keep=1))
    return num_shared, out.past_key_values


def rows_of(cache: DynamicCache | None, rows: Sequence[int]) -> DynamicCache | None:
    """A new cache with the given rows of `cache`; a row may occur several times. None gives None."""
    if cache is None:
        return None
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    taken.batch_select_indices(torch.tensor(rows))
    return taken


def by_length(sequences: Sequence[Sequence[int]], batch_size: int, *, tight: bool = False) -> list[list[int]]:
    """Indices in batches of similar length, the longest first.

    With `tight`, every sequence of a batch has at least three quarters of the longest one's length.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index])):
        room = batches and len(batches[-1]) < batch_size
        if room and not (tight and len(sequences[index]) < 0.75 * len(sequences[batches[-1][0]])):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad_left(sequences: Sequence[Sequence[int]], model: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [batch, seq] on the model's device, padded on the left with token 0."""
    length, device = max(map(len, sequences)), device_of(model)
    ids = torch.tensor([[0] * (length - len(one)) + list(one) for one in sequences], device=device)
    mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in sequences], device=device)
    return ids, mask


def accepted(model: Any, **inputs: Any) -> dict[str, Any]:
    """The inputs that this model's forward accepts."""
    return {name: value for name, value in inputs.items() if takes(model, name)}
