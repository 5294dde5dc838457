"""Tokens for many requests at once: requests join a running batch and leave it, one step after the other.

The batch has one KV cache, the base's (law 11), whatever memories speak in its rows: they come in behind the
last block. Rows of different lengths are padded on the left.

Why not `transformers`' continuous batching: it packs the tokens of all requests into one row, so that a
request cannot have adapters of its own, and has one set of sampling settings for all.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..adapter.layers import BASE_ROW, tail_of
from ..data.generation import accepted, pad_left
from ..precision import autocast, device_of

logger = logging.getLogger(__name__)


@dataclass
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
        temperature: 0: the likeliest token.
        top_k: 0 or -1: all tokens.
        repetition_penalty: of tokens in the prompt and the answer; the other two, of tokens in the answer.
        top_logprobs: likely tokens to report beside each chosen one; None: report nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    top_logprobs: int | None = None

    def processors(self, num_prompt: int) -> LogitsProcessorList:
        """What changes the logits before a token is drawn from them."""
        found: list[Any] = []
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.frequency_penalty or self.presence_penalty:
            found.append(_Penalties(self.frequency_penalty, self.presence_penalty, num_prompt))
        if self.temperature == 0:
            return LogitsProcessorList(found)
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            found.append(MinPLogitsWarper(self.min_p))
        return LogitsProcessorList(found)


class _Penalties(LogitsProcessor):
    """OpenAI's penalties of tokens that are in the answer already."""

    def __init__(self, frequency: float, presence: float, num_prompt: int) -> None:
        self._frequency, self._presence, self._num_prompt = frequency, presence, num_prompt

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        counts = torch.bincount(input_ids[0, self._num_prompt :], minlength=scores.shape[1])
        return scores - self._frequency * counts - self._presence * (counts > 0)


