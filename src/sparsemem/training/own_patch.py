"""The patch of one task that has rows of its own: a centre and a row for each supervised position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..background.own_space import KindThresholds, own_thresholds
from ..layer.scope import Scope, nearest_known, whiten
from ..patches.layers import LayerPatch
from ..patches.patch import RowPatch
from ..precision import autocast, device_of, precise
from .cached import TailHead, answer_starts
from .own_rows import own_rows


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
