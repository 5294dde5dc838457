"""Greedy decoding of many prompts in batches."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..precision import autocast, device_of, takes
from .conversations import QUESTION, end_tokens


def complete(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop: str | None = None,
    batch_size: int = 64,
    precision: str | None = None,
) -> list[str]:
    """Greedy continuations of token ids, as texts without surrounding white space, each cut before `stop`."""
    tokens = complete_tokens(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch_size=batch_size,
        precision=precision,
    )
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.split(stop)[0].strip() if stop else text.strip() for text in texts]


@torch.inference_mode()
def complete_tokens(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop: str | None = None,
    batch_size: int = 64,
    precision: str | None = None,
) -> list[list[int]]:
    """Greedy continuations of token ids, as token ids; the end token, where there is one, is included.

    Args:
        stop: a text that ends a continuation. The tokens in which it occurs are included.
        precision: "float32", "bfloat16", or None for the faster of the two.
    """
    model.eval()
    ends = end_tokens(model, tokenizer)
    pad: Any = tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        stop_strings=stop,
    )
    continued: list[list[int]] = [[]] * len(prompts)
    shared, read = read_beginning(model, prompts, precision=precision)
    beginning = torch.tensor([prompts[0][:shared]], dtype=torch.int64, device=device_of(model))
    for chosen in by_length(prompts, batch_size):
        ids, mask = pad_left([prompts[index][shared:] for index in chosen], model)
        ids = torch.cat([beginning.expand(len(ids), -1), ids], 1)
        mask = functional.pad(mask, (shared, 0), value=1)
        with autocast(model, precision=precision):
            out = model.generate(  # type: ignore
                input_ids=ids,
                attention_mask=mask,
                past_key_values=rows_of(read, [0] * len(chosen)),
                generation_config=config,
                tokenizer=tokenizer,
            )
        for index, answer in zip(chosen, out[:, ids.shape[1] :].tolist(), strict=True):
            continued[index] = _until_end(answer, ends, pad)
    return continued


def answer_tokens(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    precision: str | None = None,
) -> list[list[int]]:
    """`complete_tokens` for questions; without a chat template an answer ends at the next question."""
    stop = None if tokenizer.chat_template else f"\n{QUESTION}"
    return complete_tokens(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, stop=stop, precision=precision
    )


def _until_end(tokens: list[int], ends: set[int], pad: int | None) -> list[int]:
    """The tokens up to and including the first end token, or without trailing padding if there is none."""
    last = next((place for place, token in enumerate(tokens) if token in ends), None)
    if last is not None:
        return tokens[: last + 1]
    while tokens and tokens[-1] == pad:
        tokens = tokens[:-1]
    return tokens


def read_beginning(
    model: Any, prompts: Sequence[Sequence[int]], *, precision: str | None
) -> tuple[int, DynamicCache | None]:
    """The number of tokens that all prompts begin with (a system prompt, worked examples), and their cache.

    At least one token of every prompt is left out of the shared beginning. Without shared tokens, and where
    the model's cache cannot be repeated, nothing is shared and the cache is None.
    """
    differ = (place for place, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    num_shared = next(differ, min(map(len, prompts)) - 1)
    cache = cache_of(model, prompts[0][:num_shared], precision=precision) if num_shared else None
    return (0, None) if cache is None else (num_shared, cache)


def cache_of(model: Any, ids: Sequence[int], *, precision: str | None) -> DynamicCache | None:
    """The cache of token ids; None where its rows cannot be selected and repeated, since it holds states of
    linear attention or of convolutions beside keys and values, or where the model has none."""
    with autocast(model, precision=precision):
        out = model(
            input_ids=torch.tensor([list(ids)], device=device_of(model)),
            **accepted(model, use_cache=True, logits_to_keep=1),
        )
    cache = getattr(out, "past_key_values", None)
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    plain = type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)
    return cache if plain else None


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
