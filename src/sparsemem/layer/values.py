"""Reading the value table: the weighted sum of rows and its gradients.

`read_rows` gives the same values and gradients as `naive_read_rows`. With a `ReadLog`, the backward pass does
not write `values.grad`. It stores the reads and the gradient of the output in the log (`log`).
`ReadLog.row_gradients` then computes the gradient of only those rows that an optimizer asks for.

Choices: rows are not gathered to a [tokens, reads, d] tensor, and nothing waits for the device. The only
exception is a bfloat16 table with few reads, whose rows are gathered in chunks. The read is PyTorch's
`embedding_bag`. Gradients come from one matrix product if each token reads at least 1 / _PRODUCT of all
slots. Else the gradient of rows is an `embedding_bag` too: reads are sorted by row, and each row sums the
output gradients of its reads. The gradient of weights is a sampled matrix product on CPUs, and the backward
pass of `embedding_bag` elsewhere (measured, dev/LOG.md sections 13 and 17).
"""

import logging
import warnings
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

# Gradients are computed by a matrix product if num_slots / reads is at most this.
_PRODUCT = 4
# Maximum number of elements in the temporary tensor of such a product: 16 MB of float32.
_SPREAD = 2**22
# Maximum number of rows of a bfloat16 table that are gathered at once.
_CHUNK = 16_384


def naive_read_rows(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The slow version of `read_rows` in plain PyTorch: [tokens, d] float32."""
    return (values[slots].float() * weights[..., None]).sum(1)


def read_rows(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    log: "ReadLog | None" = None,
    counted: Tensor | None = None,
    reached: bool = False,
) -> Tensor:
    """The weighted sum of the value rows that each token reads.

    Args:
        values: the table [num_slots, d], float32 or bfloat16.
        slots: [tokens, reads] int64, reads = heads * top_k.
        weights: [tokens, reads] float32.
        log: where the backward pass stores the reads. None: `values.grad` gets the dense gradient, as usual.
        counted: [tokens] bool, False for tokens whose reads are not counted (padding). None: all are counted.
        reached: if True, ignore `counted` and count the tokens whose output gradient is not all zero.

    Returns:
        [tokens, d] float32.
    """
    if not torch.is_grad_enabled():
        return _read(values, slots, weights)
    return _ReadRows.apply(values, slots, weights, log, counted, reached)  # type: ignore[return-value]


class _ReadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, slots, weights, log, counted, reached):
        ctx.save_for_backward(values, slots, weights)
        ctx.log, ctx.counted, ctx.reached = log, counted, reached
        return _read(values, slots, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        (grad_out,) = grad_outputs
        values, slots, weights = ctx.saved_tensors
        grad_values = grad_weights = None
        if ctx.needs_input_grad[2]:
            grad_weights = weight_gradients(values, slots, grad_out)
        if ctx.needs_input_grad[0]:
            if ctx.log is not None:
                counted = grad_out.any(1) if ctx.reached else ctx.counted
                ctx.log.add(slots, weights, grad_out, counted, len(values))
            else:
                # where addresses train too, as in the dense retrofit, dense gradients are what is wanted
                if not ctx.needs_input_grad[2] and not torch.compiler.is_compiling():
                    say_dense()
                product = by_product(len(values), slots.shape[1])
                grad_values = table_gradient(slots, weights, grad_out, len(values), product)
                grad_values = grad_values.to(values.dtype)
        return grad_values, None, grad_weights, None, None, None


@cache
def say_dense() -> None:
    logger.warning(
        "the value rows get a dense gradient: the optimizer changes every row that is read, and by momentum "
        "and weight decay others too; to change only selected rows use RowAdamW, in Trainer "
        "optimizers=(RowAdamW(model, lr=...), None)"
    )


def _read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    # embedding_bag needs weights in the table's dtype, but rows are summed in float32
    if values.dtype != torch.float32:
        # casting the table once costs less than casting each read row, unless there are few reads
        if len(values) > slots.numel():
            step = max(1, _CHUNK // slots.shape[1])
            parts = zip(slots.split(step), weights.split(step), strict=True)
            return torch.cat([naive_read_rows(values, s, w) for s, w in parts])
        values = values.float()
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")


def weight_gradients(values: Tensor, slots: Tensor, grad_out: Tensor) -> Tensor:
    """Gradient [tokens, reads] of the weights: the dot product of each read row with grad_out [tokens, d]."""
    values = values.float()
    if by_product(len(values), slots.shape[1]):
        step = max(1, _SPREAD // len(values))
        parts = zip(slots.split(step), grad_out.split(step), strict=True)
        return torch.cat([(g @ values.T).gather(1, s) for s, g in parts])
    if values.is_cpu:
        return _sampled_product(values, slots, grad_out)
    with torch.enable_grad():
        weights = grad_out.new_zeros(slots.shape, requires_grad=True)
        out = F.embedding_bag(slots, values.detach(), per_sample_weights=weights, mode="sum")
        return torch.autograd.grad(out, weights, grad_out)[0]


def _sampled_product(values: Tensor, slots: Tensor, grad_out: Tensor) -> Tensor:
    """The entries at `slots` of grad_out @ values.T: the kernel of sparse matrices in CSR form."""
    starts = torch.arange(0, slots.numel() + 1, slots.shape[1])
    entries = (starts, slots.flatten(), grad_out.new_zeros(slots.numel()))
    at = torch.sparse_csr_tensor(*entries, (len(slots), len(values)), check_invariants=False)
    return torch.sparse.sampled_addmm(at, grad_out, values.T, beta=0.0).values().view_as(slots)


def row_gradients(slots: Tensor, weights: Tensor, grad_out: Tensor, rows: Tensor, num_slots: int) -> Tensor:
    """Gradient of the given rows only.

    Args:
        slots, weights: [tokens, reads], as in `read_rows`.
        grad_out: [tokens, d] float32.
        rows: [t] int64, no duplicates.
        num_slots: of the table.

    Returns:
        [t, d] float32.
    """
    place = rows.new_full((num_slots,), len(rows), dtype=torch.int32)
    place[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    return table_gradient(place[slots], weights, grad_out, len(rows), by_product(num_slots, slots.shape[1]))


def by_product(num_slots: int, reads: int) -> bool:
    return num_slots <= _PRODUCT * reads


def table_gradient(slots: Tensor, weights: Tensor, grad_out: Tensor, num_rows: int, product: bool) -> Tensor:
    """Gradient [num_rows, d] float32 of a table. Reads of slot `num_rows` belong to no row of it."""
    if product:
        # one extra row collects the reads of no row
        gradient = grad_out.new_zeros(num_rows + 1, grad_out.shape[1])
        step = max(1, _SPREAD // len(gradient))
        for s, w, g in zip(slots.split(step), weights.split(step), grad_out.split(step), strict=True):
            spread = w.new_zeros(len(s), len(gradient)).scatter_add_(1, s.long(), w)
            gradient.addmm_(spread.T, g)
        return gradient[:-1]
    place, reads = slots.flatten(), slots.shape[1]
    order = None
    if place.is_cpu:
        # on another device this would wait for it
        order = (place < num_rows).nonzero().squeeze(1)
        place = place[order]
    place, within = place.sort(stable=True)
    order = within if order is None else order[within]
    starts = torch.searchsorted(place, torch.arange(num_rows + 1, dtype=place.dtype, device=place.device))
    return F.embedding_bag(
        order // reads,
        grad_out,
        starts,
        per_sample_weights=weights.flatten()[order],
        mode="sum",
        include_last_offset=True,
    )


# Making the first CSR tensor of a process warns that they are new.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _sampled_product(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))


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
