"""SparseMemoryConfig: what memory is added, and where."""

import enum
import math
from dataclasses import dataclass, field

from peft import PeftConfig


class SparseMemoryType(str, enum.Enum):
    """A member beside PEFT's own PeftType, which cannot be extended from outside."""

    SPARSE_MEMORY = "SPARSE_MEMORY"


MODES = ("additive", "replacement")
VALUE_GATES = ("none", "silu")
TRAINABLE = ("values", "values+scale", "memory")
INIT_WEIGHTS = (True, False, "paper")


@dataclass
class SparseMemoryConfig(PeftConfig):
    """Configuration of product-key memory layers.

    Args:
        target_modules: modules that get a memory: names, suffixes or a regular expression, as for LoRA. Any module that
            maps (..., d_in) to (..., d_out), an `nn.Linear` included. None: the MLPs of the decoder blocks.
        exclude_modules: modules that get none, as for LoRA.
        layers_to_transform: indices of the blocks; None with no target_modules: three late ones, at .8, .9 and .97 of
            the depth (23, 26, 28 of 30), where hidden states tell what is taught from what is known.
        layers_pattern: name of the list of blocks, as for LoRA.
        modules_to_save: further modules trained and saved whole, as for LoRA.
        num_keys: sub-keys per codebook; num_slots = num_keys ** 2.
        num_heads, top_k: each head reads top_k slots per token.
        key_dim: width of one head's query, both halves together.
        mode: "additive": mlp(x) + scale * y; "replacement": y.
        value_gate: "none", or "silu" (Memory+, 2412.09764).
        scale_init: initial alpha.
        trainable: "values" (the rows alone), "values+scale" (alpha too) or "memory" (keys, query and gates too).
        init_weights: True: rows zero, a no-op; "paper": the start of the dense retrofit; False: random.
        max_centres: capacity of the scope of one memory layer.
        base_fingerprint: of the base model that the memory was calibrated on; filled in by `calibrate`.

    Raises:
        ValueError: naming every bad field at once.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    num_keys: int = 32
    num_heads: int = 4
    top_k: int = 8
    key_dim: int = 64
    mode: str = "additive"
    value_gate: str = "none"
    scale_init: float = 1.0
    trainable: str = "values"
    init_weights: bool | str = True
    max_centres: int = 1024
    base_fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SparseMemoryType.SPARSE_MEMORY  # type: ignore[assignment]
        if isinstance(self.target_modules, set | tuple):
            self.target_modules = sorted(self.target_modules)
        if isinstance(self.exclude_modules, set | tuple):
            self.exclude_modules = sorted(self.exclude_modules)
        problems = self._problems()
        if problems:
            raise ValueError("SparseMemoryConfig: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        found = [
            f"{name}={getattr(self, name)!r} must be a whole number >= {least}"
            for name, least in [("num_keys", 2), ("num_heads", 1), ("top_k", 1), ("key_dim", 2), ("max_centres", 1)]
            if not _is_int(getattr(self, name)) or getattr(self, name) < least
        ]
        found += [
            f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}"
            for name, allowed in [
                ("mode", MODES),
                ("value_gate", VALUE_GATES),
                ("trainable", TRAINABLE),
                ("init_weights", INIT_WEIGHTS),
            ]
            if not any(getattr(self, name) is choice or getattr(self, name) == choice for choice in allowed)
        ]
        if not found:
            if self.top_k > self.num_keys**2:
                found.append(f"top_k={self.top_k} must be at most num_keys ** 2 = {self.num_keys**2}")
            if self.key_dim % 2:
                found.append(f"key_dim={self.key_dim} must be even: it is split into two halves")
        if not isinstance(self.scale_init, int | float) or not math.isfinite(self.scale_init):
            found.append(f"scale_init={self.scale_init!r} must be a finite number")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            found.append("layers_to_transform cannot be used when target_modules is a regular expression (a string)")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            found.append("layers_pattern needs layers_to_transform beside it")
        return found


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
