"""RowPatch: what one finetuning run did to the memory, as a file that can be applied and taken back.

Per memory layer: the slots that changed with their rows before and after, and the scope that the run added;
and whole, before and after, whatever else of the adapter changed (alpha, keys, `modules_to_save`).
Applying checks everything first, base, addressing and the present bytes of all that it will change, so that a
refused patch changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapter.model import memory_layers
from ..files import ArtifactError, fingerprint_base, load_artifact, save_artifact
from ..layer.memory import ProductKeyMemory, scope_shapes
from ..layer.scope import SPACE_PARTS, Scope
from .space import filled_in, referring, space_digest
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
_SCOPE = tuple(field.name for field in fields(Scope))


@dataclass
class LayerPatch:
    """One layer's share: slots [n] int64 ascending; before, after [n, d_out]; the scope added, if any.

    `addressing` is the fingerprint of the addressing that the layer had before. `space` is the digest of the
    scope's space where the patch refers to it; the scope then lacks its SPACE_PARTS.
    """

    slots: Tensor
    before: Tensor
    after: Tensor
    addressing: str
    scope: Scope | None = None
    space: str | None = None


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
        before = _read_adapter(Path(since)) if isinstance(since, str | Path) else since
        tensors = diff_tensors(model, before)
        layers = {
            name: _diff_layer(name, memory, before, addressing_before(name, memory, tensors))
            for name, memory in memory_layers(model).items()
        }
        return cls(layers, fingerprint_base(model), dict(info or {}), tensors)

    def save(self, path: str | Path) -> None:
        """One safetensors file, written atomically; rows before are left out where all of them are zero."""
        tensors = packed(self.tensors)
        header = {"base": self.base, "info": self.info, "addressing": {}, "whole": sorted(self.tensors)}
        header["spaces"] = {name: layer.space for name, layer in self.layers.items() if layer.space}
        for name, layer in self.layers.items():
            held = {"slots": layer.slots, "after": layer.after}
            if layer.before.any():
                held["before"] = layer.before
            if layer.scope is not None:
                kept = [key for key in _SCOPE if layer.space is None or key not in SPACE_PARTS]
                held |= {f"scope_{key}": _smallest(getattr(layer.scope, key)) for key in kept}
            tensors |= {f"{name}/{key}": value for key, value in held.items()}
            header["addressing"][name] = layer.addressing
        save_artifact(path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "RowPatch":
        """Raises:
        ArtifactError: missing, damaged, or its contents contradict each other.
        """
        tensors, header = load_artifact(path, KIND)
        layers = {}
        for name, addressing in header["addressing"].items():
            held = {
                key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")
            }
            space = header.get("spaces", {}).get(name)
            problem = _problem(held, space)
            if problem:
                raise ArtifactError(f"{path}: layer {name}: {problem}; get an undamaged copy")
            parts = {key: held[f"scope_{key}"].float() for key in _SCOPE if f"scope_{key}" in held}
            scope = referring(parts) if space else Scope(**parts) if parts else None
            before = held.get("before", torch.zeros_like(held["after"]))
            layers[name] = LayerPatch(held["slots"], before, held["after"], addressing, scope, space)
        others = unpacked(path, tensors, header.get("whole", []))
        return cls(layers, header["base"], header["info"], others)

    def referring(self) -> "RowPatch":
        """The same patch, which refers to the space of its scopes by digest instead of holding it."""
        layers = {
            name: layer
            if layer.scope is None or layer.space
            else replace(layer, scope=referring(vars(layer.scope)), space=space_digest(layer.scope))
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def apply(self, model: nn.Module, *, spaces: Mapping[str, Scope] | None = None) -> None:
        """Write the rows and tensors after and add the scope.

        Args:
            spaces: by layer name, scopes in the spaces that the patch may refer to, as `load_spaces` gives
                them; None: the model's own scopes.

        Raises:
            ArtifactError: another base, memory or addressing, a row or tensor not as `before`, a scope that
                cannot be added, or a patch that is applied already; nothing is changed then.
        """
        self._move(model, forward=True, spaces=spaces)

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
        tensors = _read_adapter(Path(adapter))
        for name, layer in self.layers.items():
            values = _lookup(tensors, name, "values")
            if values is None or (layer.slots.numel() and int(layer.slots[-1]) >= len(values)):
                return False
            if not torch.equal(_as_ints(values[layer.slots]), _as_ints(layer.after.to(values.dtype))):
                return False
        return are_after(tensors, self.tensors)

    @torch.no_grad()
    def _move(self, model: nn.Module, *, forward: bool, spaces: Mapping[str, Scope] | None = None) -> None:
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
            known = [scope for scope in ((spaces or {}).get(name), memories[name].scope) if scope]
            layer = replace(layer, scope=filled_in(name, layer.scope, layer.space, known))
            scopes[name] = _checked_scope(name, memories[name], layer, forward=forward)
        check_tensors(model, self.tensors, forward=forward)
        for name, layer in self.layers.items():
            memory = memories[name]
            rows = layer.after if forward else layer.before
            memory.values[layer.slots.to(memory.values.device)] = rows.to(memory.values)
            memory.scope = scopes[name]
        write_tensors(model, self.tensors, forward=forward)


def _diff_layer(
    name: str, memory: ProductKeyMemory, before: Mapping[str, Tensor], addressing: str
) -> LayerPatch:
    old = _lookup(before, name, "values")
    if old is None:
        raise ValueError(
            f"since: holds no value table of {name}; pass RowPatch.snapshot(model) or an adapter folder"
        )
    new = memory.values.detach().cpu()
    if old.shape != new.shape:
        raise ValueError(f"since: {name} is {tuple(old.shape)}, the model's table is {tuple(new.shape)}")
    old = old.detach().cpu().to(new.dtype)
    # Bytes, not values: -0.0 and NaN payloads are differences too.
    slots = (_as_ints(old) != _as_ints(new)).any(1).nonzero().flatten()
    patch = LayerPatch(slots, old[slots].clone(), new[slots].clone(), addressing)
    first, last = _scope_in(before, name), None if memory.scope is None else memory.scope.copy()
    if last is not None:
        try:
            patch.scope = last if first is None else last.without(first)
        except ValueError as error:
            raise ValueError(_REPLACED.format(name=name)) from error
    elif first is not None:
        raise ValueError(_REPLACED.format(name=name))
    return patch


_REPLACED = "since: the scope of {name} was replaced, not extended; use set_scope(..., extend=True)"


def _checked_scope(name: str, memory: ProductKeyMemory, layer: LayerPatch, *, forward: bool) -> Scope | None:
    """The layer's scope after the move; raises before anything is written."""
    if layer.after.shape[1] != memory.d_out or (
        len(layer.slots) and int(layer.slots[-1]) >= memory.num_slots
    ):
        raise ArtifactError(
            f"patch: the rows of {name} do not fit a table of {memory.num_slots} x {memory.d_out}"
        )
    present = memory.values[layer.slots.to(memory.values.device)].cpu()
    expected = layer.before if forward else layer.after
    if not torch.equal(_as_ints(present), _as_ints(expected.to(present.dtype))):
        state = "before the patch" if forward else "after it"
        raise ArtifactError(
            f"patch: rows of {name} are not as they were {state}; apply patches in order, revert in reverse"
        )
    now = None if memory.scope is None else memory.scope.copy()
    if layer.scope is None:
        if forward and now is not None and len(layer.slots):
            raise ArtifactError(
                f"patch: has no scope but {name} has one, which would close its rows; clear_scope first"
            )
        return now
    if not forward:
        try:
            return None if now is None else now.without(layer.scope)
        except ValueError as error:
            raise ArtifactError(f"patch: its scope is not in {name}; it was taken back already") from error
    if now is None:
        if memory.values.any():
            raise ArtifactError(
                f"patch: has a scope, but {name} holds rows written without one, which it would close"
            )
        return layer.scope
    if not now.same_space(layer.scope):
        raise ArtifactError(f"patch: its scope of {name} was made with another background than the model's")
    return now.joined(layer.scope)


