"""What a model knows, what it has lost, and how much of a text the memory touches.

Choices: greedy decoding, batches sorted by length; bfloat16 autocast where the processor is fast at it unless
`exact` is asked for; drift alone is always read in the model's own precision, since bfloat16's rounding is
larger than the drifts that matter.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .access import layer_inputs
from .data import QUESTION, choice_tokens, question_ids
from .likelihood import by_length, device_of, log_probs, pad_left, read_beginning, rows_of
from .models import autocast, tokenizer_of
from .tuner import memory_layers

ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Answers:
    """Generated answers in the order of the questions, and which of them are right."""

    correct: list[bool]
    texts: list[str]

    @property
    def share(self) -> float:
        """Share of right answers."""
        return sum(self.correct) / len(self.correct)


def recall(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict],
    *,
    max_new_tokens: int = 12,
    batch_size: int = 64,
    exact: bool = False,
) -> Answers:
    """Greedy answers to `{"question", "answer": str | list[str]}` items.

    An answer is right when an expected one is contained in it as whole words, case, punctuation and articles
    aside. Without a chat template it ends where the model asks the next question itself. `exact` is computed
    in the model's own precision.

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("items is empty; give at least one question")
    prompts = [question_ids(item["question"], tokenizer) for item in items]
    texts = complete(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, exact=exact
    )
    if not tokenizer.chat_template:
        texts = [text.partition(f"\n{QUESTION}")[0].strip() for text in texts]
    pairs = zip(texts, items, strict=True)
    return Answers([is_right(text, item["answer"]) for text, item in pairs], texts)


@torch.inference_mode()
def complete(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop: str | None = None,
    batch_size: int = 64,
    exact: bool = False,
) -> list[str]:
    """Greedy continuations of token ids, as texts without white space around them; `stop` ends a text."""
    model.eval()
    ends = getattr(model.generation_config, "eos_token_id", None)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=stop,
    )
    texts = [""] * len(prompts)
    shared, read = read_beginning(model, prompts, exact=exact)
    beginning = torch.tensor([prompts[0][:shared]], dtype=torch.int64, device=device_of(model))
    for chosen in by_length(prompts, batch_size):
        ids, mask = pad_left([prompts[index][shared:] for index in chosen], model)
        ids = torch.cat([beginning.expand(len(ids), -1), ids], 1)
        mask = functional.pad(mask, (shared, 0), value=1)
        with autocast(model, exact=exact):
            out = model.generate(  # type: ignore
                input_ids=ids,
                attention_mask=mask,
                past_key_values=rows_of(read, [0] * len(chosen)),
                generation_config=config,
                tokenizer=tokenizer,
            )
        answers = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for index, answer in zip(chosen, answers, strict=True):
            texts[index] = answer.split(stop)[0].strip() if stop else answer.strip()
    return texts


def is_right(text: str, answer: str | Sequence[str]) -> bool:
    """Whether an expected answer is contained in the text as whole words, both normalised."""
    expected = [answer] if isinstance(answer, str) else answer
    return any(f" {_normalised(one)} " in f" {_normalised(text)} " for one in expected)


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether an expected answer is a substring of the text, both normalised, be it within a word.

    Normalised as TriviaQA is: lower case, without punctuation, articles and surplus white space.
    """
    expected = [_normalised(one) for one in answers]
    return any(one and one in _normalised(text) for one in expected)


@dataclass(frozen=True)
class Choices:
    """Which items' right option is the likeliest by the mean over its tokens, and which by their sum."""

    correct: list[bool]
    correct_by_sum: list[bool]

    @property
    def share(self) -> float:
        """Share of right choices by the mean."""
        return sum(self.correct) / len(self.correct)

    @property
    def share_by_sum(self) -> float:
        """Share of right choices by the sum."""
        return sum(self.correct_by_sum) / len(self.correct_by_sum)


