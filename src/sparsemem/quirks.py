"""What the authors' release of 2605.03229 does otherwise than its text says, as switches of one optimizer.

| quirk         | what it does                                                                              |
| ------------- | ----------------------------------------------------------------------------------------- |
| "micro-batch" | each micro-batch selects its own top_t rows; a step moves the rows of all of them         |
| "padding"     | padding tokens count as reads                                                             |
| "moments"     | gradients are masked but not AdamW's moments: rows once selected move at every later step |

They break laws 2 and 5 on purpose, to compare with the paper's figures; nothing else uses them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .memory import ProductKeyMemory
from .optim import RowAdamW

QUIRKS = ("micro-batch", "padding", "moments")


class ReleaseAdamW(RowAdamW):
    """RowAdamW with quirks of the authors' release.

    Args:
        model, lr, options: as `RowAdamW`.
        quirks: of QUIRKS.

    Raises:
        ValueError: an unknown quirk, or as `RowAdamW`.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1e-3, *, quirks: Sequence[str] = QUIRKS, **options: Any
    ) -> None:
        unknown = [quirk for quirk in quirks if quirk not in QUIRKS]
        if unknown:
            raise ValueError(f"quirks={list(quirks)} must be of {', '.join(map(repr, QUIRKS))}")
        self.quirks = frozenset(quirks)
        super().__init__(model, lr, **options)

    def _select(self, name: str, memory: ProductKeyMemory) -> Tensor:
        assert memory.log is not None
        if "padding" in self.quirks:
            memory.log.entries = [(*entry[:3], None) for entry in memory.log.entries]
        if "micro-batch" not in self.quirks:
            return super()._select(name, memory)
        whole, rows = memory.log.entries, []
        for entry in whole:
            memory.log.entries = [entry]
            rows.append(super()._select(name, memory))
        memory.log.entries = whole
        self._selections = {**getattr(self, "_selections", {}), name: rows}
        return torch.cat(rows).unique() if rows else torch.zeros(0, dtype=torch.int64)

    def _gradient(self, name: str, memory: ProductKeyMemory, rows: Tensor) -> Tensor:
        assert memory.log is not None
        if "micro-batch" not in self.quirks:
            return super()._gradient(name, memory, rows)
        whole, total = memory.log.entries, torch.zeros(len(rows), memory.d_out, device=rows.device)
        for entry, chosen in zip(whole, self._selections[name], strict=True):
            memory.log.entries = [entry]
            total[torch.searchsorted(rows, chosen)] += super()._gradient(name, memory, chosen)
        memory.log.entries = whole
        return total

    def _update(self, table: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if "moments" in self.quirks:
            state, _ = self._rows_of(table, rows, self._shapes(table, group))
            # one dense AdamW counts the steps of all rows alike
            state["steps"].fill_(state["steps"].max())
            ever = state["slots"]
            masked = gradient.new_zeros(len(ever), gradient.shape[1])
            masked[torch.searchsorted(ever, rows)] = gradient
            rows, gradient = ever, masked
        super()._update(table, rows, gradient, group)
