"""RowPatch: what one finetuning run did to the memory, as a file that can be applied and taken back.

Per memory layer: the slots that changed with their rows before and after, and the scope that the run added. Applying
checks everything first, base, addressing and every row's present bytes, so that a refused patch changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .access import addressing_fingerprint
from .calibration import write_scope
from .files import ArtifactError, fingerprint_base, load_artifact, save_artifact
from .memory import SCOPE_TENSORS, ProductKeyMemory
from .tuner import memory_layers

KIND = "row patch"
_TENSORS = ("slots", "before", "after", "scope_mean", "scope_whitener", "scope_centres", "scope_lo", "scope_hi")


@dataclass
class LayerPatch:
    """One layer's share: slots [n] int64 ascending; before, after [n, d_out]; the scope that was added, if any.

    scope_centres [m, d_in], scope_lo, scope_hi [m]; scope_mean [d_in] and scope_whitener [d_in, d_in] of the space.
    """

    slots: Tensor
    before: Tensor
    after: Tensor
    addressing: str
    scope_mean: Tensor | None = None
    scope_whitener: Tensor | None = None
    scope_centres: Tensor | None = None
    scope_lo: Tensor | None = None
    scope_hi: Tensor | None = None


@dataclass
class RowPatch:
    """Everything that one run changed; see `diff`, `save`, `load`, `apply`, `revert`.

    Attributes:
        layers: by `memory_layers` name.
        base: fingerprint of the base model.
        info: provenance: whatever the maker of the patch wants to say, JSON.
    """

    layers: dict[str, LayerPatch]
    base: str
    info: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    @torch.no_grad()
    def snapshot(model: nn.Module) -> dict[str, Tensor]:
        """Copies of all value tables and scopes, to be passed as `since=` to `diff` later."""
        return {
            f"{name}.{key}": getattr(memory, key).detach().cpu().clone()
            for name, memory in memory_layers(model).items()
            for key in ("values", *SCOPE_TENSORS, "scope_size")
        }

    @classmethod
    @torch.no_grad()
    def diff(
        cls, model: nn.Module, since: Mapping[str, Tensor] | str | Path, *, info: dict[str, Any] | None = None
    ) -> "RowPatch":
        """What changed in the active adapter's memory.

        Args:
            model: as it is now.
            since: as it was: a `snapshot`, a dict of value tables by `memory_layers` name, an adapter's state dict, or
                the folder of a saved adapter. Where it holds no scope, there was none.
            info: provenance to keep in the patch.

        Raises:
            ValueError: `since` lacks a layer or has another shape, or the scope was not extended but replaced.
        """
        before = _read_adapter(Path(since)) if isinstance(since, str | Path) else since
        layers = {name: _diff_layer(name, memory, before) for name, memory in memory_layers(model).items()}
        return cls(layers, fingerprint_base(model), dict(info or {}))

    def save(self, path: str | Path) -> None:
        """One safetensors file, written atomically; rows before are left out where all of them are zero."""
        tensors, header = {}, {"base": self.base, "info": self.info, "addressing": {}}
        for name, layer in self.layers.items():
            held = {key: getattr(layer, key) for key in _TENSORS}
            if not layer.before.any():
                held["before"] = None
            tensors |= {f"{name}/{key}": value for key, value in held.items() if value is not None}
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
            held = {key: tensors.get(f"{name}/{key}") for key in _TENSORS}
            problem = _problem(held)
            if problem:
                raise ArtifactError(f"{path}: layer {name}: {problem}; get an undamaged copy")
            if held["before"] is None:
                held["before"] = torch.zeros_like(held["after"])
            layers[name] = LayerPatch(addressing=addressing, **held)
        return cls(layers, header["base"], header["info"])

    def apply(self, model: nn.Module) -> None:
        """Write the rows after and add the scope.

        Raises:
            ArtifactError: another base, memory or addressing, a row that is not as `before`, a scope that cannot be
                added, or a patch that is applied already; nothing is changed then.
        """
        self._move(model, forward=True)

    def revert(self, model: nn.Module) -> None:
        """Write the rows before and take the scope away: `apply` undone to the byte.

        Raises:
            ArtifactError: as `apply`, with rows that are not as `after`; nothing is changed then.
        """
        self._move(model, forward=False)

    @torch.no_grad()
    def _move(self, model: nn.Module, *, forward: bool) -> None:
        memories = memory_layers(model)
        if self.base != fingerprint_base(model):
            raise ArtifactError("patch: was made on another base model; use it with the model that it was trained on")
        scopes = {}
        for name, layer in self.layers.items():
            if name not in memories:
                raise ArtifactError(f"patch: changes layer {name}, where this model has no memory ({sorted(memories)})")
            scopes[name] = _checked_scope(name, memories[name], layer, forward=forward)
        for name, layer in self.layers.items():
            memory = memories[name]
            rows = layer.after if forward else layer.before
            memory.values[layer.slots.to(memory.values.device)] = rows.to(memory.values)
            if scopes[name] is not None:
                write_scope(memory, *scopes[name])


def _diff_layer(name: str, memory: ProductKeyMemory, before: Mapping[str, Tensor]) -> LayerPatch:
    old = _lookup(before, name, "values")
    if old is None:
        raise ValueError(f"since: holds no value table of {name}; pass RowPatch.snapshot(model) or an adapter folder")
    new = memory.values.detach().cpu()
    if old.shape != new.shape:
        raise ValueError(f"since: {name} is {tuple(old.shape)}, the model's table is {tuple(new.shape)}")
    old = old.detach().cpu().to(new.dtype)
    # Bytes, not values: -0.0 and NaN payloads are differences too.
    slots = (_as_ints(old) != _as_ints(new)).any(1).nonzero().flatten()
    patch = LayerPatch(slots, old[slots].clone(), new[slots].clone(), addressing_fingerprint(memory))
    size = _lookup(before, name, "scope_size")
    first, last = int(size) if size is not None else 0, int(memory.scope_size)
    if first:
        kept = {key: _lookup(before, name, key) for key in SCOPE_TENSORS}
        now = {key: getattr(memory, key).cpu() for key in SCOPE_TENSORS}
        same = last >= first and all(
            kept[key] is not None and torch.equal(_used(key, kept[key], first), _used(key, now[key], first)) for key in SCOPE_TENSORS
        )
        if not same:
            raise ValueError(f"since: the scope of {name} was replaced, not extended; use set_scope(..., extend=True)")
    if last > first:
        patch.scope_mean, patch.scope_whitener = memory.scope_mean.cpu().clone(), memory.scope_whitener.cpu().clone()
        patch.scope_centres = memory.scope_centres[first:last].cpu().clone()
        patch.scope_lo, patch.scope_hi = memory.scope_lo[first:last].cpu().clone(), memory.scope_hi[first:last].cpu().clone()
    return patch


def _checked_scope(
    name: str, memory: ProductKeyMemory, layer: LayerPatch, *, forward: bool
) -> tuple[Tensor, ...] | None:
    """The layer's scope after the move, None to leave it; raises before anything is written."""
    if layer.addressing != addressing_fingerprint(memory):
        raise ArtifactError(f"patch: was made on another addressing of {name}; calibrate with the same data and seed")
    if layer.after.shape[1] != memory.d_out or (len(layer.slots) and int(layer.slots[-1]) >= memory.num_slots):
        raise ArtifactError(f"patch: the rows of {name} do not fit a table of {memory.num_slots} x {memory.d_out}")
    present = memory.values[layer.slots.to(memory.values.device)].cpu()
    expected = layer.before if forward else layer.after
    if not torch.equal(_as_ints(present), _as_ints(expected.to(present.dtype))):
        state = "before the patch" if forward else "after it"
        raise ArtifactError(f"patch: rows of {name} are not as they were {state}; apply patches in order, revert in reverse")
    if layer.scope_centres is None:
        if forward and memory.has_scope and len(layer.slots):
            raise ArtifactError(f"patch: has no scope but {name} has one, which would close its rows; clear_scope first")
        return None
    size, added = int(memory.scope_size), len(layer.scope_centres)
    centres, lo, hi = (getattr(memory, key)[:size].cpu() for key in ("scope_centres", "scope_lo", "scope_hi"))
    mean, whitener = memory.scope_mean.cpu(), memory.scope_whitener.cpu()
    assert layer.scope_mean is not None and layer.scope_whitener is not None
    assert layer.scope_lo is not None and layer.scope_hi is not None
    if size and not (torch.equal(mean, layer.scope_mean) and torch.equal(whitener, layer.scope_whitener)):
        raise ArtifactError(f"patch: its scope of {name} was whitened with another background than the model's")
    if forward:
        if not size and memory.values.any():
            raise ArtifactError(f"patch: has a scope, but {name} holds rows written without one, which it would close off")
        if size + added > len(memory.scope_centres):
            raise ArtifactError(f"patch: no room for {added} more centres in {name} (max_centres={len(memory.scope_centres)})")
        joined = torch.cat([centres, layer.scope_centres]), torch.cat([lo, layer.scope_lo]), torch.cat([hi, layer.scope_hi])
        return layer.scope_mean, layer.scope_whitener, *joined
    start = _find(torch.cat([centres, lo[:, None], hi[:, None]], 1), torch.cat([layer.scope_centres, layer.scope_lo[:, None], layer.scope_hi[:, None]], 1))
    if start is None:
        raise ArtifactError(f"patch: its scope is not in {name}; it was not applied, or was taken back already")
    left = [torch.cat([part[:start], part[start + added :]]) for part in (centres, lo, hi)]
    if not len(left[0]):
        mean, whitener = torch.zeros_like(mean), torch.zeros_like(whitener)
    return mean, whitener, *left


