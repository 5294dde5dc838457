"""Sparse Memory Finetuning: teach a language model something new without forgetting what it knew.

Importing the package imports peft and registers the PEFT method; the other names load on first use. Only a
process of the console script (`sparsemem_cli`) leaves both to the command, so that `--help` does not wait.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .access import Background, count_accesses
    from .calibration import calibrate, observe
    from .config import SparseMemoryConfig
    from .files import ArtifactError
    from .memory import ProductKeyMemory
    from .optim import RowAdamW, RowSGD
    from .patch import RowPatch
    from .probes import exposure, scope_gate
    from .scoping import clear_scope, set_scope
    from .selection import select_rows
    from .train import finetune
    from .tuner import memory_layers, set_trainable

__version__ = "0.1.0"

_ROOM = {
    "ArtifactError": "files",
    "Background": "access",
    "ProductKeyMemory": "memory",
    "RowAdamW": "optim",
    "RowPatch": "patch",
    "RowSGD": "optim",
    "SparseMemoryConfig": "config",
    "calibrate": "calibration",
    "clear_scope": "scoping",
    "count_accesses": "access",
    "exposure": "probes",
    "finetune": "train",
    "memory_layers": "tuner",
    "observe": "calibration",
    "scope_gate": "probes",
    "select_rows": "selection",
    "set_scope": "scoping",
    "set_trainable": "tuner",
}

__all__ = [
    "ArtifactError", "Background", "ProductKeyMemory", "RowAdamW", "RowPatch", "RowSGD", "SparseMemoryConfig",
    "calibrate", "clear_scope", "count_accesses", "exposure", "finetune", "memory_layers", "observe",
    "scope_gate", "select_rows", "set_scope", "set_trainable",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"module 'sparsemem' has no attribute {name!r}")
    value = getattr(import_module(f".{_ROOM[name]}", __name__), name)
    globals()[name] = value
    return value


if "sparsemem_cli" not in sys.modules:
    import_module(".tuner", __name__)
