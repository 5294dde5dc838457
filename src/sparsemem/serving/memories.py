"""Several tail memories on one base model, each by a name, and the names of models that requests may use."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..adapter.layers import SparseMemoryLayer
from ..adapter.memories import memory_layers, writes_last
from ..adapter.saving import load_onto
from ..data.models import load
from ..data.names import public_model
from ..layer.space import Space
from ..patches.patch import RowPatch
from ..saved.contents import ADAPTER_FILE
from ..saved.patching import spaces_of
from ..stream.documents import facts_in

BASE = "base"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class Served:
    """A base model with memories.

    Attributes:
        base: the base model's public name.
        memories: names of the memories; `adapter_of` gives their adapters in `model`.
        facts: for each adapter of a stream's folder, what its facts are: task, question, and source.
    """

    model: Any
    tokenizer: Any
    base: str
    memories: tuple[str, ...]
    facts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def described(self, given: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
        """Facts of adapters, as from `Decoder.facts_given`, for clients: memory, task, question, source."""
        found = []
        for adapter, number in given:
            known = self.facts.get(adapter, [])
            about = known[number] if number < len(known) else {}
            found.append({"memory": adapter.removeprefix("patch-"), **about})
        return found

    def memories_of(self, name: str) -> tuple[str, ...] | None:
        """The adapters that speak in a model's answers: of `base`, a memory's name, or several joined by `+`.

        None: there is no such model.
        """
        if name in (BASE, self.base):
            return ()
        parts = [part for part in name.split("+") if part not in (BASE, self.base)]
        if not parts or not set(parts) <= set(self.memories):
            return None
        return tuple(adapter_of(part) for part in dict.fromkeys(parts))


def load_served(name: str, patches: Mapping[str, Path], *, dtype: torch.dtype = torch.float32) -> Served:
    """Load a base model or an adapter, and patches beside it.

    Args:
        name: of the model or adapter. An adapter in which rows are written is served under its folder's name.
        patches: by name, a patch file, which needs `name` to be an adapter with the memory that it was made
            on, or an adapter folder of the same base model.

    Raises:
        ValueError: a bad name, or a model or patch that cannot be loaded or does not fit.
    """
    for given in patches:
        check_name(given)
    model, tokenizer = load(name, dtype=dtype)
    memories: list[str] = []
    facts: dict[str, list[dict[str, Any]]] = {}
    if isinstance(model, PeftModel):
        check_writes_last(model, name)
        if any(memory.has_scope or memory.values.any() for memory in memory_layers(model).values()):
            own = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).name).strip("-") or "adapter"
            _rename_default(model, own)
            memories.append(own)
            facts[adapter_of(own)] = facts_in(Path(name).expanduser())
    base = public_model(str(getattr(model.config, "name_or_path", "")) or name)
    taken = {BASE, base, *memories, "default"}
    for given, path in patches.items():
        if given in taken:
            raise ValueError(f"--patch {given}=: the name {given!r} is taken; give the patch another name")
        model = _with_patch(model, given, path, Path(name).expanduser())
        memories.append(given)
        facts[adapter_of(given)] = facts_in(path)
        taken.add(given)
    model.requires_grad_(False)
    return Served(model.eval(), tokenizer, base, tuple(memories), facts)


def adapter_of(name: str) -> str:
    """The adapter of a memory: PEFT warns of names that are a part of its own prefix, such as "a"."""
    return f"patch-{name}"


def check_name(name: str) -> None:
    """Raises:
    ValueError: a name with other characters than letters, digits, `_` and `-`.
    """
    if not _NAME.fullmatch(name):
        rather = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "facts"
        raise ValueError(
            f"--patch {name}=: a name has letters, digits, '_' and '-' only; write --patch {rather}=..."
        )


def check_writes_last(model: PeftModel, name: str) -> None:
    """Raises:
    ValueError: an adapter that is no tail memory.
    """
    if not writes_last(memory_layers(model)):
        raise ValueError(
            f"{name}: its memory writes to its own layers (write='own'), and a batch cannot mix such "
            "memories; give an adapter with write='last'"
        )


def add_memory(
    model: PeftModel,
    name: str,
    *,
    like: str,
    patch: RowPatch | None = None,
    spaces: Mapping[str, Space] | None = None,
) -> None:
    """Add an adapter with the addressing of another one, no row written and no scope; it becomes active.

    Args:
        patch: is applied to it.
        spaces: by layer, if the patch refers to their spaces.

    Raises:
        ArtifactError: a patch that does not fit; no adapter is added then.
    """
    config = copy.deepcopy(model.peft_config[like])
    config.scope_shapes = {}  # type: ignore[attr-defined]
    model.add_adapter(name, config)
    before: Any = model.active_adapter
    whole = patch is not None and bool(patch.tensors)
    for module in model.modules():
        if not isinstance(module, SparseMemoryLayer):
            continue
        new: Any = module.sparse_memory_layers[name]
        old: Any = module.sparse_memory_layers[like]
        new.values.data.zero_()
        for key, tensor in old.state_dict(keep_vars=True).items():
            if key == "values" or key.startswith("scope_"):
                continue
            if key in new._buffers and not whole:
                # what never changes is held once
                new._buffers[key] = tensor
            else:
                new.state_dict()[key].copy_(tensor)
    model.set_adapter(name)
    if patch is None:
        return
    try:
        patch.apply(model, spaces=spaces)
    except ValueError:
        model.set_adapter(before)
        model.delete_adapter(name)
        raise


def _with_patch(model: Any, name: str, path: Path, served: Path) -> PeftModel:
    if (path / ADAPTER_FILE).is_file():
        return _with_folder(model, name, path)
    patch = RowPatch.load(path)
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"--patch {name}={path}: a patch file needs the memory that it was made on; give the adapter "
            "that `sparsemem graft` made in place of the base model, or give an adapter folder as the patch"
        )
    like = next(iter(model.peft_config))
    # a stream's patches lie in a folder beside their space, unless they were downloaded
    spaces = spaces_of(path.parent.parent) or spaces_of(served)
    try:
        add_memory(model, adapter_of(name), like=like, patch=patch, spaces=spaces)
    except ValueError as error:
        raise ValueError(
            f"--patch {name}={path}: does not fit the memory of {served} ({error}); give the adapter on "
            "which this patch was made as MODEL, and other adapters as folders"
        ) from error
    return model


def _with_folder(model: Any, name: str, path: Path) -> PeftModel:
    try:
        model = load_onto(model, path, adapter_of(name))
    except ValueError as error:
        raise ValueError(f"--patch {name}={path}: {error}") from error
    kind = model.peft_config[adapter_of(name)].peft_type
    if getattr(kind, "value", kind) != "SPARSE_MEMORY":
        raise ValueError(f"--patch {name}={path}: is an adapter of type {kind}, not a sparse memory")
    check_writes_last(model, str(path))
    return model


def _rename_default(model: PeftModel, name: str) -> None:
    """Give the loaded adapter a name of its own, as a second adapter; "default" keeps the memory, emptied."""
    patch = RowPatch.diff(model, since=_empty_snapshot(model))
    like = next(iter(model.peft_config))
    for memory in memory_layers(model).values():
        memory.values.data.zero_()
        memory.scope = None
    add_memory(model, adapter_of(name), like=like, patch=patch)


def _empty_snapshot(model: PeftModel) -> dict[str, torch.Tensor]:
    """A snapshot of the active memory as it was before anything was taught."""
    snapshot = RowPatch.snapshot(model)
    tables = set(memory_layers(model))
    return {
        key: torch.zeros_like(tensor) if key.removesuffix(".values") in tables else tensor
        for key, tensor in snapshot.items()
        if ".scope_" not in key
    }
