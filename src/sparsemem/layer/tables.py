"""Value tables on the CPU whose unwritten rows take no memory.

The table is an ordinary tensor [num_slots, d], and its storage is a private mapping of anonymous memory. The
operating system gives such a mapping a page when it is first written. Pages that were never written all show
one shared page of zeros, which stays in the processor's cache. So a table costs the pages of its written
rows, and reading zero rows costs no memory traffic (measured, dev/LOG.md section 18).

torch.zeros writes its zeros, and numpy.zeros asks for huge pages, of which one written row takes 2 MB.
"""

import mmap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


# The largest code, by number of bits.
LARGEST = {8: 127, 4: 7}


class QuantizedRows(nn.Module):
    """A table [num_slots, d] of which only the written rows are stored, in 8 or 4 bits.

    Args:
        values: [num_slots, d] float.
        bits: 8 or 4.

    Raises:
        ValueError: another number of bits, or an odd d with 4 bits.
    """

    place: Tensor
    codes: Tensor
    scales: Tensor

    def __init__(self, values: Tensor, bits: int = 8) -> None:
        super().__init__()
        if bits not in LARGEST:
            raise ValueError(f"bits={bits!r} must be 8 or 4")
        if bits == 4 and values.shape[1] % 2:
            raise ValueError(
                f"bits=4 needs an even row width, because two numbers share a byte; the rows have "
                f"{values.shape[1]} numbers; use bits=8"
            )
        self.bits, self.shape = bits, values.shape
        values = values.detach()
        written = values.any(1).nonzero().squeeze(1)
        # row 0 is the zero row of all unwritten slots
        rows = torch.cat([values.new_zeros(1, values.shape[1]), values[written]]).float()
        scales = rows.abs().amax(1, keepdim=True) / LARGEST[bits]
        # a row whose scale is too small for float32 becomes a row of zeros
        codes = (rows / scales.where(scales > 0, 1.0)).round()
        place = torch.zeros(len(values), dtype=torch.int32, device=values.device)
        place[written] = torch.arange(1, len(rows), dtype=torch.int32, device=values.device)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("codes", _packed(codes, bits), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def rows(self, slots: Tensor) -> Tensor:
        """The rows of slots [n] int64, [n, d] float32."""
        place = self.place[slots].long()
        return _unpacked(self.codes[place], self.bits) * self.scales[place].float()

    def read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """As `values.read_rows`: [tokens, d] float32. Has no gradient."""
        distinct, places = slots.unique(return_inverse=True)
        return F.embedding_bag(places, self.rows(distinct), per_sample_weights=weights.detach(), mode="sum")

    def num_bytes(self) -> int:
        """Bytes of the stored rows, scales and index."""
        return sum(buffer.numel() * buffer.itemsize for buffer in self.buffers())

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{name}: the value rows are quantised and can only be read; load the adapter again to "
                "train, save or patch it"
            ) from None


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers [n, d] as [n, d] int8, or as [n, d / 2] uint8: two of them, plus 8, in a byte."""
    if bits == 8:
        return codes.to(torch.int8)
    low, high = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return low | (high << 4)


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    """The whole numbers [n, d] float32 of `_packed`."""
    if bits == 8:
        return codes.float()
    return torch.stack([codes & 15, codes >> 4], 2).flatten(1).float() - 8
