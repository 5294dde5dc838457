"""Which rows one optimizer step may change: a score for every slot that the batch read, and the top_t best.

| rule     | score of a read slot i                                                              |
| -------- | ----------------------------------------------------------------------------------- |
| "tfidf"  | (c_i / sum c) log((n_bg + 1) / (df_i + 1))                                          |
| "kl"     | p_i log((p_i + 1e-8) / (q_i + 1e-8)), p = c / sum c, q = (bg + 1) / sum(bg + 1)     |
| "tf"     | c_i                                                                                 |
| "grad"   | norm of the row's gradient                                                          |
| "random" | a random number                                                                     |
| callable | rule(counts, background) -> [num_slots]                                             |

c: access counts of the step; bg, df, n_bg: of the background. Ties go to the lowest slot; unread slots are
never taken. Scores are float64 on the CPU, which every machine has: equal counts give equal rows anywhere.

Reference: Lin 2025 (2510.15103) for tfidf, Goyal 2026 (2604.05248) for kl; both as in 2605.03229.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..background.background import LayerBackground

RULES = ("kl", "tfidf", "tf", "grad", "random")
NEEDS_BACKGROUND = ("kl", "tfidf")
Rule = str | Callable[[Tensor, LayerBackground | None], Tensor]


def select_rows(
    counts: Tensor,
    background: LayerBackground | None = None,
    *,
    top_t: int,
    rule: Rule = "kl",
    gradient_norms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ids of the selected rows.

    Args:
        counts: access counts of the step, [num_slots] int64.
        background: of this layer; needed by "kl" and "tfidf".
        top_t: how many rows at most.
        rule: see the table above.
        gradient_norms: [num_slots] float32, needed by "grad".
        generator: for "random"; None: torch's default.

    Returns:
        1-D int64 on the device of `counts`, highest score first, at most top_t and never a slot with count 0.

    Raises:
        ValueError: an unknown rule, top_t < 1, or what the rule needs is missing.
    """
    check_selection(top_t, rule)
    device, counts = counts.device, counts.cpu()
    scores = _scores(counts, background, rule, gradient_norms, generator)
    read = counts.nonzero().flatten()
    # A stable sort of candidates in slot order gives ties to the lowest slot, on any number of processes.
    order = scores[read].sort(descending=True, stable=True).indices
    return read[order[:top_t]].to(device)


def check_selection(top_t: int, rule: Rule) -> None:
    if isinstance(top_t, bool) or not isinstance(top_t, int) or top_t < 1:
        raise ValueError(
            f"top_t={top_t!r} must be a whole number >= 1: the rows that one step may change per layer"
        )
    if not callable(rule) and rule not in RULES:
        raise ValueError(f"rule={rule!r} must be one of {', '.join(map(repr, RULES))}, or a callable")


def _scores(counts, background, rule, gradient_norms, generator) -> Tensor:
    if rule in NEEDS_BACKGROUND:
        if background is None:
            raise ValueError(f"rule={rule!r} needs background=; make one with calibrate or count_accesses")
        if len(background.counts) != len(counts):
            raise ValueError(f"background: has {len(background.counts)} slots, counts has {len(counts)}")
    c = counts.double()
    p = c / c.sum().clamp_min(1)
    if rule == "tfidf":
        df = background.df.cpu()
        return p * ((background.num_batches + 1) / (df + 1)).log()
    if rule == "kl":
        bg = background.counts.cpu() + 1
        return p * ((p + 1e-8) / (bg / bg.sum() + 1e-8)).log()
    if rule == "tf":
        return c
    if rule == "grad":
        if gradient_norms is None:
            raise ValueError("rule='grad' needs gradient_norms=, the norm of every read row's gradient")
        return gradient_norms.cpu()
    if rule == "random":
        return torch.rand(len(c), generator=generator)
    scores = rule(counts, background).cpu()
    if scores.shape != counts.shape:
        raise ValueError(
            f"rule: the callable returned shape {tuple(scores.shape)}, expected {tuple(counts.shape)}"
        )
    return scores
