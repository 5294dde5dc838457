"""Log-probabilities of several continuations of each context, with one forward pass per context.

Choices: the tokens that all contexts begin with are computed once. Contexts of similar length share a batch,
padded on the left, which gives a key-value cache. Each continuation, padded on the right, uses its context's
row of this cache. The context's forward pass predicts the first token of a continuation. The last token is
only predicted and never an input.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..data.generation import accepted, by_length, cache_of, pad_left, read_beginning, rows_of
from ..data.models import context_length
from ..precision import autocast

logger = logging.getLogger(__name__)


@torch.inference_mode()
def log_probs(
    model: PreTrainedModel | PeftModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 16,
    precision: str | None = None,
) -> list[list[Tensor]]:
    """Log-probabilities of each continuation's tokens after its context, float32 [tokens] on the CPU.

    If context and continuation are longer than the model's context length, the context's first tokens are
    dropped.

    Args:
        contexts: token ids.
        continuations: for each context, the token ids of all its continuations.
        batch_size: rows of one forward pass, of contexts as well as of continuations.
        precision: "float32", "bfloat16", or None for the faster of the two.

    Raises:
        ValueError: a context without its list of continuations, or one of them has no token or too many.
    """
    kept = _fitting(model, contexts, continuations)
    model.eval()
    found = [[torch.empty(0)] * len(several) for several in continuations]
    num_shared, beginning = read_beginning(model, kept, precision=precision)
    if not num_shared and cache_of(model, kept[0][:1], precision=precision) is None:
        return _whole(model, kept, continuations, batch_size, precision=precision)
    for chosen in by_length([context[num_shared:] for context in kept], batch_size, tight=True):
        ids, mask = pad_left([kept[index][num_shared:] for index in chosen], model)
        # the padding is between the shared beginning and the rest of the context
        mask = functional.pad(mask, (num_shared, 0), value=1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, num_shared:]
        with autocast(model, precision=precision):
            out = model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=rows_of(beginning, [0] * len(chosen)),
                use_cache=True,
                **accepted(model, position_ids=places, logits_to_keep=1),
            )
        first = out.logits[:, -1].float().log_softmax(-1)
        owners = [(row, n) for row, index in enumerate(chosen) for n in range(len(continuations[index]))]
        tokens = [continuations[chosen[row]][n] for row, n in owners]
        scores = list(first[[row for row, _ in owners], [one[0] for one in tokens]].cpu()[:, None])
        longer = [place for place, one in enumerate(tokens) if len(one) > 1]
        for part in by_length([tokens[place] for place in longer], batch_size, tight=True):
            several = [longer[index] for index in part]
            rows = [owners[place][0] for place in several]
            past, read = rows_of(out.past_key_values, rows), mask[rows]
            rests = _rests(model, past, read, [tokens[place] for place in several], precision=precision)
            for place, rest in zip(several, rests, strict=True):
                scores[place] = torch.cat([scores[place], rest])
        for (row, n), score in zip(owners, scores, strict=True):
            found[chosen[row]][n] = score
    return found


def _whole(
    model: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
    *,
    precision: str | None,
) -> list[list[Tensor]]:
    """The same where a cache cannot be repeated: a context is read again for each continuation."""
    owners = [(index, n) for index, several in enumerate(continuations) for n in range(len(several))]
    rows = [[*contexts[index], *continuations[index][n][:-1]] for index, n in owners]
    found = [[torch.empty(0)] * len(several) for several in continuations]
    for chosen in by_length(rows, batch_size, tight=True):
        ids, mask = pad_left([rows[place] for place in chosen], model)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with autocast(model, precision=precision):
            further = accepted(model, position_ids=places, use_cache=False)
            logits = model(input_ids=ids, attention_mask=mask, **further).logits
        for row, place in enumerate(chosen):
            index, n = owners[place]
            tokens = torch.tensor(list(continuations[index][n]), device=ids.device)
            scores = logits[row, -len(tokens) :].float().log_softmax(-1)
            found[index][n] = scores.gather(-1, tokens[:, None])[:, 0].cpu()
    return found


def split_tokens(
    tokenizer: PreTrainedTokenizerBase, context: str, continuations: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a context and of its continuations, split as in lm-evaluation-harness.

    Context and continuation are tokenised together. If the context alone has n tokens, the continuation is
    all tokens after the first n. White space at the context's end belongs to the continuation.
    """
    bare = context.rstrip()
    ids = tokenizer(bare).input_ids
    wholes = tokenizer([context + one for one in continuations]).input_ids
    return ids, [whole[len(ids) :] for whole in wholes]


def _rests(
    model: Any, past: DynamicCache | None, mask: Tensor, tokens: list[Sequence[int]], *, precision: str | None
) -> list[Tensor]:
    """Log-probabilities of all but the first token of continuations; `past` is their contexts' cache."""
    # predictions at padding are dropped; causal attention hides the padding from the tokens before it
    length = max(map(len, tokens))
    ids = torch.tensor([list(one) + [0] * (length - len(one)) for one in tokens], device=mask.device)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    there = torch.arange(length - 1, device=mask.device)
    taken = torch.tensor([len(one) - 1 for one in tokens], device=mask.device)
    with autocast(model, precision=precision):
        logits = model(
            input_ids=inputs,
            attention_mask=torch.cat([mask, (there < taken[:, None]).long()], 1),
            past_key_values=past,
            use_cache=True,
            **accepted(model, position_ids=mask.sum(1, keepdim=True) + there),
        ).logits.float()
    scores = (logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)).cpu()
    return [row[: len(one) - 1] for row, one in zip(scores, tokens, strict=True)]


def _fitting(
    model: Any, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[Sequence[int]]:
    """The contexts, cut at the left so that each fits the model's context length with its continuations."""
    if len(contexts) != len(continuations):
        raise ValueError(
            f"continuations: {len(continuations)} lists for {len(contexts)} contexts; give one for each"
        )
    room = context_length(model)
    kept = []
    for index, (context, several) in enumerate(zip(contexts, continuations, strict=True)):
        if not context or not several or not all(several):
            raise ValueError(
                f"item {index}: context or continuation without a token; give each at least one token"
            )
        longest = max(map(len, several))
        if longest > room:
            raise ValueError(
                f"item {index}: a continuation of {longest} tokens, the model reads {room}; shorten it"
            )
        # the last token of a continuation is predicted, not read
        kept.append(context[-(room + 1 - longest) :])
    num_cut = sum(len(a) < len(b) for a, b in zip(kept, contexts, strict=True))
    if num_cut:
        logger.warning(
            "%d of %d contexts do not fit the model's context of %d tokens; their first tokens are dropped",
            num_cut,
            len(contexts),
            room,
        )
    return kept
