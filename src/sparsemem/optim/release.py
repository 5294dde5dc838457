"""The differences between the authors' code for 2605.03229 and their paper, as options of one optimizer.

| quirk         | what it does                                                                              |
| ------------- | ----------------------------------------------------------------------------------------- |
| "micro-batch" | each micro-batch selects its own top_t rows; a step changes all of these rows             |
| "padding"     | padding tokens count as reads                                                             |
| "moments"     | gradients are masked but AdamW's moments are not: a row changes in every step after it    |
|               | was selected once                                                                         |

They break laws 2 and 5 on purpose, to compare results with those of the paper. Nothing else uses them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layer.memory import ProductKeyMemory
from ..layer.values import ReadLog
from .rows import RowAdamW, rows_of

QUIRKS = ("micro-batch", "padding", "moments")


class ReleaseAdamW(RowAdamW):
    """RowAdamW that behaves like the authors' code in some ways.

    Args:
        model, lr, options: as for `RowAdamW`.
        quirks: names from QUIRKS, see the table above.

    Raises:
        ValueError: an unknown quirk, or any error of `RowAdamW`.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1e-3, *, quirks: Sequence[str] = QUIRKS, **options: Any
    ) -> None:
        unknown = [quirk for quirk in quirks if quirk not in QUIRKS]
        if unknown:
            raise ValueError(f"quirks={list(quirks)} may only contain {', '.join(map(repr, QUIRKS))}")
        self.quirks = frozenset(quirks)
        self._apart = bool(self.quirks & {"micro-batch", "padding"})
        super().__init__(model, lr, **options)

    def _choose(self, name: str, memory: ProductKeyMemory, log: ReadLog) -> tuple[Tensor, Tensor]:
        if "padding" in self.quirks:
            log = ReadLog([(*entry[:3], None) for entry in log.entries])
        if "micro-batch" not in self.quirks:
            return super()._choose(name, memory, log)
        parts = [super(ReleaseAdamW, self)._choose(name, memory, ReadLog([entry])) for entry in log.entries]
        rows = torch.cat([rows for rows, _ in parts] or [torch.zeros(0, dtype=torch.int64)]).unique()
        total = torch.zeros(len(rows), memory.d_out, device=memory.values.device)
        for chosen, gradient in parts:
            total[torch.searchsorted(rows, chosen).to(total.device)] += gradient
        return rows, total

    def _update(self, table: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if "moments" in self.quirks:
            state, _ = rows_of(self.state[table], table, rows, self._shapes(table, group))
            # a dense AdamW has one step count for all rows
            state["steps"].fill_(state["steps"].max())
            ever = state["slots"]
            masked = gradient.new_zeros(len(ever), gradient.shape[1])
            masked[torch.searchsorted(ever, rows).to(masked.device)] = gradient
            rows, gradient = ever, masked
        super()._update(table, rows, gradient, group)
