"""What a model knows, what it has lost, and how much of a text the memory touches.

Choices: greedy decoding, batches sorted by length, bfloat16 autocast where the processor is fast at it; drift
alone is read in the model's own precision, since bfloat16's rounding is larger than the drifts that matter.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .access import layer_inputs
from .data import choice_prompt, choice_text, prompt_ids
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


@torch.inference_mode()
def recall(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict],
    *,
    max_new_tokens: int = 12,
    batch_size: int = 64,
) -> Answers:
    """Greedy answers to `{"question", "answer": str | list[str]}` items.

    An answer is right when an expected one is contained in it as whole words, case, punctuation and articles
    aside.

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("items is empty; give at least one question")
    model.eval()
    prompts = [prompt_ids(item["question"], tokenizer) for item in items]
    stop = getattr(model.generation_config, "eos_token_id", None)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id if stop is None else stop,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = [""] * len(items)
    # what all prompts begin with (a system prompt, worked examples) is read once
    differ = (place for place, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    shared = next(differ, min(map(len, prompts)) - 1)
    beginning = torch.tensor([prompts[0][:shared]], dtype=torch.int64, device=_device(model))
    with autocast(model):
        read = model(input_ids=beginning, use_cache=True).past_key_values if shared else None
    for chosen in _by_length(prompts, batch_size):
        ids, mask = _pad_left([prompts[index][shared:] for index in chosen], model)
        ids = torch.cat([beginning.expand(len(ids), -1), ids], 1)
        mask = functional.pad(mask, (shared, 0), value=1)
        past = copy.deepcopy(read)
        if past is not None:
            past.batch_repeat_interleave(len(chosen))
        with autocast(model):
            out = model.generate(  # type: ignore
                input_ids=ids, attention_mask=mask, past_key_values=past, generation_config=config
            )
        answers = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for index, answer in zip(chosen, answers, strict=True):
            texts[index] = answer.strip()
    pairs = zip(texts, items, strict=True)
    return Answers([is_right(text, item["answer"]) for text, item in pairs], texts)


def is_right(text: str, answer: str | Sequence[str]) -> bool:
    """Whether an expected answer is contained in the text as whole words, both normalised."""
    expected = [answer] if isinstance(answer, str) else answer
    return any(f" {_normalised(one)} " in f" {_normalised(text)} " for one in expected)


@torch.inference_mode()
def multiple_choice(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict],
    *,
    batch_size: int = 16,
) -> dict[str, float | int]:
    """Accuracy over `{"question", "choices", "answer": int}` items by log-likelihood of the options' texts.

    Returns `acc_sum` (by the sum over an option's tokens), `acc_mean` (by their mean) and `n`; ties go to the
    first option.

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("items is empty; give at least one question")
    model.eval()
    sequences, lengths, owners = [], [], []
    for number, item in enumerate(items):
        prompt = prompt_ids(choice_prompt(item), tokenizer)
        for choice in item["choices"]:
            option = tokenizer(choice_text(choice, tokenizer), add_special_tokens=False).input_ids
            sequences.append(prompt + option)
            lengths.append(len(option))
            owners.append(number)
    sums = torch.zeros(len(sequences))
    for chosen in _by_length(sequences, batch_size):
        ids, mask = _pad_left([sequences[index] for index in chosen], model)
        num_kept = max(lengths[index] for index in chosen)
        losses = _losses(
            model, ids, num_kept, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        )
        for index, loss in zip(chosen, losses, strict=True):
            sums[index] = -loss[num_kept - lengths[index] :].sum()
    means = sums / torch.tensor(lengths)
    owned = torch.tensor(owners)
    right = torch.tensor([item["answer"] for item in items])

    def accuracy(scores: Tensor) -> float:
        best = [int(scores[owned == number].argmax()) for number in range(len(items))]
        return (torch.tensor(best) == right).double().mean().item()

    return {"acc_sum": accuracy(sums), "acc_mean": accuracy(means), "n": len(items)}


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel | PeftModel, input_ids: Tensor, *, window: int = 1024, stride: int = 512
) -> float:
    """Sliding-window perplexity of `input_ids` [tokens]: each window's mean loss weighted by its new tokens.

    Raises:
        ValueError: fewer than two tokens, or a stride outside 1..window.
    """
    if input_ids.ndim != 1 or len(input_ids) < 2:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}; give one dimension of two or more tokens"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} is outside 1..window={window}; choose a smaller stride")
    model.eval()
    total, done = 0.0, 0
    for start in range(0, len(input_ids), stride):
        end = min(start + window, len(input_ids))
        # the very first token has nothing before it that could predict it
        num_scored = min(end - done, end - start - 1)
        losses = _losses(model, input_ids[None, start:end].to(_device(model)), num_scored)
        total += losses.double().mean().item() * (end - done)
        done = end
        if end == len(input_ids):
            break
    return float(torch.tensor(total / len(input_ids), dtype=torch.float64).exp())


@torch.inference_mode()
def drift(
    model: PreTrainedModel | PeftModel, base: PreTrainedModel | None, input_ids: Tensor, *, window: int = 256
) -> float:
    """Mean KL(base || model) of the next-token distributions over `input_ids` [tokens], in nats per token.

    The tokens are read in windows that do not overlap; `base=None` is the model without its adapter.

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
    for piece in input_ids.split(window):
        ids = piece[None].to(_device(model))
        ours = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        with model.disable_adapter() if isinstance(model, PeftModel) and base is None else nullcontext():
            theirs = (base or model)(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
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
        exposed = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool, device=_device(model))
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
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().to(_device(model))
    gates = {name: torch.zeros(mask.shape, device=mask.device) for name in states}
    for name, memory in memory_layers(model).items():
        gates[name][mask] = memory.relevance(states[name])
    return gates


def _losses(model: Any, ids: Tensor, num_kept: int, **inputs: Tensor) -> Tensor:
    """Losses of the last `num_kept` tokens, float32 [batch, num_kept]."""
    with autocast(model):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=num_kept + 1, **inputs).logits
    scores, targets = logits[:, :-1].float(), ids[:, -num_kept:]
    return functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )


def _by_length(sequences: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first."""
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _pad_left(sequences: list[list[int]], model: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [batch, seq], padded on the left with token 0."""
    length = max(map(len, sequences))
    ids = torch.tensor([[0] * (length - len(one)) + one for one in sequences], device=_device(model))
    mask = torch.tensor(
        [[0] * (length - len(one)) + [1] * len(one) for one in sequences], device=_device(model)
    )
    return ids, mask


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _normalised(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.casefold()).split()
    # an answer that is nothing but an article stands for itself
    return " ".join([word for word in words if word not in ARTICLES] or words)