def _find(rows: Tensor, block: Tensor) -> int | None:
    """Where `block` [m, w] stands in `rows` [n, w], the last place if several."""
    for start in range(len(rows) - len(block), -1, -1):
        if torch.equal(rows[start : start + len(block)], block):
            return start
    return None


def _problem(held: dict[str, Tensor | None]) -> str | None:
    slots, before, after, centres = (held[key] for key in ("slots", "before", "after", "scope_centres"))
    if slots is None or after is None or slots.dtype != torch.int64 or slots.dim() != 1 or after.dim() != 2:
        return "slots or rows are missing or of the wrong form"
    if len(after) != len(slots) or (before is not None and (before.shape, before.dtype) != (after.shape, after.dtype)):
        return "slots and rows differ in number"
    if len(slots) and (int(slots[0]) < 0 or not bool((slots[1:] > slots[:-1]).all())):
        return "slots are negative, unordered or duplicate"
    if not all(bool(t.isfinite().all()) for t in held.values() if t is not None and t.is_floating_point()):
        return "holds NaN or infinite numbers"
    scope = [held[key] for key in SCOPE_TENSORS]
    if any((part is None) != (centres is None) for part in scope):
        return "half of a scope"
    if centres is not None and not all(len(held[k]) == len(centres) for k in ("scope_lo", "scope_hi")):  # type: ignore[arg-type]
        return "centres and thresholds differ in number"
    return None


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
        raise ArtifactError(f"{path}: cannot be read ({error}); pass the folder of a saved adapter") from error


def _used(key: str, tensor: Tensor | None, size: int) -> Tensor:
    assert tensor is not None
    return tensor if key in ("scope_mean", "scope_whitener") else tensor[:size]


def _as_ints(rows: Tensor) -> Tensor:
    return rows.contiguous().view({4: torch.int32, 2: torch.int16}[rows.element_size()])
