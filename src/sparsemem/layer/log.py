"""The log of reads: what the backward passes of a memory layer read, for the row optimizers.

A step needs the access counts and the gradients of few rows. If the table has more slots than the step has
reads, both come from one sort of the reads by slot (`SortedReads`), so no work grows with the table.
Otherwise counts of all slots cost less than the sort (measured, dev/LOG.md section 18).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import by_product, row_gradients, table_gradient

# Slots, weights, gradient of the output, and which tokens count, of one backward pass.
Entry = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass
class ReadLog:
    """What one memory layer read since the last optimizer step, with one entry per backward pass.

    The backward pass of `read_rows` adds the entries. So a micro-batch is counted once, and evaluation,
    `no_grad` and the recomputation of gradient checkpointing are never counted. If several entries need more
    memory than the gradient of the whole table, they are replaced by that gradient and the counts. So the log
    does not grow without limit if no optimizer steps.

    Attributes:
        entries: (slots, weights, grad_out, counted) of each backward pass, as in `read_rows`.
        apart: never replace entries by their sum.
        probe: a parameter whose `.grad` is set to 1, or to infinity if a gradient of the output is not
            finite. A GradScaler treats this gradient as any other, so it shows what the scaler does.
    """

    entries: list[Entry] = field(default_factory=list)
    apart: bool = False
    probe: torch.nn.Parameter | None = None
    _counts: Tensor | None = None
    _gradient: Tensor | None = None
    _sorted: "SortedReads | None" = None

    def add(
        self, slots: Tensor, weights: Tensor, grad_out: Tensor, counted: Tensor | None, num_slots: int
    ) -> None:
        self._sorted = None
        self.entries.append((slots, weights.detach(), grad_out.detach(), counted))
        if self.probe is not None:
            finite = grad_out.isfinite().all().to(self.probe.device)
            seen = torch.where(finite, 1.0, torch.inf).expand_as(self.probe)
            self.probe.grad = seen.clone() if self.probe.grad is None else self.probe.grad.maximum(seen)
        if not self.apart and len(self.entries) > 1 and self._num_held() > num_slots * grad_out.shape[1]:
            self._sum_up(num_slots)

    def sorted_reads(self, num_slots: int) -> "SortedReads | None":
        """The reads by slot. None: there are none, or the counts of all slots cost less."""
        num_reads = sum(slots.numel() for slots, *_ in self.entries)
        if self._counts is not None or not 0 < num_reads < num_slots:
            return None
        if self._sorted is None:
            self._sorted = SortedReads(self.entries, num_slots)
        return self._sorted

    def counts(self, num_slots: int, device: torch.device) -> Tensor:
        """Access counts [num_slots] int64, of the tokens that are counted."""
        total = torch.zeros(num_slots, dtype=torch.int64, device=device)
        if self._counts is not None:
            total += self._counts
        for slots, _, _, counted in self.entries:
            # not bincount: it waits for the device to find the largest id
            once = torch.ones_like(slots) if counted is None else counted[:, None].expand_as(slots).long()
            total.scatter_add_(0, slots.flatten(), once.flatten())
        return total

    def row_gradients(self, rows: Tensor, values: Tensor) -> Tensor:
        """Gradient [t, d] float32 of distinct rows of the table `values` [num_slots, d], over all entries."""
        if self._sorted is not None:
            return self._sorted.row_gradients(rows.cpu())
        rows = rows.to(values.device)
        total = torch.zeros(len(rows), values.shape[1], device=values.device)
        if len(rows) == 0:
            return total
        if self._gradient is not None:
            total += self._gradient[rows]
        for slots, weights, grad_out, _ in self.entries:
            total += row_gradients(slots, weights, grad_out, rows, len(values))
        return total

    def table_gradient(self, values: Tensor) -> Tensor:
        """Gradient of the whole table `values` [num_slots, d], over all entries, in the table's dtype."""
        return self.row_gradients(torch.arange(len(values), device=values.device), values).to(values.dtype)

    def clear(self) -> None:
        self.entries.clear()
        self._counts = self._gradient = self._sorted = None

    def _num_held(self) -> int:
        return sum(2 * slots.numel() + weights.numel() + g.numel() for slots, weights, g, _ in self.entries)

    def _sum_up(self, num_slots: int) -> None:
        counts = self.counts(num_slots, self.entries[0][0].device)
        gradient = self._gradient
        for slots, weights, grad_out, _ in self.entries:
            product = by_product(num_slots, slots.shape[1])
            more = table_gradient(slots, weights, grad_out, num_slots, product)
            gradient = more if gradient is None else gradient + more
        self.entries.clear()
        self._counts, self._gradient = counts, gradient

    def __reduce__(self):
        # a copied model has no optimizer, so its memory gets no log
        return type(None), ()


class SortedReads:
    """Reads in the order of their slots.

    Only `fetch` waits for the device. Attributes, once it was called:
        slots: [n] int64 on the CPU, ascending: the slots that were read by a token that counts.
        counts: [n] int64 on the CPU: how often.
    """

    def __init__(self, entries: list[Entry], num_slots: int) -> None:
        self._entries = entries
        # A key is twice its slot, plus 1 if the read counts. Half as wide keys are sorted twice as fast.
        dtype = torch.int32 if num_slots < 2**30 else torch.int64
        keys = []
        for slots, _, _, counted in entries:
            key = slots.to(dtype) * 2
            keys.append((key + (1 if counted is None else counted[:, None].to(dtype))).flatten())
        self._keys, self._order = torch.cat(keys).sort(stable=True)

    def fetch(self, flag: Tensor) -> bool:
        """Get slots and counts, and the value of `flag` [1] from the same device."""
        keys = torch.cat([self._keys, flag.to(self._keys.dtype)]).cpu()
        self._keys = keys[:-1]
        all_count = all(counted is None for *_, counted in self._entries)
        counting = self._keys if all_count else self._keys[(self._keys & 1).bool()]
        slots, self.counts = counting.unique_consecutive(return_counts=True)
        self.slots = (slots >> 1).long()
        return bool(keys[-1])

    def row_gradients(self, rows: Tensor) -> Tensor:
        """Gradient [t, d] float32 of the rows [t] int64 on the CPU. `fetch` was called before."""
        entries = self._entries
        weights = _joined([weights for _, weights, _, _ in entries])
        grad_out = _joined([grad_out for _, _, grad_out, _ in entries])
        # where the reads of each row start and end
        starts, ends = (torch.searchsorted(self._keys, (rows * 2 + more).to(self._keys)) for more in (0, 2))
        bags = torch.cat([starts.new_zeros(1), (ends - starts).cumsum(0)])
        places = torch.arange(int(bags[-1])) + (starts - bags[:-1]).repeat_interleave(ends - starts)
        reads = self._order.index_select(0, places.to(self._order.device))
        return F.embedding_bag(
            reads // weights.shape[1],
            grad_out,
            bags.to(grad_out.device),
            per_sample_weights=weights.flatten().index_select(0, reads),
            mode="sum",
            include_last_offset=True,
        )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
