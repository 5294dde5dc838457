"""SparseMemoryConfig: the settings of a memory and of the modules that get one."""

import enum
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ..artifacts import ArtifactError
from ..atomic import finish_save, read_json, write_json
from ..choices import MODES, TRAINABLE, WRITES
from .digests import verify_tensors, weights_stamp


class SparseMemoryType(str, enum.Enum):  # noqa: UP042 (PEFT parses "Type.MEMBER" from str())
    """Our PEFT type. PEFT's own enum, PeftType, cannot be extended."""

    SPARSE_MEMORY = "SPARSE_MEMORY"


VALUE_GATES = ("none", "silu")
INIT_WEIGHTS = (True, False, "paper")
_AT_LEAST = {"num_keys": 2, "num_heads": 1, "top_k": 1, "key_dim": 2}
_ONE_OF = {
    "write": WRITES,
    "query_norm": (True, False),
    "mode": MODES,
    "value_gate": VALUE_GATES,
    "trainable": TRAINABLE,
    "init_weights": INIT_WEIGHTS,
}

# The fields that `sha256` covers: all that decide how saved tensors are read. The others may be edited.
_BOUND = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "num_keys", "num_heads", "top_k", "key_dim", "query_norm", "write", "mode", "value_gate",
    "key_layers", "scope_shapes", "base_fingerprint", "digests",
)  # fmt: skip

_DAMAGED = (
    f"{CONFIG_NAME} is damaged or was changed by hand (SHA-256 differs); get an undamaged copy, or save the "
    "adapter again"
)

PAPER = {
    "task_type": "CAUSAL_LM",
    "layers_to_transform": [6, 12, 18],
    "num_keys": 128,
    "num_heads": 4,
    "top_k": 16,
    "key_dim": 256,
    "write": "own",
    "query_norm": False,
    "value_gate": "silu",
    "init_weights": "paper",
}


# Saved with every adapter: PEFT alone does not know this type, and its error says nothing of what to do.
REQUIRES = "pip install sparsemem; then `import sparsemem` before PeftModel.from_pretrained"


