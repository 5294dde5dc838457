"""Which optimizer has the rows of a memory: the row optimizer that was made last, until it lets go.

Another kind of optimizer that steps on a table takes it: the table's gradient is an ordinary one again.
"""

import logging
import weakref
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..layer.memory import ProductKeyMemory
from ..layer.values import ReadLog

if TYPE_CHECKING:
    from .row_optimizer import RowOptimizer

logger = logging.getLogger(__name__)


# Those that may hold tables, and whether other optimizers are watched for taking these.
_row_optimizers: "weakref.WeakSet[RowOptimizer]" = weakref.WeakSet()
_watching: list[Any] = []


def take_rows(optimizer: "RowOptimizer") -> None:
    """The rows of its layers are the optimizer's: reads go to its logs until it is gone or lets go."""
    for name, memory in optimizer.layers.items():
        log = memory.log = optimizer.read_logs[name]
        weakref.finalize(optimizer, let_go, weakref.ref(memory), log)
    _row_optimizers.add(optimizer)
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_hand_over))


def _hand_over(optimizer: Optimizer, _args: tuple, _kwargs: dict) -> None:
    """Before another optimizer's step on a table: the table's gradient is where that one looks for it."""
    if not _row_optimizers or optimizer in _row_optimizers:
        return
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for rows in list(_row_optimizers):
        for name, memory in rows.layers.items():
            log = rows.read_logs[name]
            if id(memory.values) in wanted and memory.log is log:
                logger.warning(
                    "%s steps on the rows of %s, which belonged to a %s; from now on they are its alone",
                    type(optimizer).__name__, name, type(rows).__name__,
                )  # fmt: skip
                memory.values.grad = log.table_gradient(memory.values.detach())
                let_go(weakref.ref(memory), log)


def let_go(memory: "weakref.ref[ProductKeyMemory]", log: ReadLog) -> None:
    """A memory whose log has nobody to read it any more keeps none."""
    log.clear()
    layer = memory()
    if layer is not None and layer.log is log:
        layer.log = None
