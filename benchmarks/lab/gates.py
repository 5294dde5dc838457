"""The gate of a tail memory on cached states: its whitened space, its thresholds, and their fitting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemem.background.fitting import OWN_SHARE, RAMP, WIDE_RAMP, k_means, whitening
from sparsemem.layer.scope import KNOWN_WEIGHT, whiten

MAX_CENTRES = 1024
TAUGHT_SIZE = 8_192


@dataclass
class Gate:
    """The gate of one layer: whitened space, known states in it, centres with two thresholds each."""

    mean: Tensor
    whitener: Tensor
    known: Tensor
    centres: Tensor
    lo: Tensor
    hi: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """g [n] of states [n, d]."""
        parts = [self._of(part) for part in states.split(4096)]
        return torch.cat(parts) if parts else states.new_zeros(0)

    def _of(self, states: Tensor) -> Tensor:
        z = whiten(states, self.mean, self.whitener)
        score = z @ self.centres.T - KNOWN_WEIGHT * nearest(z, self.known)[:, None]
        return ((score - self.lo) / (self.hi - self.lo)).clamp(0, 1).amax(-1)


def nearest(z: Tensor, known: Tensor) -> Tensor:
    """Cosine of each state to the nearest known state, at least 0; [n]."""
    parts = [(part @ known.T).amax(-1).clamp_min(0) for part in z.split(4096)]
    return torch.cat(parts) if parts else z.new_zeros(0)


def others(z: Tensor) -> Tensor:
    """Cosine of each state to the nearest other state, at least 0; [n]."""
    return (z @ z.T).fill_diagonal_(-1.0).amax(-1).clamp_min(0)


def thresholds(
    taught: Tensor,
    example: Tensor,
    centres: Tensor,
    known: Tensor,
    own_kind: Tensor,
    prose: Tensor,
    *,
    quantile: float = 0.98,
    prose_quantile: float | None = 1.0,
    reach: float | None = 0.02,
    width: float | None = 0.05,
    ramp: float = RAMP,
) -> tuple[float, float]:
    """The pair (lo, hi) of centres of one kind (answer starts, or positions within answers), from data.

    Every state is scored against the others alone: a known one without itself, a taught one without its own
    record. `lo` lies where known states of the same kind and prose are shut. `hi` lies `ramp` of the way from
    there to the median of the taught ones, or, where that is more, at their quantile `reach`: it need not be
    lower, since these scores foretell those of unseen wordings. `lo` is then raised to `width`
    below `hi`, unless that is None.

    Args:
        taught [n, d], example [n]: whitened taught states of this kind and the record of each.
        centres [num_centres, d]: of this kind.
        known [num_known, d]: all known states; own_kind [num_known] bool: those of this kind, which decide.
        prose [num_prose, d]: whitened states of running text.
        quantile: of the known states' scores, where `lo` lies at least; prose_quantile: of the prose's.
    """
    scores = (known @ centres.T).amax(-1) - KNOWN_WEIGHT * others(known)
    lo = float(scores[own_kind].quantile(quantile))
    if prose_quantile is not None:
        among = (prose @ centres.T).amax(-1) - KNOWN_WEIGHT * nearest(prose, known)
        lo = max(lo, float(among.quantile(prose_quantile)))
    drawn = torch.randperm(len(taught), generator=torch.Generator().manual_seed(0))[:2048]
    same = example[drawn][:, None] == example[None, :]
    among_known = KNOWN_WEIGHT * nearest(taught[drawn], known)
    alone = (taught[drawn] @ taught.T).masked_fill_(same, -1.0).amax(-1) - among_known
    # What is taught must itself be in scope, or it could not be learnt, even where it is as good as known.
    own = float((1 - among_known).quantile(1 - OWN_SHARE))
    typical = float(alone.median())
    if typical <= lo or own <= lo:
        lo = min(lo, own - WIDE_RAMP)
        return lo, lo + WIDE_RAMP
    hi = min(lo + ramp * (typical - lo), own)
    if reach is not None:
        hi = min(max(hi, float(alone.quantile(reach))), own)
        lo = lo if width is None else max(lo, hi - width)
    return lo, hi


def fit(
    taught: Tensor,
    example: Tensor,
    start: Tensor,
    space: dict[str, Tensor],
    options: dict,
    extra: Sequence[Tensor] = (),
) -> Gate:
    """A gate from taught states [n, d].

    Args:
        space: of `space_of`: mean, whitener, known, known_start, prose.
        options: "kinds" (a pair of thresholds for each kind), "start_quantile", "within_quantile",
            "prose_quantile", "ramp", "reach", "start_width", "width".
        extra: further known states; they do not decide where `lo` lies.
    """
    mean, whitener, known, known_start = (space[k] for k in ("mean", "whitener", "known", "known_start"))
    more = [whiten(one, mean, whitener) for one in extra]
    if options["kinds"]:
        known = torch.cat([known, *more])
    inside = torch.cat([~known_start, torch.zeros(len(known) - len(known_start), dtype=torch.bool)])
    known_start = torch.cat([known_start, torch.zeros(len(known) - len(known_start), dtype=torch.bool)])
    keep = torch.randperm(len(taught), generator=torch.Generator().manual_seed(0))[:TAUGHT_SIZE].sort().values
    z, example, start = whiten(taught[keep], mean, whitener), example[keep], start[keep]
    if not options["kinds"]:
        # as `relevance.thresholds`: one pair, from starts, whose known ones alone decide
        centres = _centres(z, MAX_CENTRES)
        decisive = known[known_start]
        among = torch.ones(len(decisive), dtype=torch.bool)
        lo, hi = _starts_decide(z, example, start, centres, decisive, among, space["prose"], options)
        lo, hi = (centres.new_full((len(centres),), value) for value in (lo, hi))
    else:
        share = float(start.float().mean())
        parts, los, his = [], [], []
        for flag, part, name in ((start, share, "start"), (~start, 1 - share, "within")):
            centres = _centres(z[flag], max(1, int(MAX_CENTRES * part)))
            pair = thresholds(
                z[flag],
                example[flag],
                centres,
                known,
                known_start if name == "start" else inside,
                space["prose"],
                quantile=options[f"{name}_quantile"],
                width=options["start_width"] if name == "start" else options["width"],
                **{key: options[key] for key in ("prose_quantile", "ramp", "reach")},
            )
            parts.append(centres)
            los.append(centres.new_full((len(centres),), pair[0]))
            his.append(centres.new_full((len(centres),), pair[1]))
        centres, lo, hi = torch.cat(parts), torch.cat(los), torch.cat(his)
    if not options["kinds"]:
        known = torch.cat([known, *more])
    return Gate(mean, whitener, known, centres, lo, hi)


def _starts_decide(z, example, start, centres, known, among, prose, options) -> tuple[float, float]:
    """As the library does it: known starts, and of the taught ones starts, scored against all positions."""
    scores = (known @ centres.T).amax(-1) - KNOWN_WEIGHT * others(known)
    lo = float(scores.quantile(options["start_quantile"]))
    if options["prose_quantile"] is not None:
        of_prose = (prose @ centres.T).amax(-1) - KNOWN_WEIGHT * nearest(prose, known)
        lo = max(lo, float(of_prose.quantile(options["prose_quantile"])))
    same = example[start][:, None] == example[None, :]
    among_known = KNOWN_WEIGHT * nearest(z[start], known)
    typical = float(((z[start] @ z.T).masked_fill_(same, -1.0).amax(-1) - among_known).median())
    own = float((1 - among_known).quantile(1 - OWN_SHARE))
    if typical > lo and own > lo:
        return lo, min(lo + options["ramp"] * (typical - lo), own)
    lo = min(lo, own - WIDE_RAMP)
    return lo, lo + WIDE_RAMP


def _centres(z: Tensor, room: int) -> Tensor:
    return z if len(z) <= room else F.normalize(k_means(z, room, torch.Generator().manual_seed(0)), dim=-1)


def space(seen: Any, prose: Tensor, room: int) -> dict[str, Tensor]:
    """Mean, whitener, known states (starts before others, as the library keeps them) and prose of a layer.

    Args:
        seen: `calibration._Statistics` of the background; prose [n, d]: its states in running text.
    """
    mean, whitener = seen.mean.float(), whitening(seen.covariance)
    states = torch.cat([seen.starts.states, seen.answers.states]).bfloat16().float()[:room]
    return {
        "mean": mean,
        "whitener": whitener,
        "known": whiten(states, mean, whitener),
        "known_start": torch.arange(len(states)) < len(seen.starts.states),
        "prose": whiten(prose, mean, whitener),
    }
