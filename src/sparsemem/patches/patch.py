"""RowPatch: what one finetuning run did to the memory, as a file that can be applied and taken back.

Per memory layer: the slots that changed with their rows before and after, and the scope that the run added;
and whole, before and after, whatever else of the adapter changed (alpha, keys, `modules_to_save`).
Applying checks everything first, base, addressing and the present bytes of all that it will change, so that a
refused patch changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.model import memory_layers
from ..files import ArtifactError, fingerprint_base, load_artifact, save_artifact
from .layers import (
    LayerPatch,
    checked_scope,
    diff_layer,
    is_after,
    packed_layer,
    unpacked_layer,
    write_layer,
)
from .sources import read_adapter
from .tensors import (
    TensorPatch,
    addressing_before,
    are_after,
    check_tensors,
    diff_tensors,
    other_tensors,
    packed,
    unpacked,
    write_tensors,
)

KIND = "row patch"


@dataclass
class RowPatch:
    """Everything that one run changed; see `diff`, `save`, `load`, `apply`, `revert`.

    Attributes:
        layers: by `memory_layers` name.
        base: fingerprint of the base model.
        info: provenance: whatever the maker of the patch wants to say, JSON.
        tensors: other tensors of the adapter that changed, by name, whole.
    """

    layers: dict[str, LayerPatch]
    base: str
    info: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorPatch] = field(default_factory=dict)

    @staticmethod
    @torch.no_grad()
    def snapshot(model: nn.Module) -> dict[str, Tensor]:
        """Copies of the active adapter's tensors, to be passed as `since=` to `diff` later."""
        held = {
            f"{name}.{key}": tensor
            for name, memory in memory_layers(model).items()
            for key, tensor in memory.state_dict().items()
            if key == "values" or key.startswith("scope_")
        }
        return {name: t.detach().cpu().clone() for name, t in (held | other_tensors(model)).items()}

    @classmethod
    @torch.no_grad()
    def diff(
        cls, model: nn.Module, since: Mapping[str, Tensor] | str | Path, *, info: dict[str, Any] | None = None
    ) -> "RowPatch":
        """What changed in the active adapter: rows, scopes, and other tensors whole.

        Args:
            model: as it is now.
            since: as it was: a `snapshot`, a dict of value tables by `memory_layers` name, an adapter's state
                dict, or the folder of a saved adapter. Where it holds no scope, there was none. A tensor that
                does not train may be missing, and then counts as unchanged.
            info: provenance to keep in the patch.

        Raises:
            ValueError: `since` lacks a layer or a tensor that trains, or has another shape, or the scope was
                replaced, not extended.
        """
        before = read_adapter(Path(since)) if isinstance(since, str | Path) else since
        tensors = diff_tensors(model, before)
        layers = {
            name: diff_layer(name, memory, before, addressing_before(name, memory, tensors))
            for name, memory in memory_layers(model).items()
        }
        return cls(layers, fingerprint_base(model), dict(info or {}), tensors)

    def save(self, path: str | Path) -> None:
        """One safetensors file, written atomically; rows before are left out where all of them are zero."""
        tensors = packed(self.tensors)
        header = {"base": self.base, "info": self.info, "addressing": {}, "whole": sorted(self.tensors)}
        for name, layer in self.layers.items():
            tensors |= packed_layer(name, layer)
            header["addressing"][name] = layer.addressing
        save_artifact(path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "RowPatch":
        """Raises:
        ArtifactError: missing, damaged, or its contents contradict each other.
        """
        tensors, header = load_artifact(path, KIND)
        layers = {
            name: unpacked_layer(path, tensors, name, addressing)
            for name, addressing in header["addressing"].items()
        }
        others = unpacked(path, tensors, header.get("whole", []))
        return cls(layers, header["base"], header["info"], others)

    def apply(self, model: nn.Module) -> None:
        """Write the rows and tensors after and add the scope.

        Raises:
            ArtifactError: another base, memory or addressing, a row or tensor not as `before`, a scope that
                cannot be added, or a patch that is applied already; nothing is changed then.
        """
        self._move(model, forward=True)

    def revert(self, model: nn.Module) -> None:
        """Write the rows and tensors before and take the scope away: `apply` undone to the byte.

        Raises:
            ArtifactError: as `apply`, with rows or tensors not as `after`; nothing is changed then.
        """
        self._move(model, forward=False)

    def is_in(self, adapter: str | Path) -> bool:
        """Whether a saved adapter's rows and tensors are as this patch leaves them; `adapter` is its folder.

        Raises:
            ArtifactError: the folder holds no adapter that can be read.
        """
        tensors = read_adapter(Path(adapter))
        rows = all(is_after(tensors, name, layer) for name, layer in self.layers.items())
        return rows and are_after(tensors, self.tensors)

    @torch.no_grad()
    def _move(self, model: nn.Module, *, forward: bool) -> None:
        memories = memory_layers(model)
        if self.base != fingerprint_base(model):
            raise ArtifactError(
                "patch: was made on another base model; use it with the model that it was trained on"
            )
        scopes = {}
        for name, layer in self.layers.items():
            if name not in memories:
                raise ArtifactError(
                    f"patch: changes layer {name}, where this model has no memory ({sorted(memories)})"
                )
            if layer.addressing != addressing_before(name, memories[name], self.tensors):
                raise ArtifactError(
                    f"patch: was made on another addressing of {name}; calibrate with the same data and seed"
                )
            scopes[name] = checked_scope(name, memories[name], layer, forward=forward)
        check_tensors(model, self.tensors, forward=forward)
        for name, layer in self.layers.items():
            write_layer(memories[name], layer, scopes[name], forward=forward)
        write_tensors(model, self.tensors, forward=forward)
