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
from .memory import ProductKeyMemory
from .relevance import START_QUANTILE, STATE_QUANTILE, Scope, k_means, thresholds, whiten, whitening
from .tuner import memory_layers

logger = logging.getLogger(__name__)

# Supervised states that a scope is made of; where there are more, a random part.
TAUGHT_SIZE = 8_192
# A background with fewer answers than this says too little of what is known; its states take their place.
MIN_STARTS = 32


@torch.no_grad()
def set_scope(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], background: Background, *, extend: bool = False
) -> None:
    """Set each memory layer's scope from training data; tokens out of scope then pass as in the base model.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids, labels (-100: not supervised) and attention_mask. Centres are the
            states at the positions whose next label is supervised, memory switched off. Of a list with
            many more than TAUGHT_SIZE of them, batches are drawn at random and the others not read.
        background: of `calibrate`, which keeps mean, covariance and a sample of states.
        extend: keep the scope there is and add to it: g is then the largest over both.

    Raises:
        ValueError: no supervised position, no room for centres, or a background without states.
    """
    layers = memory_layers(model)
    background.check(layers)
    for name in layers:
        if background[name].mean is None:
            raise ValueError(
                f"background: holds only counts for {name}, a scope also needs mean, covariance and states; "
                "use the background that calibrate returned"
            )
    taught: dict[str, list[Tensor]] = {name: [] for name in layers}
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
        for name, x in states.items():
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
            name: _scope_of(
                name,
                memory,
                torch.cat(taught[name])[keep],
                example[keep],
                start[keep],
                background[name],
                extend,
            )
            for name, memory in layers.items()
        }
    for name, memory in layers.items():
        memory.scope = scopes[name]


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


def _scope_of(
    name: str,
    memory: ProductKeyMemory,
    states: Tensor,
    example: Tensor,
    start: Tensor,
    layer: LayerBackground,
    extend: bool,
) -> Scope:
    old = memory.scope.copy() if extend and memory.scope is not None else None
    mean, whitener, known, num_decisive, quantile = _space(memory, layer)
    room = len(memory.scope_centres) - (0 if old is None else len(old.centres))
    if room < 1:
        raise ValueError(
            f"max_centres={len(memory.scope_centres)}: the scope of {name} is full; "
            "make the memory with a larger max_centres"
        )
    taught = whiten(states, mean, whitener)
    centres = taught
    if len(taught) > room:
        centres = F.normalize(k_means(taught, room, torch.Generator().manual_seed(0)), dim=-1)
    lo, hi, separable = thresholds(taught, example, start, centres, known[:num_decisive], quantile)
    if not separable:
        logger.warning(
            "%s: what is taught and what is known cannot be told apart; other answers may change", name
        )
    logger.info("%s: %d centres, lo %.3f, hi %.3f", name, len(centres), lo, hi)
    new = Scope(
        mean, whitener, known, centres, *(centres.new_full((len(centres),), value) for value in (lo, hi))
    )
    if old is None:
        return new
    if not old.same_space(new):
        raise ValueError(
            f"background: the scope of {name} was made with another one; extend it with the same background"
        )
    return old.joined(new)


def _space(memory: ProductKeyMemory, layer: LayerBackground) -> tuple[Tensor, Tensor, Tensor, int, float]:
    """Mean, whitener and known states of a layer's background; how many of these, the first, decide where
    the thresholds lie; and the quantile of `lo` among these.

    Answer starts decide. The rest of the answers is known too: what began as the base's answer goes on so.
    """
    assert layer.mean is not None
    assert layer.covariance is not None
    assert layer.sample is not None
    assert layer.starts is not None
    assert layer.answers is not None
    mean, whitener = layer.mean.float(), whitening(layer.covariance)
    room = len(memory.scope_known)
    if len(layer.starts) < MIN_STARTS:
        known = whiten(layer.sample[:room], mean, whitener)
        return mean, whitener, known, len(known), STATE_QUANTILE
    known = whiten(torch.cat([layer.starts, layer.answers])[:room], mean, whitener)
    return mean, whitener, known, min(len(layer.starts), room), START_QUANTILE


def _rows(batch: Mapping[str, Tensor]) -> Tensor:
    """The row of each of a batch's unpadded positions [tokens]."""
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool().cpu()
    return torch.arange(len(ids))[:, None].expand_as(ids)[mask]
