"""The patch of one task that has rows of its own: a centre and a row for each supervised position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..background.background import LayerBackground
from ..background.fitting import whitening
from ..layer.scope import Scope, nearest_known, whiten
from ..patches.layers import LayerPatch
from ..patches.patch import RowPatch
from ..precision import autocast, device_of, precise
from ..training.cached import TailHead, answer_starts

# How much nearness to something known counts. Less than where rows are shared: an own row speaks near its
# centre alone, and unseen wordings lie nearer to known states than taught ones do (dev/LOG.md, section 16).
KNOWN_WEIGHT = 0.15
# States of a kind that are known ones, and that are compared to each other for the thresholds.
KNOWN_SIZE, COMPARED_SIZE = 512, 2_048
# Share of the background's states of a kind that may come nearer to another than the kind's threshold.
START_SHARE, WITHIN_SHARE = 0.10, 0.05
# From closed to fully open.
RAMP = 0.02
MIN_STATES = 32


class KindThresholds(NamedTuple):
    """Where a centre begins to open: at the start of an answer, and within one."""

    start: float
    within: float


def own_space(layer: LayerBackground) -> tuple[Scope, KindThresholds]:
    """A scope without centres, and thresholds, from a layer's background.

    Raises:
        ValueError: the background has too few answers to say how near known questions come to each other.
    """
    if layer.mean is None or layer.covariance is None or layer.starts is None or layer.answers is None:
        raise ValueError("background: holds only counts; use the background that calibrate returned")
    if min(len(layer.starts), len(layer.answers)) < MIN_STATES:
        raise ValueError(
            f"background: has {len(layer.starts)} answers, at least {MIN_STATES} are needed; "
            "give records with questions and answers"
        )
    mean, whitener = layer.mean.float(), whitening(layer.covariance)
    starts = whiten(layer.starts[:COMPARED_SIZE], mean, whitener)
    within = whiten(layer.answers[:COMPARED_SIZE], mean, whitener)
    nothing, none = mean.new_zeros(0, len(mean)), mean.new_zeros(0)
    weight = mean.new_tensor([KNOWN_WEIGHT])
    known = torch.cat([starts[:KNOWN_SIZE], within[:KNOWN_SIZE]])
    space = Scope(mean, whitener, known, weight, nothing, nothing, none, none)
    return space, KindThresholds(_threshold(starts, START_SHARE), _threshold(within, WITHIN_SHARE))


def own_thresholds(thresholds: KindThresholds, start: Tensor, own_scores: Tensor) -> tuple[Tensor, Tensor]:
    """lo, hi [n] of centres; each opens fully at its own state, however near something known is to it.

    Args:
        start: [n] bool, whether an answer starts there; own_scores: [n], the centres' scores of themselves.
    """
    lo = torch.where(start, *(own_scores.new_tensor(value) for value in thresholds))
    lo = torch.minimum(lo, own_scores - 2 * RAMP)
    return lo, lo + RAMP


def _threshold(z: Tensor, share: float) -> float:
    nearest = (z @ z.T).fill_diagonal_(-1.0).amax(-1)
    return float(((1 - KNOWN_WEIGHT) * nearest).quantile(1 - share))


@dataclass(frozen=True)
class Place:
    """Where the tasks of one stream are written.

    Attributes:
        name: of the memory layer.
        addressing: fingerprint of the layer's addressing.
        base: fingerprint of the base model.
    """

    name: str
    addressing: str
    space: Scope
    thresholds: KindThresholds
    base: str


@torch.no_grad()
def own_patch(
    head: TailHead,
    place: Place,
    examples: Sequence[dict[str, Any]],
    info: dict[str, Any],
    progress: Callable[[int, int], object],
) -> RowPatch:
    """The patch of encoded examples.

    Args:
        info: `{"task", "facts"}` with one fact an example; goes into the patch, each fact with its number of
            centres.
        progress: see `own_rows`.
    """
    with autocast(head.model):
        states, labels = map(torch.cat, zip(*head.rows_of(examples), strict=True))
        residuals, inputs = head.parts(states)
        device = device_of(head.model)
        rows = own_rows(head, residuals.to(device), labels.to(device), progress).cpu()
    starts = [answer_starts(one["labels"]) for one in examples]
    facts = [{**fact, "centres": len(one)} for fact, one in zip(info["facts"], starts, strict=True)]
    with precise(head.model):
        scope = _scope_of(place, inputs[place.name], torch.cat(starts), rows)
    nothing = torch.zeros(0, head.layers[place.name].d_out)
    none = torch.zeros(0, dtype=torch.int64)
    layer = LayerPatch(none, nothing, nothing, place.addressing, scope)
    return RowPatch({place.name: layer}, place.base, {**info, "facts": facts}).referring()


def _scope_of(place: Place, states: Tensor, start: Tensor, rows: Tensor) -> Scope:
    space = place.space
    centres = whiten(states, space.mean, space.whitener).to(torch.bfloat16).float()
    among_known = space.known_weight * nearest_known(centres, space.known)
    own = centres.square().sum(-1) - among_known
    lo, hi = own_thresholds(place.thresholds, start, own)
    parts = {key: getattr(space, key) for key in ("mean", "whitener", "known", "known_weight")}
    return Scope(**parts, task_known=space.task_known, centres=centres, lo=lo, hi=hi, rows=rows)


STEPS, STEP_SIZE, MOMENTUM = 8, 0.5, 0.5
# The row must win on so many times the residual.
STRENGTHS = (0.5, 1.0, 2.0)
# Positions that are fitted at once; each row's result does not depend on the others.
AT_ONCE = 64


def own_rows(
    head: TailHead,
    residuals: Tensor,
    labels: Tensor,
    progress: Callable[[int, int], object] = lambda _done, _of: None,
) -> Tensor:
    """Rows [n, width] float32 to add to last residuals [n, width], rounded to bfloat16.

    Args:
        labels: [n] int64, the token that each position is to predict.
        progress: gets the number of positions that are done, and n.
    """
    rows = []
    for start in range(0, len(labels), AT_ONCE):
        progress(start, len(labels))
        chosen = slice(start, start + AT_ONCE)
        rows.append(_fitted(head, residuals[chosen], labels[chosen]))
    return torch.cat(rows).to(torch.bfloat16).float()


def _fitted(head: TailHead, residuals: Tensor, labels: Tensor) -> Tensor:
    """Normalised gradient descent with a falling rate; a step is measured by the residual's length."""
    size = residuals.norm(dim=1, keepdim=True)
    rows, moment = torch.zeros_like(residuals), torch.zeros_like(residuals)
    wanted = labels.repeat(len(STRENGTHS))
    for step in range(STEPS):
        with torch.enable_grad():
            rows.requires_grad_(True)
            tried = torch.cat([residuals * strength + rows for strength in STRENGTHS])
            loss = functional.cross_entropy(head.logits_of(tried).float(), wanted, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, rows)
        direction = gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
        moment = torch.lerp(moment, direction, 1 - MOMENTUM)
        rows = rows.detach() - STEP_SIZE * 2 * (1 - step / STEPS) * size * moment
    return rows
