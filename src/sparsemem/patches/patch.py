"""RowPatch: what one finetuning run changed in an adapter, as a file that can be applied and reverted.

For each memory layer a patch has the slots that changed, their rows before and after, and the scope that the
run added. If other tensors of the adapter changed (alpha, keys, `modules_to_save`), it has these in full,
before and after. Before anything is written, the base model, the addressing and the present bytes of all that
will change are checked. So if a patch is refused, nothing has changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.memories import memory_layers
from ..artifacts import ArtifactError, fingerprint_base, fits_base, load_artifact, save_artifact
from ..layer.space import Space
from ..layer.tables import copy_table
from .layers import LayerPatch, checked_scope, diff_layer, is_after, packed_layer, unpacked_layer, write_layer
from .space import filled_in, read_adapter
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
    """Everything that one run changed. See `diff`, `save`, `load`, `apply` and `revert`.

    Attributes:
        layers: by `memory_layers` name.
        base: fingerprint of the base model.
        info: where the patch comes from: any JSON values.
        tensors: the other tensors of the adapter that changed, by name, in full.
    """

    layers: dict[str, LayerPatch]
    base: str
    info: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorPatch] = field(default_factory=dict)

    @staticmethod
    @torch.no_grad()
    def snapshot(model: nn.Module) -> dict[str, Tensor]:
        """Copy the active adapter's tensors to the CPU. Pass the result to `diff` as `since` later."""
        held = {
            f"{name}.{key}": tensor
            for name, memory in memory_layers(model).items()
            for key, tensor in memory.state_dict().items()
            if key == "values" or key.startswith("scope_")
        }
        copies = {
            name: copy_table(t) if name.endswith(".values") else t.detach().cpu().clone()
            for name, t in held.items()
        }
        return copies | {name: t.detach().cpu().clone() for name, t in other_tensors(model).items()}

    @classmethod
    @torch.no_grad()
    def diff(
        cls, model: nn.Module, since: Mapping[str, Tensor] | str | Path, *, info: dict[str, Any] | None = None
    ) -> "RowPatch":
        """Make a patch of what changed in the active adapter: rows, scopes and other tensors.

        Args:
            model: the model now.
            since: the tensors before: a `snapshot`, a dict of value tables by `memory_layers` name, an
                adapter's state dict, or the folder of a saved adapter. A layer without a scope in it had no
                scope. A tensor that does not train may be missing; it is taken as unchanged.
            info: where the patch comes from; stored in the patch.

        Raises:
            ValueError: `since` has no table of a layer or lacks a tensor that trains, a shape differs, or the
                scope was replaced and not extended.
            ArtifactError: the adapter in the folder cannot be read.
        """
        before = read_adapter(Path(since)) if isinstance(since, str | Path) else since
        tensors = diff_tensors(model, before)
        layers = {
            name: diff_layer(name, memory, before, addressing_before(name, memory, tensors))
            for name, memory in memory_layers(model).items()
        }
        return cls(layers, fingerprint_base(model), dict(info or {}), tensors)

    def save(self, path: str | Path) -> None:
        """Write the patch to one safetensors file, atomically.

        If all rows of a layer were zero before, these rows are not stored.
        """
        tensors = packed(self.tensors)
        header = {"base": self.base, "info": self.info, "addressing": {}, "whole": sorted(self.tensors)}
        header["spaces"] = {name: layer.space for name, layer in self.layers.items() if layer.space}
        for name, layer in self.layers.items():
            tensors |= packed_layer(name, layer)
            header["addressing"][name] = layer.addressing
        save_artifact(path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "RowPatch":
        """Read a patch that `save` wrote.

        Raises:
            ArtifactError: the file is missing or damaged, is not a patch, or its tensors contradict each
                other.
        """
        tensors, header = load_artifact(path, KIND)
        try:
            base, info, addressings = header["base"], header["info"], dict(header["addressing"])
            whole, spaces = list(header.get("whole", [])), dict(header.get("spaces", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path}: its header lacks what a row patch has ({error}); get an undamaged copy"
            ) from error
        layers = {
            name: unpacked_layer(path, tensors, name, addressing, spaces.get(name))
            for name, addressing in addressings.items()
        }
        return cls(layers, base, info, unpacked(path, tensors, whole))

    def referring(self) -> "RowPatch":
        """The same patch, but it refers to the spaces of its scopes by digest and does not contain them."""
        layers = {name: layer.referring() for name, layer in self.layers.items()}
        return replace(self, layers=layers)

    def apply(self, model: nn.Module, *, spaces: Mapping[str, Space] | None = None) -> None:
        """Write the rows and tensors as they were after the run, and add its scope.

        Args:
            spaces: by layer name, as `load_spaces` returns them, if the patch refers to their spaces
                and the model's own scopes do not have them.

        Raises:
            ArtifactError: the base model, the memory or the addressing is another one; a row or tensor is not
                as it was before the run, for example because the patch is applied already; or the scope
                cannot be added. Nothing is changed then.
        """
        self._move(model, forward=True, spaces=spaces)

    def revert(self, model: nn.Module) -> None:
        """Write the rows and tensors as they were before the run, and remove its scope. Exactly undoes
        `apply`.

        Raises:
            ArtifactError: the base model, the memory or the addressing is another one; a row or tensor is not
                as it was after the run; or the scope is not there. Nothing is changed then.
        """
        self._move(model, forward=False)

    def is_in(self, adapter: str | Path) -> bool:
        """Whether the rows and tensors of a saved adapter are as they were after the run.

        Args:
            adapter: the folder of the adapter.

        Raises:
            ArtifactError: the adapter cannot be read.
        """
        tensors = read_adapter(Path(adapter))
        rows = all(is_after(tensors, name, layer) for name, layer in self.layers.items())
        return rows and are_after(tensors, self.tensors)

    @torch.no_grad()
    def _move(self, model: nn.Module, *, forward: bool, spaces: Mapping[str, Space] | None = None) -> None:
        memories = memory_layers(model)
        if not fits_base(model, self.base):
            raise ArtifactError(
                "patch: was made with another base model; use it with the model that it was trained on"
            )
        scopes = {}
        for name, layer in self.layers.items():
            if name not in memories:
                raise ArtifactError(
                    f"patch: changes layer {name}, but this model has memories only at {sorted(memories)}; "
                    "use the adapter that it was made with"
                )
            if layer.addressing != addressing_before(name, memories[name], self.tensors):
                raise ArtifactError(
                    f"patch: was made with another addressing of {name}; calibrate with the same data "
                    "and seed"
                )
            own = memories[name].scope
            known = [space for space in ((spaces or {}).get(name), own.space if own else None) if space]
            layer = replace(layer, scope=filled_in(name, layer.scope, layer.space, known))
            scopes[name] = checked_scope(name, memories[name], layer, forward=forward)
        check_tensors(model, self.tensors, forward=forward)
        for name, layer in self.layers.items():
            write_layer(memories[name], layer, scopes[name], forward=forward)
        write_tensors(model, self.tensors, forward=forward)
