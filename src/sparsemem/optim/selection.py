"""Select the rows that one optimizer step may change: the top_t slots with the highest scores.

| rule     | score of a read slot i                                                              |
| -------- | ----------------------------------------------------------------------------------- |
| "tfidf"  | (c_i / sum c) log((n_bg + 1) / (df_i + 1))                                          |
| "kl"     | p_i log((p_i + 1e-8) / (q_i + 1e-8)), p = c / sum c, q = (bg + 1) / sum(bg + 1)     |
| "tf"     | c_i                                                                                 |
| "grad"   | norm of the row's gradient                                                          |
| "random" | a random number                                                                     |
| callable | rule(counts, background) -> [num_slots]                                             |

c: access counts of the step. bg, df, n_bg: counts, df and num_batches of the background. Among equal scores,
the lower slot is selected. Slots that the step did not read are never selected. Scores of "tfidf", "kl" and
"tf" are computed in float64 on the CPU, so the same counts give the same rows on every machine.

Reference: Lin 2025 (2510.15103) for tfidf, Goyal 2026 (2604.05248) for kl. Both as in 2605.03229.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..background.background import LayerBackground
from ..choices import RULES
from ..layer.values import ReadLog
from ..processes import num_processes, of_first, summed

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
    """Select rows of one memory layer.

    Args:
        counts: access counts of the step, [num_slots] int64.
        background: of this layer. "kl" and "tfidf" need it.
        top_t: maximum number of rows to select.
        rule: "kl", "tfidf", "tf", "grad", "random" or a callable; see the table at the top of this module.
        gradient_norms: [num_slots] float32, the norm of each row's gradient. "grad" needs it.
        generator: for "random". None: torch's default generator.

    Returns:
        Slot ids, 1-D int64 on the device of `counts`, highest score first: at most top_t, and no slot with
        count 0.

    Raises:
        ValueError: the rule is unknown, top_t < 1, something that the rule needs is missing or has the wrong
            size.
    """
    check_selection(top_t, rule)
    if rule in NEEDS_BACKGROUND and background is not None and len(background.counts) != len(counts):
        raise ValueError(
            f"background: has {len(background.counts)} slots, counts has {len(counts)}; "
            "give the background of this layer"
        )
    on_cpu = counts.cpu()
    read = on_cpu.nonzero().flatten()
    norms = None if gradient_norms is None else gradient_norms.cpu()[read]
    scores = read_scores(read, on_cpu[read], len(counts), background, rule, norms, generator)
    return best_rows(read, scores, top_t).to(counts.device)


def best_rows(read: Tensor, scores: Tensor, top_t: int) -> Tensor:
    """The `top_t` slots with the highest scores, highest first, and among equal scores the lowest slot.

    Args:
        read: [n] int64, ascending.
        scores: [n]. NaN counts as the highest.
    """
    if len(read) > top_t:
        # Only the best scores are sorted. NaN is among them, as in sort().
        worst = scores.topk(top_t).values[-1]
        best = (~(scores < worst)).nonzero().flatten()
        read, scores = read[best], scores[best]
    # The sort is stable and `read` ascends. So among equal scores the lowest slot comes first, on all
    # processes.
    order = scores.sort(descending=True, stable=True).indices
    return read[order[:top_t]]


def check_selection(top_t: int, rule: Rule) -> None:
    """Check the options of `select_rows`.

    Raises:
        ValueError: top_t < 1 or not an int, or an unknown rule.
    """
    if isinstance(top_t, bool) or not isinstance(top_t, int) or top_t < 1:
        raise ValueError(
            f"top_t={top_t!r} must be a whole number >= 1: how many rows one step may change per layer"
        )
    if not callable(rule) and rule not in RULES:
        raise ValueError(f"rule={rule!r} must be one of {', '.join(map(repr, RULES))}, or a callable")


def read_scores(
    read: Tensor,
    counts: Tensor,
    num_slots: int,
    background: LayerBackground | None,
    rule: Rule,
    norms: Tensor | None = None,
    generator: torch.Generator | None = None,
    background_reads: Tensor | None = None,
    num_reads: Tensor | None = None,
) -> Tensor:
    """Scores [n] of the read slots. Only these are computed, because a table may have a million slots.

    Args:
        read: [n] int64 on the CPU, ascending, the slots with a count above 0.
        counts: [n] int64, their counts.
        num_slots: of the table.
        background, rule, generator: as in `select_rows`.
        norms: [n], the norm of each of these rows' gradient.
        background_reads: the sum of the background's counts, if it is known.
        num_reads: the sum of the counts over all processes, if `read` is only a part of the read slots.

    Raises:
        ValueError: something that the rule needs is missing or has the wrong size.
    """
    if rule in NEEDS_BACKGROUND and background is None:
        raise ValueError(f"rule={rule!r} needs background=; make one with calibrate or count_accesses")
    c = counts.double()
    p = c / (c.sum() if num_reads is None else num_reads.double()).clamp_min(1)
    if rule == "tfidf":
        assert background is not None
        df = background.df.cpu().index_select(0, read)
        return p * ((background.num_batches + 1) / (df + 1)).log()
    if rule == "kl":
        assert background is not None
        bg = background.counts.cpu()
        q = (bg.index_select(0, read) + 1) / (
            (bg.sum() if background_reads is None else background_reads) + len(bg)
        )
        return p * ((p + 1e-8) / (q + 1e-8)).log()
    if rule == "tf":
        return c
    if rule == "grad":
        if norms is None:
            raise ValueError("rule='grad' needs gradient_norms=, the norm of every read row's gradient")
        return norms
    if rule == "random":
        return torch.rand(num_slots, generator=generator)[read]
    assert callable(rule)
    dense = counts.new_zeros(num_slots).index_put_((read,), counts)
    scores = rule(dense, background).cpu()
    if scores.shape != dense.shape:
        raise ValueError(
            f"rule: the callable returned shape {tuple(scores.shape)}; it must return one score per slot, "
            f"{tuple(dense.shape)}"
        )
    return scores[read]


def step_reads(log: ReadLog, num_slots: int, flag: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The read slots of one memory layer. Waits for the device once.

    Several processes sum the counts of all slots, because each has read other slots.

    Args:
        log: what this process read.
        num_slots: of the table.
        flag: [1] int64 on the device of the table.

    Returns:
        The slots that were read by a token that counts, [n] int64 on the CPU, ascending; their counts, [n]
        int64 on the CPU; and whether `flag` is above 0 in any process.
    """
    by_slot = log.sorted_reads(num_slots) if num_processes() == 1 else None
    if by_slot is not None:
        bad = by_slot.fetch(flag)
        return by_slot.slots, by_slot.counts, bad
    counts = summed(torch.cat([log.counts(num_slots, flag.device), flag])).cpu()
    read = counts[:-1].nonzero().flatten()
    return read, counts[read], bool(counts[-1])


def agreed(rows: Tensor, device: torch.device) -> Tensor:
    """The rows that the first process selected. All processes select equally many, from the same counts."""
    return rows if num_processes() == 1 else of_first(rows.to(device)).cpu()
