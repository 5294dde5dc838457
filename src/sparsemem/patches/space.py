"""The space that scopes are in, which many patches share.

A patch may refer to its space by digest, so that a file holds what was taught and nothing else. The space
itself is then kept once, in a file beside the patches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..adapter.digests import verify_tensors
from ..artifacts import ArtifactError, fingerprint_tensors, load_artifact, save_artifact
from ..atomic import finish_save, read_json
from ..layer.scope import Scope, empty_tensor
from ..layer.space import SPACE_TENSORS, Space

KIND = "scope space"


def space_digest(space: Space) -> str:
    """SHA-256 of a space."""
    return fingerprint_tensors(*(getattr(space, key) for key in SPACE_TENSORS))


def memory_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what no task of a stream changes: a memory's tensors, by name, but for its scope."""
    fixed = sorted(name for name in tensors if not name.startswith("scope_"))
    return fingerprint_tensors(*(tensors[name].detach().cpu() for name in fixed))


def no_space() -> Space:
    """The space of a scope that refers to its own by digest."""
    return Space(**{key: empty_tensor(key) for key in SPACE_TENSORS})


def filled_in(name: str, scope: Scope | None, space: str | None, known: Iterable[Space]) -> Scope | None:
    """The scope with the space that it refers to, which is one of the `known` ones.

    Raises:
        ArtifactError: none of them is it.
    """
    if scope is None or space is None:
        return scope
    for other in known:
        if space_digest(other) == space:
            return replace(scope, space=other)
    raise ArtifactError(
        f"patch: refers to the space {space[:12]} of {name}, which is not the model's; "
        "give the space.safetensors that lies beside the patch's ledger"
    )


def save_spaces(path: str | Path, spaces: Mapping[str, Space], header: dict[str, Any]) -> None:
    """Spaces by layer name, with a JSON header, as one file."""
    tensors = {
        f"{name}/{key}": getattr(space, key) for name, space in spaces.items() for key in SPACE_TENSORS
    }
    save_artifact(path, KIND, tensors, {**header, "layers": list(spaces)})


def load_spaces(path: str | Path) -> tuple[dict[str, Space], dict[str, Any]]:
    """What `save_spaces` wrote: spaces by layer name, and the header.

    Raises:
        ArtifactError: missing, damaged, or of another kind.
    """
    tensors, header = load_artifact(path, KIND)
    try:
        spaces = {
            name: Space(**{key: tensors[f"{name}/{key}"] for key in SPACE_TENSORS})
            for name in header["layers"]
        }
    except KeyError as error:
        raise ArtifactError(
            f"{path}: has no tensor {error}; it was made by another version: make the folder again"
        ) from error
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
