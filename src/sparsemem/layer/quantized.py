"""Value rows in 8 or 4 bits, for inference. An unwritten row costs an index of 4 bytes.

Each written row has a scale: its largest absolute value divided by the largest code (127 or 7). A code is the
nearest whole number of scales. So an element changes by at most half a scale, and a row of zeros stays zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
