"""Sparse Memory Finetuning: teach a language model something new without forgetting what it knew.

The names load on first use, so that `sparsemem --help` does not wait for torch. The PEFT method registers
itself as soon as both this package and peft are imported, in whichever order.
"""

import sys
from importlib import import_module, util
from importlib.abc import MetaPathFinder
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


class _RegisterAfterPeft(MetaPathFinder):
    """Steps in once, when peft is imported, and imports our tuner right behind it."""

    def find_spec(self, fullname, path, target=None):
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec("peft")
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            import_module(".tuner", __name__)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    import_module(".tuner", __name__)
else:
    sys.meta_path.insert(0, _RegisterAfterPeft())
