"""Sparse Memory Finetuning: teach a language model something new without forgetting what it knew.

Importing the package imports peft and registers the PEFT method; the other names load on first use. Only a
process of the console script (`sparsemem_cli`) leaves both to the command, so that `--help` does not wait.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter.config import SparseMemoryConfig
    from .adapter.model import memory_layers, set_trainable
    from .background.background import Background
    from .background.calibration import calibrate, observe
    from .background.counting import count_accesses
    from .background.scoping import clear_scope, set_scope
    from .evaluation.probes import exposure, scope_gate
    from .files import ArtifactError
    from .layer.memory import ProductKeyMemory
    from .optim.rows import RowAdamW, RowSGD
    from .optim.selection import select_rows
    from .patches.patch import RowPatch
    from .training.finetune import finetune
    from .training.stream import Stream

__version__ = "0.1.0"

_ROOM = {
    "ArtifactError": "files",
    "Background": "background.background",
    "ProductKeyMemory": "layer.memory",
    "RowAdamW": "optim.rows",
    "RowPatch": "patches.patch",
    "RowSGD": "optim.rows",
    "SparseMemoryConfig": "adapter.config",
    "Stream": "training.stream",
    "calibrate": "background.calibration",
    "clear_scope": "background.scoping",
    "count_accesses": "background.counting",
    "exposure": "evaluation.probes",
    "finetune": "training.finetune",
    "memory_layers": "adapter.model",
    "observe": "background.calibration",
    "scope_gate": "evaluation.probes",
    "select_rows": "optim.selection",
    "set_scope": "background.scoping",
    "set_trainable": "adapter.model",
}

__all__ = [
    "ArtifactError", "Background", "ProductKeyMemory", "RowAdamW", "RowPatch", "RowSGD", "SparseMemoryConfig",
    "Stream", "calibrate", "clear_scope", "count_accesses", "exposure", "finetune", "memory_layers",
    "observe", "scope_gate", "select_rows", "set_scope", "set_trainable",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"module 'sparsemem' has no attribute {name!r}")
    value = getattr(import_module(f".{_ROOM[name]}", __name__), name)
    globals()[name] = value
    return value


if "sparsemem_cli" not in sys.modules:
    import_module(".adapter.registration", __name__)
