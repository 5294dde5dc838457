"""The part of a patch for other tensors than value rows and scopes: alpha, keys, `modules_to_save`.

A patch stores such a tensor in full, before and after. It is small, or the user asked to train it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..adapter.memories import memory_layers
from ..artifacts import ArtifactError, fingerprint_tensors
from ..layer.memory import ProductKeyMemory

_ADDRESSING = ("query", "query_bias", "keys", "key_bias")
_ROOT = "base_model.model."


@dataclass
class TensorPatch:
    """A tensor before and after a run, in full and on the CPU."""

    before: Tensor
    after: Tensor


def other_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The active adapter's tensors that are neither value rows nor part of a scope. They are not copied.

    Returns:
        By name, for example "model.layers.3.mlp.scale": the path of the memory layer or saved module in the
        base model, and the name of the tensor.
    """
    found: dict[str, Tensor] = {}
    for layer, memory in memory_layers(model).items():
        held = {
            key: t
            for key, t in memory.state_dict().items()
            if key != "values" and not key.startswith("scope_")
        }
        found |= {f"{layer}.{key}": tensor for key, tensor in held.items()}
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name in [name for name in module.active_adapters if name in module.modules_to_save][:1]:
                saved = module.modules_to_save[name].state_dict()
                found |= {f"{path.removeprefix(_ROOT)}.{key}": tensor for key, tensor in saved.items()}
    return found


@torch.no_grad()
def diff_tensors(model: nn.Module, since: Mapping[str, Tensor]) -> dict[str, TensorPatch]:
    """The tensors of `other_tensors` whose bytes changed.

    Args:
        model: the model now.
        since: the tensors before. If a frozen tensor is missing, it is taken as unchanged.

    Raises:
        ValueError: `since` lacks a tensor that trains, or a shape differs.
    """
    old: dict[str, Tensor] = {}
    for key, tensor in since.items():
        old.setdefault(_plain_name(key), tensor)
    trained = {_plain_name(key) for key, p in model.named_parameters() if p.requires_grad}
    changed = {}
    for name, tensor in other_tensors(model).items():
        after = tensor.detach().cpu()
        if name not in old:
            if name in trained:
                raise ValueError(
                    f"since: has no {name}, which trains in this model; pass RowPatch.snapshot(model) or the "
                    "folder of a saved adapter"
                )
            continue
        before = old[name].detach().cpu().to(after.dtype)
        if before.shape != after.shape:
            raise ValueError(
                f"since: {name} has shape {tuple(before.shape)}, the model's has {tuple(after.shape)}; "
                "pass a snapshot of this model"
            )
        if not same_bytes(before, after):
            changed[name] = TensorPatch(before.clone(), after.clone())
    return changed


def check_tensors(model: nn.Module, patches: Mapping[str, TensorPatch], *, forward: bool) -> None:
    """Check that tensors can be changed to those after (forward) or before the run.

    Raises:
        ArtifactError: the model lacks a tensor, or its present bytes are not as expected.
    """
    present = other_tensors(model) if patches else {}
    for name, patch in patches.items():
        start = patch.before if forward else patch.after
        if name not in present or present[name].shape != start.shape:
            raise ArtifactError(
                f"patch: changes the tensor {name} of shape {tuple(start.shape)}, which this model's adapter "
                "does not have; use the adapter that it was made with"
            )
        if not same_bytes(present[name].cpu(), start.to(present[name].dtype)):
            state = "before the patch" if forward else "after it"
            raise ArtifactError(
                f"patch: {name} is not as it was {state}; apply patches in order, revert in reverse order"
            )


@torch.no_grad()
def write_tensors(model: nn.Module, patches: Mapping[str, TensorPatch], *, forward: bool) -> None:
    """Change the model's tensors to those after (forward) or before the run. Check first."""
    present = other_tensors(model) if patches else {}
    for name, patch in patches.items():
        present[name].copy_(patch.after if forward else patch.before)


def addressing_before(name: str, memory: ProductKeyMemory, patches: Mapping[str, TensorPatch]) -> str:
    """Fingerprint of the addressing of a layer before the run, whether the patch is applied now or not."""
    tensors = {key: getattr(memory, key) for key in _ADDRESSING}
    for key, tensor in tensors.items():
        if f"{name}.{key}" in patches:
            tensors[key] = patches[f"{name}.{key}"].before.to(tensor.dtype)
    return fingerprint_tensors(*tensors.values())


def are_after(tensors: Mapping[str, Tensor], patches: Mapping[str, TensorPatch]) -> bool:
    """Whether an adapter's saved tensors are as they were after the run."""
    plain = {_plain_name(key): tensor for key, tensor in tensors.items()}
    return all(
        name in plain and same_bytes(plain[name], patch.after.to(plain[name].dtype))
        for name, patch in patches.items()
    )


def packed(patches: Mapping[str, TensorPatch]) -> dict[str, Tensor]:
    """The tensors of a patch for a file."""
    return {
        f"whole/{name}/{state}": getattr(patch, state)
        for name, patch in patches.items()
        for state in ("before", "after")
    }


def unpacked(path: str | Path, tensors: Mapping[str, Tensor], names: list[str]) -> dict[str, TensorPatch]:
    """The opposite of `packed`.

    Args:
        path: the file, for error messages.
        tensors: all tensors of the file.
        names: names of the tensors in the patch.

    Raises:
        ArtifactError: a tensor is missing, its shape or dtype differs before and after, or it is not finite.
    """
    patches = {}
    for name in names:
        before, after = (tensors.get(f"whole/{name}/{state}") for state in ("before", "after"))
        problem = None
        if before is None or after is None or (before.shape, before.dtype) != (after.shape, after.dtype):
            problem = "is missing, or its shape or dtype differs before and after"
        elif after.is_floating_point() and not (before.isfinite().all() and after.isfinite().all()):
            problem = "contains NaN or infinite numbers"
        if problem:
            raise ArtifactError(f"{path}: tensor {name} {problem}; get an undamaged copy")
        assert before is not None
        assert after is not None
        patches[name] = TensorPatch(before, after)
    return patches


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on the CPU have the same shape, dtype and bytes. -0.0 differs from 0.0."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _plain_name(name: str) -> str:
    """Convert a name in a model's or an adapter's state dict to the name that `other_tensors` uses."""
    name = name.removeprefix(_ROOT)
    name = re.sub(r"\.sparse_memory_layers\.(?:[^.]+\.)?([^.]+)$", r".\1", name)
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", f".{name}").removeprefix(".")