def _smallest(tensor: Tensor) -> Tensor:
    """In bfloat16 where that loses nothing."""
    rounded = tensor.to(torch.bfloat16)
    return rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor


def _problem(held: dict[str, Tensor], space: str | None) -> str | None:
    if (
        not {"slots", "after"} <= held.keys()
        or held["slots"].dtype != torch.int64
        or held["slots"].dim() != 1
    ):
        return "slots or rows are missing or of the wrong form"
    slots, after, before = held["slots"], held["after"], held.get("before", held["after"])
    if (
        after.dim() != 2
        or len(after) != len(slots)
        or (before.shape, before.dtype) != (after.shape, after.dtype)
    ):
        return "slots and rows differ in number or form"
    if len(slots) and (int(slots[0]) < 0 or not bool((slots[1:] > slots[:-1]).all())):
        return "slots are negative, unordered or duplicate"
    if not all(bool(t.isfinite().all()) for t in held.values() if t.is_floating_point()):
        return "holds NaN or infinite numbers"
    scope = {key: held[f"scope_{key}"] for key in _SCOPE if f"scope_{key}" in held}
    # patches made before centres had rows lack these
    needed = {key for key in _SCOPE if key != "rows" and (space is None or key not in SPACE_PARTS)}
    if (scope and not needed <= scope.keys()) or (space and not scope):
        return "half of a scope"
    if scope:
        parts = referring(scope) if space else Scope(**scope)
        width = parts.centres.shape[-1]
        sizes = (len(parts.centres), len(parts.known), len(parts.task_known), len(parts.rows))
        wanted = scope_shapes(width, *sizes, d_out=after.shape[1])
        if len(parts.rows) not in (0, len(parts.centres)) or any(
            getattr(parts, key).shape != wanted[f"scope_{key}"] for key in scope
        ):
            return "a scope whose parts do not fit together"
    return None


def _scope_in(tensors: Mapping[str, Tensor], name: str) -> Scope | None:
    parts = {key: _lookup(tensors, name, f"scope_{key}") for key in _SCOPE}
    lacking = [key for key, part in parts.items() if part is None and key != "rows"]
    if lacking or not len(parts["centres"]):  # type: ignore[arg-type]
        return None
    return Scope(**{key: part.cpu() for key, part in parts.items() if part is not None})


def _lookup(tensors: Mapping[str, Tensor], name: str, key: str) -> Tensor | None:
    """A layer's tensor in a snapshot, a dict by layer name (values alone), or an adapter's state dict."""
    if key == "values" and name in tensors:
        return tensors[name]
    for candidate, tensor in tensors.items():
        stem, _, last = candidate.rpartition(".")
        if last == key and (stem == name or f".{name}.sparse_memory_layers" in f".{stem}"):
            return tensor
    return None


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error}); pass the folder of a saved adapter"
        ) from error


def _as_ints(rows: Tensor) -> Tensor:
    return rows.contiguous().view({4: torch.int32, 2: torch.int16}[rows.element_size()])
