"""Reading the value table: the weighted sum of rows, its gradients, and the log that optimizers select from.

`read_rows` equals `naive_read_rows` in value and in all gradients. With a `ReadLog`, the backward pass leaves
the table's gradient in the log instead of `values.grad`: the reads and the output's gradient are kept, and
the rows that an optimizer asks for get theirs in `ReadLog.row_gradients`.

Choices: rows are never gathered to a [tokens, reads, d] tensor, and nothing waits for the device. Reads are
PyTorch's `embedding_bag`. Gradients are its backward pass, or one matrix product where a token reads at least
one slot in _PRODUCT (measured, dev/LOG.md section 13).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Gradients are matrix products where num_slots / reads is at most this.
_PRODUCT = 8
# Numbers of a product's temporary: 16 MB of float32.
_SPREAD = 2**22
# Rows of a bfloat16 table that are gathered at once.
_CHUNK = 16_384


def naive_read_rows(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The twin of `read_rows` in plain PyTorch: [tokens, d] in float32."""
    return (values[slots].float() * weights[..., None]).sum(1)


def read_rows(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    log: "ReadLog | None" = None,
    counted: Tensor | None = None,
    reached: bool = False,
) -> Tensor:
    """Sum of value rows, weighted.

    Args:
        values: the table [num_slots, d], float32 or bfloat16.
        slots: [tokens, reads] int64, reads = heads * top_k.
        weights: [tokens, reads] float32.
        log: where the backward pass leaves the reads; None: `values.grad` is the dense gradient, as usual.
        counted: [tokens] bool, False for tokens whose reads do not count (padding); None: all count.
        reached: count the tokens alone whose gradient is not all zero, instead of `counted`.

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
                product = _by_product(len(values), slots.shape[1])
                grad_values = _table_gradient(slots, weights, grad_out, len(values), product)
                grad_values = grad_values.to(values.dtype)
        return grad_values, None, grad_weights, None, None, None


def _read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    # embedding_bag wants weights in the table's dtype, and rows are summed in float32
    if values.dtype != torch.float32:
        # one cast of the table costs less than one of each read, unless few tokens are read
        if len(values) > slots.numel():
            step = max(1, _CHUNK // slots.shape[1])
            parts = zip(slots.split(step), weights.split(step), strict=True)
            return torch.cat([naive_read_rows(values, s, w) for s, w in parts])
        values = values.float()
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")


def weight_gradients(values: Tensor, slots: Tensor, grad_out: Tensor) -> Tensor:
    """Gradient [tokens, reads] of the weights: each read row's product with grad_out [tokens, d]."""
    values = values.float()
    if _by_product(len(values), slots.shape[1]):
        step = max(1, _SPREAD // len(values))
        parts = zip(slots.split(step), grad_out.split(step), strict=True)
        return torch.cat([(g @ values.T).gather(1, s) for s, g in parts])
    with torch.enable_grad():
        weights = grad_out.new_zeros(slots.shape, requires_grad=True)
        out = F.embedding_bag(slots, values.detach(), per_sample_weights=weights, mode="sum")
        return torch.autograd.grad(out, weights, grad_out)[0]


def row_gradients(slots: Tensor, weights: Tensor, grad_out: Tensor, rows: Tensor, num_slots: int) -> Tensor:
    """Gradient of the given rows alone.

    Args:
        slots, weights: [tokens, reads] as read.
        grad_out: [tokens, d] float32.
        rows: [t] int64, no duplicates.
        num_slots: of the table.

    Returns:
        [t, d] float32.
    """
    place = rows.new_full((num_slots,), len(rows))
    place[rows] = torch.arange(len(rows), device=rows.device)
    # one row more, for the reads of all other rows
    product = _by_product(num_slots, slots.shape[1])
    return _table_gradient(place[slots], weights, grad_out, len(rows) + 1, product, others=len(rows))[:-1]


def _by_product(num_slots: int, reads: int) -> bool:
    return num_slots <= _PRODUCT * reads


def _table_gradient(
    slots: Tensor,
    weights: Tensor,
    grad_out: Tensor,
    num_rows: int,
    product: bool,
    others: int | None = None,
) -> Tensor:
    """Gradient [num_rows, d] float32 of a table; that of row `others` is not looked at."""
    gradient = grad_out.new_zeros(num_rows, grad_out.shape[1])
    if product:
        step = max(1, _SPREAD // num_rows)
        for s, w, g in zip(slots.split(step), weights.split(step), grad_out.split(step), strict=True):
            spread = w.new_zeros(len(s), num_rows).scatter_add_(1, s, w)
            gradient.addmm_(spread.T, g)
        return gradient
    with torch.enable_grad():
        table = gradient.requires_grad_()
        out = F.embedding_bag(slots, table, per_sample_weights=weights, mode="sum", padding_idx=others)
        return torch.autograd.grad(out, table, grad_out)[0]


@dataclass
class ReadLog:
    """What one memory layer read since the last optimizer step, one entry per backward pass.

    Filled by the backward pass of `read_rows`, so evaluation, `no_grad` and the recomputation of gradient
    checkpointing never count, and a micro-batch counts once. When several entries take more room than the
    table's gradient does, they are summed to that, so that the log is bounded however long nobody steps.

    Attributes:
        entries: slots, weights, grad_out and counted, as `read_rows` and its backward pass had them.
        apart: never sum entries.
        probe: a parameter whose `.grad` is 1, or infinite where a gradient of the output is not finite; what
            a GradScaler does to gradients it does to this one.
    """

    entries: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    apart: bool = False
    probe: torch.nn.Parameter | None = None
    _counts: Tensor | None = None
    _gradient: Tensor | None = None

    def add(
        self, slots: Tensor, weights: Tensor, grad_out: Tensor, counted: Tensor | None, num_slots: int
    ) -> None:
        self.entries.append((slots, weights.detach(), grad_out.detach(), counted))
        if self.probe is not None:
            finite = grad_out.isfinite().all().to(self.probe.device)
            seen = torch.where(finite, 1.0, torch.inf).expand_as(self.probe)
            self.probe.grad = seen.clone() if self.probe.grad is None else self.probe.grad.maximum(seen)
        if not self.apart and len(self.entries) > 1 and self._num_held() > num_slots * grad_out.shape[1]:
            self._sum_up(num_slots)

    def counts(self, num_slots: int, device: torch.device) -> Tensor:
        """Access counts [num_slots] int64 of the tokens that count."""
        total = torch.zeros(num_slots, dtype=torch.int64, device=device)
        if self._counts is not None:
            total += self._counts
        for slots, _, _, counted in self.entries:
            # not bincount, which waits for the device to look at the largest id
            once = torch.ones_like(slots) if counted is None else counted[:, None].expand_as(slots).long()
            total.scatter_add_(0, slots.flatten(), once.flatten())
        return total

    def row_gradients(self, rows: Tensor, values: Tensor) -> Tensor:
        """Summed gradient [t, d] float32 of distinct rows of the table `values` [num_slots, d]."""
        total = torch.zeros(len(rows), values.shape[1], device=values.device)
        if len(rows) == 0:
            return total
        if self._gradient is not None:
            total += self._gradient[rows]
        for slots, weights, grad_out, _ in self.entries:
            total += row_gradients(slots, weights, grad_out, rows, len(values))
        return total

    def table_gradient(self, values: Tensor) -> Tensor:
        """Summed gradient of the table `values` [num_slots, d], in its dtype."""
        return self.row_gradients(torch.arange(len(values), device=values.device), values).to(values.dtype)

    def clear(self) -> None:
        self.entries.clear()
        self._counts = self._gradient = None

    def _num_held(self) -> int:
        return sum(2 * slots.numel() + weights.numel() + g.numel() for slots, weights, g, _ in self.entries)

    def _sum_up(self, num_slots: int) -> None:
        counts = self.counts(num_slots, self.entries[0][0].device)
        gradient = self._gradient
        for slots, weights, grad_out, _ in self.entries:
            product = _by_product(num_slots, slots.shape[1])
            more = _table_gradient(slots, weights, grad_out, num_slots, product)
            gradient = more if gradient is None else gradient + more
        self.entries.clear()
        self._counts, self._gradient = counts, gradient

    def __reduce__(self):
        # a copy of the model has no optimizer that would read its log
        return type(None), ()
