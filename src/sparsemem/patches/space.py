"""The space that scopes are in: mean, whitener and known states, which many patches share.

A patch may refer to its space by digest, so that a file holds what was taught and nothing else. The space
itself is then kept once, in a file beside the patches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..adapter.digests import verify_tensors
from ..artifacts import ArtifactError, fingerprint_tensors, load_artifact, save_artifact
from ..atomic import finish_save, read_json
from ..layer.scope import SPACE_PARTS, Scope

KIND = "scope space"


def space_digest(scope: Scope) -> str:
    """SHA-256 of the space that a scope is in."""
    return fingerprint_tensors(*(getattr(scope, key) for key in SPACE_PARTS))


def memory_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what no task of a stream changes: a memory's tensors, by name, but for its scope."""
    fixed = sorted(name for name in tensors if not name.startswith("scope_"))
    return fingerprint_tensors(*(tensors[name].detach().cpu() for name in fixed))


def empty_scope(mean: Tensor, whitener: Tensor, known: Tensor, known_weight: float) -> Scope:
    """A space without anything taught in it.

    Args:
        mean [d], whitener [d, d], known [num_known, d]: float32, see `Scope`.
    """
    nothing = mean.new_zeros(0, len(mean))
    none = mean.new_zeros(0)
    return Scope(mean, whitener, known, mean.new_tensor([known_weight]), nothing, nothing, none, none)


def referring(parts: Mapping[str, Tensor]) -> Scope:
    """A scope of these parts that lacks its space."""
    empty = torch.zeros(0)
    given = {field.name: parts[field.name] for field in fields(Scope) if field.name in parts}
    return Scope(**{**given, **dict.fromkeys(SPACE_PARTS, empty)})


def filled_in(name: str, scope: Scope | None, space: str | None, known: Iterable[Scope]) -> Scope | None:
    """The scope with the space that it refers to, which one of the `known` scopes is in.

    Raises:
        ArtifactError: none of them is in it.
    """
    if scope is None or space is None:
        return scope
    for other in known:
        if space_digest(other) == space:
            return replace(scope, **{key: getattr(other, key) for key in SPACE_PARTS})
    raise ArtifactError(
        f"patch: refers to the space {space[:12]} of {name}, which is not the model's; "
        "give the space.safetensors that lies beside the patch's ledger"
    )


def save_spaces(path: str | Path, spaces: Mapping[str, Scope], header: dict[str, Any]) -> None:
    """Spaces by layer name, with a JSON header, as one file."""
    tensors = {f"{name}/{key}": getattr(scope, key) for name, scope in spaces.items() for key in SPACE_PARTS}
    save_artifact(path, KIND, tensors, {**header, "layers": list(spaces)})


def load_spaces(path: str | Path) -> tuple[dict[str, Scope], dict[str, Any]]:
    """What `save_spaces` wrote: scopes without centres by layer name, and the header.

    Raises:
        ArtifactError: missing, damaged, or of another kind.
    """
    tensors, header = load_artifact(path, KIND)
    spaces = {}
    for name in header["layers"]:
        mean, whitener, known, weight = (tensors[f"{name}/{key}"] for key in SPACE_PARTS)
        spaces[name] = empty_scope(mean, whitener, known, float(weight))
    return spaces, header


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter.

    Raises:
        ArtifactError: the folder has no adapter file, or it cannot be read or is damaged.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    finish_save(folder)
    if (folder / CONFIG_NAME).is_file() and (digests := read_json(folder / CONFIG_NAME).get("digests")):
        verify_tensors(folder, digests)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error}); pass the folder of a saved adapter"
        ) from error


def lookup(tensors: Mapping[str, Tensor], name: str, key: str) -> Tensor | None:
    """Find one tensor of a memory layer.

    Args:
        tensors: a snapshot, a dict of value tables by layer name, or an adapter's state dict.
        name: of the layer.
        key: of the tensor, for example "values".

    Returns:
        The tensor, or None if there is none.
    """
    if key == "values" and name in tensors:
        return tensors[name]
    for candidate, tensor in tensors.items():
        stem, _, last = candidate.rpartition(".")
        if last == key and (stem == name or f".{name}.sparse_memory_layers" in f".{stem}"):
            return tensor
    return None
