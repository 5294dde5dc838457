"""Measure what a model knows, what it has lost, and how much of a text the memory affects.

Choices: greedy decoding in batches sorted by length; the faster precision unless one is given. Only drift is
always measured in the model's own precision, because bfloat16's rounding is larger than the drifts that
matter.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapter.memories import fact_places, gated_layers, layer_gates, memory_layers
from ..background.states import layer_inputs
from ..data.generation import accepted, complete
from ..data.models import tokenizer_of
from ..data.records import QUESTION, choice_tokens, question_ids
from ..precision import autocast, device_of
from .answers import contains, is_right  # noqa: F401
from .likelihood import log_probs

# these can also be imported from here
from .mentions import BaseMentions, Mentions, base_mentions, mentions  # noqa: F401
from .neighbours import contexts, neighbours  # noqa: F401


@dataclass(frozen=True)
class Evaluation:
    """The result of a task.

    Attributes:
        metrics: values by name.
        n: number of items, or of tokens for perplexity.
        correct: for each item, in order, whether it was answered correctly (by `acc` for multiple choice);
            None where answers are not right or wrong.
        base: the base model's metrics, if the task itself compares with the base model.
    """

    metrics: dict[str, float]
    n: int
    correct: list[bool] | None = None
    base: dict[str, float] | None = None


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
    precision: str | None = None,
) -> Answers:
    """Greedy answers to `{"question", "answer": str | list[str]}` items.

    Which answers are right `is_right` decides. Without a chat template an answer ends where the model begins
    the next question. `precision` is "float32", "bfloat16", or None for the faster of the two.

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("items is empty; give at least one question")
    prompts = [question_ids(item["question"], tokenizer) for item in items]
    texts = complete(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, precision=precision
    )
    if not tokenizer.chat_template:
        texts = [text.partition(f"\n{QUESTION}")[0].strip() for text in texts]
    pairs = zip(texts, items, strict=True)
    return Answers([is_right(text, item["answer"]) for text, item in pairs], texts)


@dataclass(frozen=True)
class Choices:
    """For which items the right option is the most likely, by the mean of its tokens' log-probabilities or by
    their sum.
    """

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
    precision: str | None = None,
) -> Choices:
    """Answer `{"question", "choices", "answer": int}` items by the log-likelihood of the options' texts.

    Of options with equal likelihood the first is chosen.

    Args:
        tokens: returns an item's prompt and options as token ids.
        precision: "float32", "bfloat16", or None for the faster of the two.

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("items is empty; give at least one question")
    prompts, options = zip(*(tokens(item, tokenizer) for item in items), strict=True)
    scores = log_probs(model, prompts, options, batch_size=batch_size, precision=precision)

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
    precision: str | None = None,
) -> float:
    """Sliding-window perplexity of `input_ids` [tokens]: each window's mean loss weighted by its new tokens.

    Every window begins with `opening`, the tokenizer's `opening_ids`. They count towards the window's length
    and are not scored.
    `precision` is "float32", "bfloat16", or None for the faster of the two.

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
            f"window={window} has no room after {len(opening)} opening tokens; give a larger window"
        )
    model.eval()
    total, done = 0.0, 0
    first = torch.tensor(opening, dtype=input_ids.dtype)
    for start in range(0, len(input_ids), min(stride, room)):
        end = min(start + room, len(input_ids))
        ids = torch.cat([first, input_ids[start:end]])
        # the very first token has nothing before it to predict it from
        num_scored = min(end - done, len(ids) - 1)
        losses = _losses(model, ids[None].to(device_of(model)), num_scored, precision=precision)
        total += losses.cpu().double().mean().item() * (end - done)
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

    The tokens are read in windows that do not overlap. Each window begins with `opening`, the tokenizer's
    `opening_ids`, at which nothing is measured. `base=None` uses the model with its adapter disabled.

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
    total, uncached = 0.0, accepted(model, use_cache=False)
    first = torch.tensor(opening, dtype=input_ids.dtype)
    for piece in input_ids.split(window):
        ids = torch.cat([first, piece])[None].to(device_of(model))
        ours = model(input_ids=ids, **uncached).logits[:, len(opening) :].float().log_softmax(-1)
        with model.disable_adapter() if isinstance(model, PeftModel) and base is None else nullcontext():
            logits = (base or model)(input_ids=ids, **uncached).logits[:, len(opening) :]
        theirs = logits.float().log_softmax(-1)
        total += functional.kl_div(ours, theirs, log_target=True, reduction="sum").item()
    return total / len(input_ids)


def exposure(
    model: PeftModel, texts: str | Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> float:
    """Share of the texts' tokens that are in scope and read a row that is not zero, in at least one layer.

    `tokenizer=None` uses the tokenizer that is found by the model's name.

    Raises:
        ValueError: no memory, no texts, or no tokenizer.
    """
    tokenizer = tokenizer or tokenizer_of(model)
    texts = [texts] if isinstance(texts, str) else texts
    layers = memory_layers(model)
    written = {name: memory.values.any(dim=1) for name, memory in layers.items()}
    num_exposed = num_tokens = 0
    inputs = [{"input_ids": tokenizer(text, return_tensors="pt").input_ids} for text in texts]
    for batch, states in layer_inputs(model, inputs):
        exposed = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool, device=device_of(model))
        places = fact_places(model, batch).flatten()
        gates = layer_gates(layers, states, places)
        for name, memory in layers.items():
            slots, _ = memory.address(states[name])
            reads = written[name][slots].any(dim=1)
            if (scope := memory.scope) is not None and len(scope.facts.rows):
                reads |= (places >= 0).to(reads.device)
            exposed |= reads & (gates[name] > 0)
        num_exposed += int(exposed.sum())
        num_tokens += len(exposed)
    return num_exposed / num_tokens


def scope_gate(model: PeftModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The relevance gate g of each token, for each layer that has a scope: [batch, seq], 0 at padding.

    A memory with `write="last"` has one scope, in its deepest layer. As for the scope's centres, states are
    computed with the memory switched off.

    Raises:
        ValueError: no memory.
    """
    _, states = next(layer_inputs(model, [batch]))
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().to(device_of(model))
    places = fact_places(model, batch).to(mask.device)
    gates = {}
    for name, memory in gated_layers(memory_layers(model)).items():
        gates[name] = torch.zeros(mask.shape, device=mask.device)
        gates[name][mask] = memory.relevance(states[name])
        gates[name][(places >= 0) & mask] = 1.0
    return gates


def _losses(model: Any, ids: Tensor, num_kept: int, *, precision: str | None) -> Tensor:
    """Losses of the last `num_kept` tokens, float32 [batch, num_kept]."""
    with autocast(model, precision=precision):
        least = accepted(model, use_cache=False, logits_to_keep=num_kept + 1)
        logits = model(input_ids=ids, **least).logits[:, -num_kept - 1 :]
    scores, targets = logits[:, :-1].float(), ids[:, -num_kept:]
    return functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )
