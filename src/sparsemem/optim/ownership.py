"""Which optimizer updates the rows of a memory.

It is the row optimizer that was created last, until it is deleted or its `release` is called. If an optimizer
of another kind steps on a value table, the row optimizer loses the table, and the table gets an ordinary
dense `.grad` again.
"""

import logging
import weakref
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..layer.log import ReadLog
from ..layer.memory import ProductKeyMemory

if TYPE_CHECKING:
    from .row_optimizer import RowOptimizer

logger = logging.getLogger(__name__)


# All row optimizers. Each may still own tables.
_row_optimizers: "weakref.WeakSet[RowOptimizer]" = weakref.WeakSet()
# The handle of the hook on all other optimizers, once it is registered.
_watching: list[Any] = []


def take_rows(optimizer: "RowOptimizer") -> None:
    """Make the optimizer the owner of its layers' rows: their reads are recorded in its logs."""
    for name, memory in optimizer.layers.items():
        log = memory.log = optimizer.read_logs[name]
        weakref.finalize(optimizer, let_go, weakref.ref(memory), log)
    _row_optimizers.add(optimizer)
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_hand_over))


def _hand_over(optimizer: Optimizer, _args: tuple, _kwargs: dict) -> None:
    """Before an optimizer of another kind steps on a table: write the table's gradient to `.grad`."""
    if not _row_optimizers or optimizer in _row_optimizers:
        return
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for rows in list(_row_optimizers):
        for name, memory in rows.layers.items():
            log = rows.read_logs[name]
            if id(memory.values) in wanted and memory.log is log:
                logger.warning(
                    "%s steps on the rows of %s, which belonged to a %s; now only the %s updates them",
                    type(optimizer).__name__, name, type(rows).__name__, type(optimizer).__name__,
                )  # fmt: skip
                memory.values.grad = log.table_gradient(memory.values.detach())
                let_go(weakref.ref(memory), log)


def let_go(memory: "weakref.ref[ProductKeyMemory]", log: ReadLog) -> None:
    """Empty a log that no optimizer reads any more, and remove it from the memory if it is still there."""
    log.clear()
    layer = memory()
    if layer is not None and layer.log is log:
        layer.log = None
