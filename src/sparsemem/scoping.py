"""What data sets and nobody trains, second part: the scope of a memory (`set_scope`).

The whitened states at the supervised positions of the training data become the centres of the relevance gate,
its thresholds come from the background and from the training examples' own nearness.

Reference: ours.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .access import Background, LayerBackground, layer_inputs, precise, supervised
from .relevance import (
    KNOWN_WEIGHT,
    START_QUANTILE,
    STATE_QUANTILE,
    Scope,
    k_means,
    thresholds,
    whiten,
    whitening,
)
from .tuner import gated_layers, memory_layers

logger = logging.getLogger(__name__)

# Supervised states that a scope is made of; where there are more, a random part.
TAUGHT_SIZE = 8_192
# Centres that one call of `set_scope` adds at most, and known states of a scope.
CENTRES_SIZE, KNOWN_SIZE = 1_024, 1_024
# A background with fewer answers than this says too little of what is known; its states take their place.
MIN_STARTS = 32


@torch.no_grad()
def set_scope(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], background: Background, *, extend: bool = False
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

    Raises:
        ValueError: no supervised position, or a background without states.
    """
    layers = memory_layers(model)
    background.check(layers)
    for name in layers:
        if background[name].mean is None:
            raise ValueError(
                f"background: holds only counts for {name}, a scope also needs mean, covariance and states; "
                "use the background that calibrate returned"
            )
    gated = gated_layers(layers)
    taught: dict[str, list[Tensor]] = {name: [] for name in gated}
    examples: list[Tensor] = []
    starts: list[Tensor] = []
    num_rows = 0
    for batch, states in layer_inputs(model, _enough(batches)):
        if "labels" not in batch:
            raise ValueError(
                "batches: have no 'labels'; a scope is taken from supervised positions, pass labels too"
            )
        chosen, first, _ = supervised(batch)
        examples.append(_rows(batch)[chosen] + num_rows)
        num_rows += len(batch["input_ids"])
        starts.append(first[chosen])
        for name in gated:
            x = states[name]
            taught[name].append(x[chosen.to(x.device)].float().cpu())
    example, start = torch.cat(examples), torch.cat(starts)
    if len(example) == 0:
        raise ValueError(
            "batches: no position is supervised (every label is -100); a scope needs at least one"
        )
    keep = (
        torch.randperm(len(example), generator=torch.Generator().manual_seed(0))[:TAUGHT_SIZE].sort().values
    )
    with precise(model):
        scopes = {
            name: _scope_of(name, torch.cat(taught[name])[keep], example[keep], start[keep], background[name])
            for name in gated
        }
    joined = {
        name: _joined(name, memory.scope, scopes[name]) if extend else scopes[name]
        for name, memory in gated.items()
    }
    clear_scope(model)
    for name, memory in gated.items():
        memory.scope = joined[name]


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


def _scope_of(name: str, states: Tensor, example: Tensor, start: Tensor, layer: LayerBackground) -> Scope:
    """The scope of taught states [n, d]; `start` marks answer starts, which get thresholds of their own."""
    assert layer.mean is not None
    assert layer.covariance is not None
    assert layer.sample is not None
    mean, whitener = layer.mean.float(), whitening(layer.covariance)
    general = whiten(layer.sample, mean, whitener)
    known, quantile = _known(layer, mean, whitener)
    taught = whiten(states, mean, whitener)
    kinds = [kind for kind in (start, ~start) if kind.any()]
    parts = []
    for kind, room in zip(kinds, _quotas([int(kind.sum()) for kind in kinds], CENTRES_SIZE), strict=True):
        centres = taught[kind]
        if len(centres) > room:
            centres = F.normalize(k_means(centres, room, torch.Generator().manual_seed(0)), dim=-1)
        lo, hi, separable = thresholds(taught[kind], example[kind], centres, known, general, quantile)
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
    return Scope(mean, whitener, torch.cat(known), torch.tensor([KNOWN_WEIGHT]), centres, lo, hi)


def _known(layer: LayerBackground, mean: Tensor, whitener: Tensor) -> tuple[list[Tensor], float]:
    """The background's known states, answer starts and the rest of answers, and the quantile of `lo`.

    Answer starts decide. The rest of the answers is known too: what began as the base's answer continues so.
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