@dataclass
class SparseMemoryConfig(PeftConfig):
    """Configuration of product-key memory layers.

    Args:
        target_modules: modules that get a memory, given as for LoRA: names, suffixes or a regular expression.
            Any module that maps (..., d_in) to (..., d_out) is allowed, for example an `nn.Linear`. None: the
            MLPs of the decoder blocks.
        exclude_modules: modules that get no memory, as for LoRA.
        layers_to_transform: indices of the decoder blocks that get a memory. If this and target_modules are
            None: three late blocks, at .8, .9 and .97 of the depth (23, 26, 28 of 30). There, the hidden
            states of what is taught differ from those of what the base model knows.
        layers_pattern: name of the list of blocks, as for LoRA.
        modules_to_save: other modules that are trained and saved in full, as for LoRA.
        num_keys: sub-keys per codebook. num_slots = num_keys ** 2.
        num_heads, top_k: each head reads top_k slots per token.
        key_dim: width of the query of one head, both halves together.
        write: "last": a tail memory, which adds the sum of all reads to the residual stream after the last
            block. "own": each memory adds to the output of its own module (the paper).
        mode: "additive": mlp(x) + scale * y. "replacement": scale * y; only with `write="own"`.
        query_norm: scale each half of each head's query to length 1, so that only its direction decides which
            slots are read. The paper: False.
        value_gate: "none", or "silu" (Memory+, 2412.09764).
        scale_init: initial value of alpha.
        trainable: "values" (only the rows), "values+scale" (rows and alpha) or "memory" (all parameters).
        init_weights: True: rows are zero, so the memory changes nothing until it is trained. "paper": the
            start of the dense retrofit. False: random.
        key_layers: paths of the middle modules whose inputs say what is asked (`background.question_key`).
            None: the memory cannot hold facts.
        scope_shapes: by module path, the shapes of the scope's tensors. Filled in when the adapter is saved.
        base_fingerprint: fingerprint of the base model that the memory was calibrated on. Filled in by
            `calibrate`, and when the adapter is saved.
        digests: SHA-256 of the saved tensors, by name. Filled in when the adapter is saved.
        sha256: of the other fields that decide how the tensors are read. Filled in when it is saved.
        requires: what to install to load the adapter; for people who read the file.

    Raises:
        ValueError: one or more fields are wrong. The message names all of them.
        ArtifactError: `sha256` is given and differs from that of the other fields.
    """

    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    num_keys: int = 64
    num_heads: int = 16
    top_k: int = 64
    key_dim: int = 64
    query_norm: bool = True
    write: str = "last"
    mode: str = "additive"
    value_gate: str = "none"
    scale_init: float = 1.0
    trainable: str = "values"
    init_weights: bool | str = True
    key_layers: list[str] | None = None
    scope_shapes: dict[str, dict[str, list[int]]] = field(default_factory=dict, repr=False)
    base_fingerprint: str | None = field(default=None, repr=False)
    requires: str = field(default=REQUIRES, repr=False)
    digests: dict[str, str] = field(default_factory=dict, repr=False)
    sha256: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._check_digest()
        super().__post_init__()
        self.peft_type = SparseMemoryType.SPARSE_MEMORY  # type: ignore[assignment]
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.layers_to_transform, tuple | range):
            self.layers_to_transform = list(self.layers_to_transform)
        problems = self._problems()
        if problems:
            raise ValueError("SparseMemoryConfig: " + "; ".join(problems))

    def save_pretrained(
        self, save_directory: str, *, auto_mapping_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write adapter_config.json as PEFT does, but atomically and with sets in sorted order."""
        content = {key: sorted(v) if isinstance(v, set) else v for key, v in sorted(self.to_dict().items())}
        if auto_mapping_dict is not None:
            content["auto_mapping"] = auto_mapping_dict
        content["sha256"] = config_digest(content)
        write_json(Path(save_directory) / CONFIG_NAME, content)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """As PEFT's. Of a local adapter the tensors are verified too, before anything is changed.

        Raises:
            ArtifactError: the adapter is damaged.
        """
        path = Path(pretrained_model_name_or_path, subfolder or "")
        finish_save(path)
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if (
            (path / CONFIG_NAME).is_file()
            and config.digests
            and "sha256" not in read_json(path / CONFIG_NAME)
        ):
            raise ArtifactError(_DAMAGED)
        if config.digests and any(path.glob("adapter_model.*")):
            verify_tensors(path, config.digests)
            vars(config)["_verified"] = weights_stamp(path)
        return config

    @classmethod
    def paper(cls, **changes: Any) -> "SparseMemoryConfig":
        """The paper's settings (2605.03229): layers 6, 12, 18 of 24, each adding to its own MLP's output.

        Args:
            changes: fields to set to other values.
        """
        targeted = {"layers_to_transform": None} if changes.get("target_modules") is not None else {}
        return cls(**{**PAPER, **targeted, **changes})

    def _check_digest(self) -> None:
        """Compare the fields with `sha256`, once: later changes in the program are allowed."""
        expected, self.sha256 = self.sha256, None
        if expected is not None and expected != config_digest(self.to_dict()):
            raise ArtifactError(_DAMAGED)

    def _problems(self) -> list[str]:
        have = vars(self)
        found = [
            f"{name}={have[name]!r} must be a whole number >= {least}"
            for name, least in _AT_LEAST.items()
            if not _is_whole(have[name], least)
        ]
        found += [
            f"{name}={have[name]!r} must be one of {', '.join(map(repr, allowed))}"
            for name, allowed in _ONE_OF.items()
            # 1 == True, but 1 is not an allowed value.
            if not any(have[name] == one and type(have[name]) is type(one) for one in allowed)
        ]
        if not found:
            if self.top_k > self.num_keys**2:
                found.append(f"top_k={self.top_k} must be at most num_keys ** 2 = {self.num_keys**2}")
            if self.key_dim % 2:
                found.append(f"key_dim={self.key_dim} must be even: it is split into two halves")
        if self.mode == "replacement" and self.write == "last":
            found.append(
                "mode='replacement' needs write='own': a memory that adds its reads after the last block "
                "replaces no MLP"
            )
        if not isinstance(self.scale_init, int | float) or not math.isfinite(self.scale_init):
            found.append(f"scale_init={self.scale_init!r} must be a finite number")
        return found + self._layer_problems()

    def _layer_problems(self) -> list[str]:
        found, layers = [], self.layers_to_transform
        if layers is not None:
            indices = layers if isinstance(layers, list) else [layers]
            if not indices or not all(_is_whole(index, 0) for index in indices):
                found.append(
                    f"layers_to_transform={layers!r} must be one or more block indices, each 0 or greater"
                )
            if isinstance(self.target_modules, str):
                found.append("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if self.layers_pattern is not None and isinstance(self.target_modules, str):
            found.append("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern is not None and layers is None:
            found.append("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        return found


def config_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the fields in _BOUND; `content` is that of adapter_config.json, or `to_dict()`."""
    bound: dict[str, Any] = {key: content.get(key) for key in _BOUND}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(bound[key], set | list | tuple):
            bound[key] = sorted(bound[key], key=str)
    return hashlib.sha256(json.dumps(bound, sort_keys=True, default=str).encode()).hexdigest()


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
