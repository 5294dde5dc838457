"""The PEFT method that adds memories to a Hugging Face model.

Importing any module of this folder registers the method with PEFT. `peft.PeftType` is an enum that cannot be
extended, so the tables of `peft.mapping` get a member of our own str enum.
"""

from typing import Any

from peft import mapping

from .config import SparseMemoryConfig, SparseMemoryType
from .model import SparseMemoryModel


def _register() -> None:
    kind: Any = SparseMemoryType.SPARSE_MEMORY
    taken = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if taken is not None and taken is not SparseMemoryConfig:
        raise ImportError(
            f"the PEFT method name {kind.value!r} is already taken by {taken.__module__}.{taken.__name__}; "
            "uninstall the other package, or import only one of the two"
        )
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = SparseMemoryConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = SparseMemoryModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = SparseMemoryModel.prefix


_register()
