"""Set a memory's scope from data, without training (`set_scope`).

The centres of the relevance gate are the whitened states at the supervised positions of the training data.
The thresholds come from the background, and from how similar the training examples are to each other.

Reference: ours (no paper).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter.memories import gated_layers, memory_layers
from ..layer.memory import ProductKeyMemory
from ..layer.scope import KNOWN_WEIGHT, Scope, centre_scope
from ..layer.space import plain_space, whiten
from ..precision import precise
from .background import Background, LayerBackground
from .fitting import START_QUANTILE, STATE_QUANTILE, k_means, thresholds, whitening
from .states import layer_inputs, supervised

logger = logging.getLogger(__name__)

# Maximum number of supervised states that a scope is made from. If there are more, a random part is used.
TAUGHT_SIZE = 8_192
# Maximum number of centres that one call of `set_scope` adds, and of known states of a scope.
CENTRES_SIZE, KNOWN_SIZE = 1_024, 1_024
# Maximum hi - lo at answer starts and within answers. It is smaller within answers, because states of general
# text are more similar to those.
START_WIDTH, WITHIN_WIDTH = 0.15, 0.05
# If a background has fewer answers than this, its sample of all states is used as known states.
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
    """Set the memory's scope from training data. The memory then adds nothing to tokens out of scope.

    With `write="last"` the memory has one scope, in its deepest layer. With `write="own"` each layer has a
    scope.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids, labels (-100: not supervised) and attention_mask. Centres are the base
            model's states at the positions whose next label is supervised. If a list has many more than
            TAUGHT_SIZE such positions, only some batches are used, drawn at random.
        background: from `calibrate`, with mean, covariance and a sample of states.
        extend: keep the present scope and add to it. The gate is then the larger one of both scopes.
        known: further batches of the same form. Their supervised states are added to the known states. Use it
            for answers that are similar to what is taught, but must not change.

    Raises:
        ValueError: no position is supervised, labels are missing, or the background has no states or does not
            fit the model.
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
        example: [n] int64, the record that each state comes from.
        start: [n] bool, whether the state is at an answer start.
    """

    states: dict[str, Tensor]
    example: Tensor
    start: Tensor


def supervised_states(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], layers: Iterable[str]
) -> Supervised:
    """States of the base model at supervised positions, float32 on the CPU.

    Args:
        model: a model with memory layers.
        batches: as for `set_scope`.
        layers: names of the layers whose inputs are wanted.

    Raises:
        ValueError: a batch has no labels, or no position is supervised.
    """
    taught: dict[str, list[Tensor]] = {name: [] for name in layers}
    examples: list[Tensor] = []
    starts: list[Tensor] = []
    num_rows = 0
    for batch, states in layer_inputs(model, batches):
        if "labels" not in batch:
            raise ValueError(
                "batches: have no 'labels'; a scope is made from supervised positions, so pass labels too"
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
    """As `set_scope`, from states that `supervised_states` returned. The background is not checked."""
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
    """Check that a background fits these layers and can be used for a scope.

    Raises:
        ValueError: the background was made for another memory, or has no states.
    """
    background.check(layers)
    for name in layers:
        if background[name].mean is None:
            raise ValueError(
                f"background: holds only counts for {name}, but a scope also needs mean, covariance and "
                "states; use the background that calibrate returned"
            )


def clear_scope(model: nn.Module) -> None:
    """Remove the scope of every memory layer. The gate is then 1 everywhere, as in the paper."""
    for memory in memory_layers(model).values():
        memory.scope = None


def _enough(batches: Iterable[Mapping[str, Tensor]]) -> Iterable[Mapping[str, Tensor]]:
    """Random batches, in their order, with about TAUGHT_SIZE supervised positions. All if there are fewer."""
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
            f"background: the scope of {name} was made with another background; extend it with that one"
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
    """Make the scope of one layer.

    Answer starts and the other positions of answers are two kinds of centres. Each kind has its own
    thresholds.

    Args:
        name: of the layer, for log messages.
        states: [n, d], the taught states.
        example: [n] int64, the record that each state comes from.
        start: [n] bool, whether the state is at an answer start.
        layer: the background of the layer.
        also: [m, d], known states of this task, or None.
    """
    assert layer.mean is not None
    assert layer.covariance is not None
    assert layer.sample is not None
    mean, whitener = layer.mean.float(), whitening(layer.covariance)
    general = whiten(layer.sample, mean, whitener)
    known, quantile = _known(layer, mean, whitener)
    task_known = known[0][:0] if also is None else whiten(also, mean, whitener)
    everything = torch.cat([*known, task_known])
    # The kind of each known state. -1: known states of this task, which are not used to find `lo`.
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
                "%s, %s: the states of what is taught and of what the base model knows are too similar to be "
                "told apart; other answers may change",
                name,
                where,
            )
        logger.info("%s, %s: %d centres, lo %.3f, hi %.3f", name, where, len(centres), lo, hi)
        parts.append((centres, *(centres.new_full((len(centres),), value) for value in (lo, hi))))
    centres, lo, hi = (torch.cat(part) for part in zip(*parts, strict=True))
    space = plain_space(mean, whitener, torch.cat(known), KNOWN_WEIGHT)
    return centre_scope(space, task_known, centres, lo, hi)


def _known(layer: LayerBackground, mean: Tensor, whitener: Tensor) -> tuple[list[Tensor], float]:
    """The known states of the background, in one tensor for each kind, and the quantile for `lo`.

    The kinds are answer starts and the other positions of answers. The known states of a kind are used for
    the thresholds of the centres of this kind. If the background has few answers, there is only one tensor.
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
    """Random indices below `number`, at most `room` of them, in ascending order."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))[:room].sort().values


def _quotas(sizes: list[int], room: int) -> list[int]:
    """Split `room` into equal parts, one for each size. What one size does not need goes to the others."""
    quotas = [0] * len(sizes)
    for rank, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        quotas[index] = min(sizes[index], (room - sum(quotas)) // (len(sizes) - rank))
    return quotas


def _rows(batch: Mapping[str, Tensor]) -> Tensor:
    """For each unpadded position of a batch, the index of its row: [tokens]."""
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool().cpu()
    return torch.arange(len(ids))[:, None].expand_as(ids)[mask]
