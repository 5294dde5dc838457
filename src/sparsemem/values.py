"""Reading the value table: the weighted sum of rows, its gradients, and the log that optimizers select from.

`read_rows` equals `naive_read_rows` in value and in all gradients. With a `ReadLog`, the backward pass leaves
the table's gradient in the log instead of `values.grad`: the reads and the output's gradient are kept, and
the rows that an optimizer selects get theirs in `ReadLog.row_gradients`. No gradient of the size of the table
is ever made.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows gathered at once: bounds the temporary at this many rows of width d.
_CHUNK = 16_384
# A matrix product moves a number so many times faster than a gather of rows does (measured, dev/LOG.md
# section 13): a token's weights are spread over the rows where these are at most that many per read.
_DENSE_READ, _DENSE_GRADIENT = 4, 64
# Numbers of spread weights at once: bounds that temporary at 16 MB.
_SPREAD = 2**22


def naive_read_rows(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The twin of `read_rows` in plain PyTorch: [tokens, d] in float32."""
    return (values[slots].float() * weights[..., None]).sum(1)


def read_rows(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    log: "ReadLog | None" = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Sum of value rows, weighted.

    Args:
        values: the table [num_slots, d], float32 or bfloat16.
        slots: [tokens, reads] int64, reads = heads * top_k.
        weights: [tokens, reads] float32.
        log: where the backward pass leaves the reads; None: `values.grad` is the dense gradient, as usual.
        counted: [tokens] bool, False for tokens whose reads do not count (padding); None: all count.

    Returns:
        [tokens, d] float32.
    """
    return _ReadRows.apply(values, slots, weights, log, counted)  # type: ignore[return-value]


class _ReadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, slots, weights, log, counted):
        ctx.save_for_backward(values, slots, weights)
        ctx.log, ctx.counted = log, counted
        if len(values) <= _DENSE_READ * slots.shape[1]:
            step = max(1, _SPREAD // len(values))
            parts = zip(slots.split(step), weights.split(step), strict=True)
            return torch.cat([_spread(s, w, len(values)) @ values.float() for s, w in parts])
        # embedding_bag wants weights in the table's dtype; the twin sums bfloat16 rows in float32.
        if values.dtype == torch.float32:
            return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")
        return torch.cat([naive_read_rows(values, s, w) for s, w in _chunks(slots, weights)])

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad_out,) = grad_outputs
        values, slots, weights = ctx.saved_tensors
        grad_values = grad_weights = None
        if ctx.needs_input_grad[2]:
            grad_weights = torch.cat(
                [torch.einsum("trd,td->tr", values[s].float(), g) for s, g in _chunks(slots, grad_out)]
            )
        if ctx.needs_input_grad[0]:
            if ctx.log is not None:
                ctx.log.add(slots, weights, grad_out, ctx.counted)
            else:
                grad_values = values.new_zeros(values.shape, dtype=torch.float32)
                rows = slots.unique()
                grad_values[rows] = row_gradients(slots, weights, grad_out, rows, len(values))
                grad_values = grad_values.to(values.dtype)
        return grad_values, None, grad_weights, None, None


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
    gradient = grad_out.new_zeros(len(rows), grad_out.shape[1])
    place = rows.new_full((num_slots,), len(rows))
    place[rows] = torch.arange(len(rows), device=rows.device)
    if len(rows) <= _DENSE_GRADIENT * slots.shape[1]:
        # one column more, for the reads of all other rows
        step = max(1, _SPREAD // (len(rows) + 1))
        for s, w, g in zip(slots.split(step), weights.split(step), grad_out.split(step), strict=True):
            gradient += _spread(place[s], w, len(rows) + 1)[:, :-1].T @ g
        return gradient
    position = place[slots]
    token, read = (position < len(rows)).nonzero(as_tuple=True)
    for t, r in zip(token.split(_CHUNK), read.split(_CHUNK), strict=True):
        gradient.index_add_(0, position[t, r], weights[t, r, None] * grad_out[t])
    return gradient


def _spread(slots: Tensor, weights: Tensor, num_slots: int) -> Tensor:
    """[tokens, num_slots]: each slot's weight, summed over the reads of it."""
    return weights.new_zeros(len(slots), num_slots).scatter_add_(1, slots, weights)


def _chunks(slots: Tensor, other: Tensor):
    step = max(1, _CHUNK // max(1, slots.shape[1]))
    return zip(slots.split(step), other.split(step), strict=True)


@dataclass
class ReadLog:
    """What one memory layer read since the last optimizer step, one entry per backward pass.

    Filled by the backward pass of `read_rows`, so evaluation, `no_grad` and the recomputation of gradient
    checkpointing never count, and a micro-batch counts once.
    """

    entries: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def add(self, slots: Tensor, weights: Tensor, grad_out: Tensor, counted: Tensor | None) -> None:
        self.entries.append((slots, weights.detach(), grad_out.detach(), counted))

    def counts(self, num_slots: int, device: torch.device) -> Tensor:
        """Access counts [num_slots] int64 of the tokens that count."""
        total = torch.zeros(num_slots, dtype=torch.int64, device=device)
        for slots, _, _, counted in self.entries:
            total += torch.bincount(
                (slots if counted is None else slots[counted]).flatten(), minlength=num_slots
            )
        return total

    def row_gradients(self, rows: Tensor, values: Tensor) -> Tensor:
        """Summed gradient [t, d] float32 of distinct rows of the table `values` [num_slots, d]."""
        total = torch.zeros(len(rows), values.shape[1], device=rows.device)
        for slots, weights, grad_out, _ in self.entries:
            total += row_gradients(slots, weights, grad_out, rows, len(values))
        return total

    def clear(self) -> None:
        self.entries.clear()
