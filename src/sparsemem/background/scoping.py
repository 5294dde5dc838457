"""What data sets and nobody trains, second part: the scope of a memory (`set_scope`).

The whitened states at the supervised positions of the training data become the centres of the relevance gate,
its thresholds come from the background and from the training examples' own nearness.

Reference: ours.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter.model import gated_layers, memory_layers
from ..layer.memory import ProductKeyMemory
from ..layer.scope import KNOWN_WEIGHT, Scope, whiten
from ..precision import precise
from .background import Background, LayerBackground
from .fitting import START_QUANTILE, STATE_QUANTILE, k_means, thresholds, whitening
from .states import layer_inputs, supervised

logger = logging.getLogger(__name__)

# Supervised states that a scope is made of; where there are more, a random part.
TAUGHT_SIZE = 8_192
# Centres that one call of `set_scope` adds at most, and known states of a scope.
CENTRES_SIZE, KNOWN_SIZE = 1_024, 1_024
# `lo` lies at most this far below `hi`, at answer starts and within answers, where general text comes near.
START_WIDTH, WITHIN_WIDTH = 0.15, 0.05
# A background with fewer answers than this says too little of what is known; its states take their place.
MIN_STARTS = 32


@torch.no_grad()
def set_scope(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    background: Background,
    *,
    extend: bool = False,
    known: Iterable[Mapping[str, Tensor]] = (),
) -> None:
    """Set the memory's scope from training data; tokens out of scope then pass as in the base model.

    A memory that writes last has one scope, held by its deepest layer; one that writes to its own layers has
    a scope in each.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids, labels (-100: not supervised) and attention_mask. Centres are the
            states at the positions whose next label is supervised, memory switched off. Of a list with
            many more than TAUGHT_SIZE of them, batches are drawn at random and the others not read.
        background: of `calibrate`, which keeps mean, covariance and a sample of states.
        extend: keep the scope there is and add to it: g is then the largest over both.
        known: batches like these whose supervised states are known beside the background's: what must stay
            as it is although it is near to what is taught.

    Raises:
        ValueError: no supervised position, or a background without states.
    """
    layers = memory_layers(model)
    check_background(layers, background)
    gated = gated_layers(layers)
    taught = supervised_states(model, _enough(batches), gated)
    set_scope_of(model, taught, background, extend=extend, known=known)


@dataclass(frozen=True)
class Supervised:
    """States at positions whose next label is supervised.

    Attributes:
        states: by layer name, [n, d_in].
        example: [n] int64, the record that each comes from.
        start: [n] bool, whether an answer starts there.
    """

    states: dict[str, Tensor]
    example: Tensor
    start: Tensor


def supervised_states(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], layers: Iterable[str]
) -> Supervised:
    """States of the base model, float32 on the CPU.

    Raises:
        ValueError: batches without labels, or none of them supervised.
    """
    taught: dict[str, list[Tensor]] = {name: [] for name in layers}
    examples: list[Tensor] = []
    starts: list[Tensor] = []
    num_rows = 0
    for batch, states in layer_inputs(model, batches):
        if "labels" not in batch:
            raise ValueError(
                "batches: have no 'labels'; a scope is taken from supervised positions, pass labels too"
            )
        chosen, first, _ = supervised(batch)
        examples.append(_rows(batch)[chosen] + num_rows)
        num_rows += len(batch["input_ids"])
        starts.append(first[chosen])
        for name, parts in taught.items():
            x = states[name]
            parts.append(x[chosen.to(x.device)].float().cpu())
    example = torch.cat(examples)
    if len(example) == 0:
        raise ValueError(
            "batches: no position is supervised (every label is -100); a scope needs at least one"
        )
    return Supervised({name: torch.cat(parts) for name, parts in taught.items()}, example, torch.cat(starts))


def set_scope_of(
    model: nn.Module,
    taught: Supervised,
    background: Background,
    *,
    extend: bool,
    known: Iterable[Mapping[str, Tensor]] = (),
) -> None:
    """`set_scope` from states that were computed before."""
    gated = gated_layers(memory_layers(model))
    known = list(known)
    also = supervised_states(model, known, gated).states if known else {}
    keep = _drawn(len(taught.example), TAUGHT_SIZE)
    with precise(model):
        scopes = {
            name: _scope_of(
                name,
                taught.states[name][keep],
                taught.example[keep],
                taught.start[keep],
                background[name],
                also[name][_drawn(len(also[name]), KNOWN_SIZE)] if known else None,
            )
            for name in gated
        }
    if extend:
        scopes = {name: _joined(name, memory.scope, scopes[name]) for name, memory in gated.items()}
    clear_scope(model)
    for name, memory in gated.items():
        memory.scope = scopes[name]


def check_background(layers: Mapping[str, ProductKeyMemory], background: Background) -> None:
    """Raises:
    ValueError: a background of another memory, or one without states.
    """
    background.check(layers)
    for name in layers:
        if background[name].mean is None:
            raise ValueError(
                f"background: holds only counts for {name}, a scope also needs mean, covariance and states; "
                "use the background that calibrate returned"
            )


def clear_scope(model: nn.Module) -> None:
    """Forget every memory layer's scope: the gate is open everywhere (g = 1), as in the paper."""
    for memory in memory_layers(model).values():
        memory.scope = None


