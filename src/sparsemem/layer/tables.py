"""Value tables on the CPU whose unwritten rows take no memory.

The table is an ordinary tensor [num_slots, d], and its storage is a private mapping of anonymous memory. The
operating system gives such a mapping a page when it is first written. Pages that were never written all show
one shared page of zeros, which stays in the processor's cache. So a table costs the pages of its written
rows, and reading zero rows costs no memory traffic (measured, dev/LOG.md section 18).

torch.zeros writes its zeros, and numpy.zeros asks for huge pages, of which one written row takes 2 MB.
"""

import mmap

import torch
from torch import Tensor

# Number of elements that are looked at in one piece.
_PIECE = 2**24


def zero_table(num_slots: int, d: int) -> Tensor:
    """A table [num_slots, d] float32 of zeros. On a CPU, its unwritten rows take no memory."""
    on_cpu = torch.empty(0).is_cpu and torch.get_default_dtype() == torch.float32
    if not on_cpu or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(num_slots, d)
    return _mapped(num_slots, d, torch.float32)


def copy_table(table: Tensor) -> Tensor:
    """A copy [num_slots, d] on the CPU, bit for bit, in which rows of zero bytes take no memory."""
    table = table.detach().cpu()
    if not hasattr(mmap, "MAP_PRIVATE") or table.numel() == 0:
        return table.clone()
    copy = _mapped(table.shape[0], table.shape[1], table.dtype)
    step = max(1, _PIECE // table.shape[1])
    for there, here in zip(table.split(step), copy.split(step), strict=True):
        # bytes, so that -0.0 is copied too
        rows = there.contiguous().view(torch.uint8).any(1).nonzero().squeeze(1)
        here[rows] = there[rows]
    return copy


def _mapped(num_slots: int, d: int, dtype: torch.dtype) -> Tensor:
    size = num_slots * d * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(num_slots, d)
