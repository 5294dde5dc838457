"""Sparse Memory Finetuning: teach a language model something new without forgetting what it knew.

Importing the package imports peft and registers the PEFT method. The public names load on first use. In a
process of the console script (`sparsemem_cli`) the commands do both, so that `--help` is fast.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter.config import SparseMemoryConfig
    from .adapter.memories import memory_layers, quantize_rows, set_trainable
    from .artifacts import ArtifactError
    from .background.background import Background
    from .background.calibration import calibrate, count_accesses, observe
    from .background.scoping import clear_scope, set_scope
    from .data.models import load, load_base
    from .evaluation.items import read_items
    from .evaluation.likelihood import log_probs
    from .evaluation.probes import drift, exposure, multiple_choice, perplexity, recall, scope_gate
    from .evaluation.tasks import evaluate
    from .layer.memory import ProductKeyMemory
    from .optim.rows import RowAdamW, RowSGD
    from .optim.selection import select_rows
    from .patches.patch import RowPatch
    from .stream.stream import Stream
    from .study.teach import teach_documents
    from .training.finetune import finetune

__version__ = "0.1.0"

_ROOM = {
    "ArtifactError": "artifacts",
    "Background": "background.background",
    "ProductKeyMemory": "layer.memory",
    "RowAdamW": "optim.rows",
    "RowPatch": "patches.patch",
    "RowSGD": "optim.rows",
    "SparseMemoryConfig": "adapter.config",
    "Stream": "stream.stream",
    "calibrate": "background.calibration",
    "clear_scope": "background.scoping",
    "count_accesses": "background.calibration",
    "drift": "evaluation.probes",
    "evaluate": "evaluation.tasks",
    "exposure": "evaluation.probes",
    "finetune": "training.finetune",
    "load": "data.models",
    "load_base": "data.models",
    "log_probs": "evaluation.likelihood",
    "memory_layers": "adapter.memories",
    "multiple_choice": "evaluation.probes",
    "observe": "background.calibration",
    "perplexity": "evaluation.probes",
    "quantize_rows": "adapter.memories",
    "read_items": "evaluation.items",
    "recall": "evaluation.probes",
    "scope_gate": "evaluation.probes",
    "select_rows": "optim.selection",
    "set_scope": "background.scoping",
    "set_trainable": "adapter.memories",
    "teach_documents": "study.teach",
}

__all__ = [
    "ArtifactError", "Background", "ProductKeyMemory", "RowAdamW", "RowPatch", "RowSGD",
    "SparseMemoryConfig", "Stream", "calibrate", "clear_scope", "count_accesses", "drift", "evaluate",
    "exposure", "finetune", "load", "load_base", "log_probs", "memory_layers", "multiple_choice", "observe",
    "perplexity", "quantize_rows", "read_items", "recall", "scope_gate", "select_rows", "set_scope",
    "set_trainable", "teach_documents",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"module 'sparsemem' has no attribute {name!r}")
    value = getattr(import_module(f".{_ROOM[name]}", __name__), name)
    globals()[name] = value
    return value


if "sparsemem_cli" not in sys.modules:
    import_module(".adapter", __name__)
