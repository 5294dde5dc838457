"""Which slots one optimizer step read, and how often, over all processes."""

import torch
from torch import Tensor

from ..layer.log import ReadLog
from ..processes import num_processes, of_first, summed


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
