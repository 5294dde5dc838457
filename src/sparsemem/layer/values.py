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

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from .log import ReadLog

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
                product = by_product(len(values), slots.shape[1])
                grad_values = table_gradient(slots, weights, grad_out, len(values), product)
                grad_values = grad_values.to(values.dtype)
        return grad_values, None, grad_weights, None, None, None


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