def multiple_choice(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict],
    *,
    tokens: Callable[[dict, Any], tuple[list[int], list[list[int]]]] = choice_tokens,
    batch_size: int = 16,
    exact: bool = False,
) -> Choices:
    """Choices of `{"question", "choices", "answer": int}` items by log-likelihood of the options' texts.

    Ties go to the first option.

    Args:
        tokens: gives an item's prompt and options as token ids.
        exact: in the model's own precision, without autocast.

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("items is empty; give at least one question")
    prompts, options = zip(*(tokens(item, tokenizer) for item in items), strict=True)
    scores = log_probs(model, prompts, options, batch_size=batch_size, exact=exact)

    def correct(reduce: Callable[[Tensor], Tensor]) -> list[bool]:
        best = [int(torch.stack([reduce(option) for option in several]).argmax()) for several in scores]
        return [found == item["answer"] for found, item in zip(best, items, strict=True)]

    return Choices(correct(torch.mean), correct(torch.sum))


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel | PeftModel,
    input_ids: Tensor,
    *,
    window: int = 1024,
    stride: int = 512,
    opening: Sequence[int] = (),
    exact: bool = False,
) -> float:
    """Sliding-window perplexity of `input_ids` [tokens]: each window's mean loss weighted by its new tokens.

    Every window begins with `opening`, the tokenizer's `opening_ids`, which are in its length and not scored.
    `exact` is computed in the model's own precision, without autocast.

    Raises:
        ValueError: fewer than two tokens, or a stride outside 1..window.
    """
    if input_ids.ndim != 1 or len(input_ids) < 2:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}; give one dimension of two or more tokens"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} is outside 1..window={window}; choose a smaller stride")
    room = window - len(opening)
    if room < 1:
        raise ValueError(
            f"window={window} has no room beside {len(opening)} opening tokens; give a wider one"
        )
    model.eval()
    total, done = 0.0, 0
    first = torch.tensor(opening, dtype=input_ids.dtype)
    for start in range(0, len(input_ids), min(stride, room)):
        end = min(start + room, len(input_ids))
        ids = torch.cat([first, input_ids[start:end]])
        # the very first token has nothing before it that could predict it
        num_scored = min(end - done, len(ids) - 1)
        losses = _losses(model, ids[None].to(device_of(model)), num_scored, exact=exact)
        total += losses.double().mean().item() * (end - done)
        done = end
        if end == len(input_ids):
            break
    return float(torch.tensor(total / len(input_ids), dtype=torch.float64).exp())


@torch.inference_mode()
def drift(
    model: PreTrainedModel | PeftModel,
    base: PreTrainedModel | None,
    input_ids: Tensor,
    *,
    window: int = 256,
    opening: Sequence[int] = (),
) -> float:
    """Mean KL(base || model) of the next-token distributions over `input_ids` [tokens], in nats per token.

    The tokens are read in windows that do not overlap, each behind `opening`, the tokenizer's `opening_ids`;
    `base=None` is the model without its adapter.

    Raises:
        ValueError: no tokens, or `base=None` for a model without an adapter.
    """
    if input_ids.ndim != 1 or len(input_ids) < 1:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}; give one dimension of one or more tokens"
        )
    if base is None and not isinstance(model, PeftModel):
        raise ValueError("base=None needs a model with an adapter; give the untouched base model")
    model.eval()
    total = 0.0
    first = torch.tensor(opening, dtype=input_ids.dtype)
    for piece in input_ids.split(window):
        ids = torch.cat([first, piece])[None].to(device_of(model))
        ours = model(input_ids=ids, use_cache=False).logits[:, len(opening) :].float().log_softmax(-1)
        with model.disable_adapter() if isinstance(model, PeftModel) and base is None else nullcontext():
            logits = (base or model)(input_ids=ids, use_cache=False).logits[:, len(opening) :]
        theirs = logits.float().log_softmax(-1)
        total += functional.kl_div(ours, theirs, log_target=True, reduction="sum").item()
    return total / len(input_ids)


def exposure(
    model: PeftModel, texts: str | Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> float:
    """Share of the texts' tokens that in some memory layer lie in scope and read a row that is not zero.

    Without a tokenizer the one that the model's name leads to is taken.

    Raises:
        ValueError: no memory, no texts, or no tokenizer.
    """
    tokenizer = tokenizer or tokenizer_of(model)
    texts = [texts] if isinstance(texts, str) else texts
    written = {name: memory.values.any(dim=1) for name, memory in memory_layers(model).items()}
    num_exposed = num_tokens = 0
    inputs = [{"input_ids": tokenizer(text, return_tensors="pt").input_ids} for text in texts]
    for batch, states in layer_inputs(model, inputs):
        exposed = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool, device=device_of(model))
        for name, memory in memory_layers(model).items():
            slots, _ = memory.address(states[name])
            exposed |= written[name][slots].any(dim=1) & (memory.relevance(states[name]) > 0)
        num_exposed += int(exposed.sum())
        num_tokens += len(exposed)
    return num_exposed / num_tokens


def scope_gate(model: PeftModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per memory layer, how far inside the scope each token is: g [batch, seq], 0 at padding.

    States are read with the memory switched off, as the scope's centres were.

    Raises:
        ValueError: no memory.
    """
    _, states = next(layer_inputs(model, [batch]))
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().to(device_of(model))
    gates = {name: torch.zeros(mask.shape, device=mask.device) for name in states}
    for name, memory in memory_layers(model).items():
        gates[name][mask] = memory.relevance(states[name])
    return gates


def _losses(model: Any, ids: Tensor, num_kept: int, *, exact: bool) -> Tensor:
    """Losses of the last `num_kept` tokens, float32 [batch, num_kept]."""
    with autocast(model, exact=exact):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=num_kept + 1).logits
    scores, targets = logits[:, :-1].float(), ids[:, -num_kept:]
    return functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )


def _normalised(text: str) -> str:
    words = re.sub(r"[\W_]", " ", text.casefold()).split()
    # an answer that is nothing but an article stands for itself
    return " ".join([word for word in words if word not in ARTICLES] or words)
