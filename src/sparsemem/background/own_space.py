"""The space of centres that have rows of their own, and their thresholds, from a background alone.

A task's thresholds must not depend on other tasks, or taking one back would change the others. So every
centre of a kind gets the same pair, from how near the background's own states of that kind come to each
other: were one of them taught, the next must mostly stay shut.

Reference: ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..layer.scope import Scope, whiten
from .background import LayerBackground
from .fitting import whitening

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