class Chosen(NamedTuple):
    """A token of an answer; `top` holds the likeliest tokens and their log-probabilities."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Row:
    """One request in the batch.

    Attributes:
        prompt: token ids, at least one.
        memories: adapters that speak in its answer; none: the base alone.
        tokens: what was generated so far.
        chosen: the same tokens with their log-probabilities, if `sampling` asks for them.
        error: why no further token could be chosen.
    """

    prompt: list[int]
    memories: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    tokens: list[int] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self._generator: torch.Generator | None = None
        if self.sampling.temperature > 0:
            self._generator = torch.Generator()
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
        self._processors = self.sampling.processors(len(self.prompt))

    def choose(self, logits: Tensor) -> None:
        """Add the next token, of logits [vocabulary], to `tokens`."""
        scores: Any = logits
        if self._generator is not None or self._processors:
            so_far: Any = torch.tensor([[*self.prompt, *self.tokens]])
            scores = self._processors(so_far, logits.float().cpu()[None])[0]  # type: ignore[arg-type]
        if self._generator is None:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        self.tokens.append(token)
        if self.sampling.top_logprobs is not None:
            values, ids = (logprobs := logits.float().log_softmax(-1)).topk(self.sampling.top_logprobs)
            top = list(zip(ids.tolist(), values.tolist(), strict=True))
            self.chosen.append(Chosen(token, float(logprobs[token]), top))


class Decoder:
    """The running batch of one model."""

    def __init__(self, model: Any, precision: str | None = None) -> None:
        """Args:
            precision: in which the model computes; see `precision_of`.

        Raises:
            ValueError: a model whose state is not a plain KV cache.
        """
        self.model, self.precision = model.eval(), precision
        self.rows: list[Row] = []
        self._mask = torch.empty(0)
        self._cache = DynamicCache()
        planned = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in planned)
        if not plain or not self._read([Row([0])])[1].layers:
            raise ValueError(
                f"{type(model).__name__} keeps a state that is not keys and values, which requests cannot "
                "share; serve a model with attention in every block"
            )

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows, choose their first token, and let them join the batch."""
        logits, cache, mask = self._read(rows)
        _choose(rows, logits)
        if self.rows:
            cache, mask = _stacked([(self._cache, self._mask), (cache, mask)])
        self._cache, self._mask = cache, mask
        self.rows = [*self.rows, *rows]

    @torch.inference_mode()
    def step(self) -> None:
        """Choose the next token of every row."""
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self._mask.device)
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        logits = self._forward(self.rows, last, self._mask, self._cache)
        _choose(self.rows, logits)

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Take rows out of the batch, and the columns that nobody needs any more."""
        kept = [index for index, row in enumerate(self.rows) if row not in rows]
        self.rows = [self.rows[index] for index in kept]
        if not kept:
            self._cache, self._mask = DynamicCache(), torch.empty(0)
            return
        index = torch.tensor(kept, device=self._mask.device)
        self._mask = self._mask[index]
        first = int(self._mask.any(0).int().argmax())
        self._mask = self._mask[:, first:]
        cache = DynamicCache()
        for number, layer in enumerate(self._cache.layers):
            cache.update(layer.keys[index, :, first:], layer.values[index, :, first:], number)  # type: ignore[index]
        self._cache = cache

    @torch.inference_mode()
    def facts_given(self, row: Row) -> list[tuple[str, int]]:
        """The adapter and the number of each fact whose answer a row's tokens give, in this order, each once.

        The model reads the row once more.
        """
        tail = tail_of(self.model) if row.memories else None
        if tail is None:
            return []
        ids = torch.tensor([[*row.prompt, *row.tokens]], device=device_of(self.model))
        with tail.recording() as given, autocast(self.model, self.precision):
            self.model(input_ids=ids, use_cache=False, adapter_names=[row.memories])
        found: list[tuple[int, str, int]] = []
        for name in row.memories:
            scope = list(tail.memories(name).values())[-1].scope
            if name in given and scope is not None:
                # the state in front of a token decides it
                places = given[name][0, len(row.prompt) - 1 : -1].cpu()
                facts = scope.facts.fact_of_token.cpu()[places.clamp_min(0)]
                found += [(at, name, int(facts[at])) for at in (places >= 0).nonzero().flatten().tolist()]
        return list(dict.fromkeys((name, fact) for _, name, fact in sorted(found)))

    def _read(self, rows: Sequence[Row]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Last logits [rows, vocabulary] of prompts, their cache, and their mask [rows, seq]."""
        ids, mask = pad_left([row.prompt for row in rows], self.model)
        cache = DynamicCache()
        with torch.inference_mode():
            return self._forward(rows, ids, mask, cache), cache, mask

    def _forward(self, rows: Sequence[Row], ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs: dict[str, Any] = accepted(self.model, position_ids=places, logits_to_keep=1)
        if isinstance(self.model, PeftModel):
            inputs["adapter_names"] = [row.memories or BASE_ROW for row in rows]
        with autocast(self.model, self.precision):
            out = self.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs
            )
        return out.logits[:, -1]


def _choose(rows: Sequence[Row], logits: Tensor) -> None:
    """The next token of each row; one that fails does not stop the others."""
    for row, scores in zip(rows, logits, strict=True):
        try:
            row.choose(scores)
        except Exception as error:
            logger.exception("a token could not be chosen")
            row.error = error


def _stacked(parts: Sequence[tuple[DynamicCache, Tensor]]) -> tuple[DynamicCache, Tensor]:
    """One cache and one mask of several batches' rows, padded on the left to one length.

    A batch in which no memory holds facts has no layer of tokens, or one that no longer grows; its rows need
    none.
    """
    length = max(mask.shape[1] for _, mask in parts)
    stacked = DynamicCache()
    for number in range(max(len(cache.layers) for cache, _ in parts)):
        layers: list[Any] = [next(iter(cache.layers[number : number + 1]), None) for cache, _ in parts]
        like = next(layer for layer in layers if layer is not None)
        held: dict[str, list[Tensor]] = {"keys": [], "values": []}
        for layer, (_, mask) in zip(layers, parts, strict=True):
            for name, tensors in held.items():
                tensor = getattr(like if layer is None else layer, name)
                one = tensor[:1, :, :0].expand(len(mask), -1, -1, -1) if layer is None else tensor
                tensors.append(functional.pad(one, (0, 0, length - one.shape[2], 0)))
        stacked.update(torch.cat(held["keys"]), torch.cat(held["values"]), number)
    masks = [functional.pad(mask, (length - mask.shape[1], 0)) for _, mask in parts]
    return stacked, torch.cat(masks)