def _enough(batches: Iterable[Mapping[str, Tensor]]) -> Iterable[Mapping[str, Tensor]]:
    """Random batches with TAUGHT_SIZE supervised positions, in their order; all where there are fewer."""
    if not isinstance(batches, Sequence) or not all("labels" in batch for batch in batches):
        return batches
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = torch.tensor([int((batches[place]["labels"][:, 1:] != -100).sum()) for place in order])
    num_drawn = int((sizes.cumsum(0) < TAUGHT_SIZE).sum()) + 1
    return [batches[place] for place in sorted(order[:num_drawn])]


def _joined(name: str, old: Scope | None, new: Scope) -> Scope:
    if old is None:
        return new
    old = old.copy()
    if not old.same_space(new):
        raise ValueError(
            f"background: the scope of {name} was made with another one; extend it with the same background"
        )
    return old.joined(new)


def _scope_of(
    name: str,
    states: Tensor,
    example: Tensor,
    start: Tensor,
    layer: LayerBackground,
    also: Tensor | None,
) -> Scope:
    """The scope of taught states [n, d]; `start` marks answer starts, which get thresholds of their own."""
    assert layer.mean is not None
    assert layer.covariance is not None
    assert layer.sample is not None
    mean, whitener = layer.mean.float(), whitening(layer.covariance)
    general = whiten(layer.sample, mean, whitener)
    known, quantile = _known(layer, mean, whitener)
    task_known = known[0][:0] if also is None else whiten(also, mean, whitener)
    everything = torch.cat([*known, task_known])
    # Which part of the background's known states each is of; -1: the task's own, which decide nothing.
    sizes = torch.tensor([*(len(part) for part in known), len(task_known)])
    kind_of = torch.tensor([*range(len(known)), -1]).repeat_interleave(sizes)
    taught = whiten(states, mean, whitener)
    kinds = [kind for kind in (start, ~start) if kind.any()]
    parts = []
    for kind, room in zip(kinds, _quotas([int(kind.sum()) for kind in kinds], CENTRES_SIZE), strict=True):
        centres = taught[kind]
        if len(centres) > room:
            centres = F.normalize(k_means(centres, room, torch.Generator().manual_seed(0)), dim=-1)
        decides = kind_of == (0 if kind is start else len(known) - 1)
        lo, hi, separable = thresholds(
            taught[kind],
            example[kind],
            centres,
            everything,
            decides,
            general,
            quantile,
            START_WIDTH if kind is start else WITHIN_WIDTH,
        )
        where = "at the start of answers" if kind is start else "within answers"
        if not separable:
            logger.warning(
                "%s, %s: what is taught and what is known cannot be told apart; other answers may change",
                name,
                where,
            )
        logger.info("%s, %s: %d centres, lo %.3f, hi %.3f", name, where, len(centres), lo, hi)
        parts.append((centres, *(centres.new_full((len(centres),), value) for value in (lo, hi))))
    centres, lo, hi = (torch.cat(part) for part in zip(*parts, strict=True))
    weight = torch.tensor([KNOWN_WEIGHT])
    return Scope(mean, whitener, torch.cat(known), weight, task_known, centres, lo, hi)


def _known(layer: LayerBackground, mean: Tensor, whitener: Tensor) -> tuple[list[Tensor], float]:
    """The background's known states, answer starts and the rest of answers, and the quantile of `lo`.

    Each kind decides the thresholds of its own kind of centre. A background with few answers has one part.
    """
    assert layer.sample is not None
    assert layer.starts is not None
    assert layer.answers is not None
    if len(layer.starts) < MIN_STARTS:
        return [whiten(layer.sample[:KNOWN_SIZE], mean, whitener)], STATE_QUANTILE
    kinds = [layer.starts, layer.answers]
    rooms = _quotas([len(kind) for kind in kinds], KNOWN_SIZE)
    return [
        whiten(kind[:room], mean, whitener) for kind, room in zip(kinds, rooms, strict=True)
    ], START_QUANTILE


def _drawn(number: int, room: int) -> Tensor:
    """Indices of at most `room` of `number` things, at random, in order."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))[:room].sort().values


def _quotas(sizes: list[int], room: int) -> list[int]:
    """Shares of `room`: an equal part each, and what one kind leaves over goes to the others."""
    quotas = [0] * len(sizes)
    for rank, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        quotas[index] = min(sizes[index], (room - sum(quotas)) // (len(sizes) - rank))
    return quotas


def _rows(batch: Mapping[str, Tensor]) -> Tensor:
    """The row of each of a batch's unpadded positions [tokens]."""
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool().cpu()
    return torch.arange(len(ids))[:, None].expand_as(ids)[mask]
