"""Artefacts on disk (backgrounds and patches): written atomically, and checked when they are read.

An artefact is one safetensors file. Its metadata is a JSON text and the SHA-256 of this text. The text
contains the SHA-256 of each tensor. So a damaged file is refused, with a clear error, before anything is
changed. Nothing is unpickled.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_KEY = "sparsemem"
_DIGEST = "sha256"


class ArtifactError(ValueError):
    """An artefact is damaged, or does not fit the model that it is used with. Nothing was changed."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that readers see either the old content or the new one, never a part of it.

    Args:
        path: the file. Its folder is made if it does not exist.
        write: gets the path of a temporary file and writes it. The file is then moved to `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(
        path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file cannot be read or is not JSON. The message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read {path} as JSON ({error}); delete it, and it will be made again"
        ) from None


def save_artifact(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON header to one file, atomically.

    Args:
        path: the file.
        kind: what the file contains, for example "background"; stored in the header.
        tensors: by name.
        header: JSON values.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        **header,
        "kind": kind,
        "format": 1,
        "tensors": {n: _digest(t) for n, t in sorted(tensors.items())},
    }
    text = json.dumps(header, sort_keys=True)
    metadata = {_KEY: text, _DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    write_atomically(Path(path), lambda part: save_file(tensors, part, metadata=metadata))


def load_artifact(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header that `save_artifact` wrote.

    Raises:
        ArtifactError: the file is missing or damaged, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; give the path of a {kind} file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: not a readable safetensors file ({error}); get an undamaged copy"
        ) from error
    text = metadata.get(_KEY)
    if text is None or hashlib.sha256(text.encode()).hexdigest() != metadata.get(_DIGEST):
        raise ArtifactError(
            f"{path}: its header is missing or damaged; give a {kind} file that sparsemem wrote"
        )
    header = json.loads(text)
    if header.get("kind") != kind or header.get("format") != 1:
        raise ArtifactError(
            f"{path}: contains a {header.get('kind')} of format {header.get('format')}; "
            f"give a {kind} of format 1"
        )
    if {name: _digest(tensor) for name, tensor in sorted(tensors.items())} != header["tensors"]:
        raise ArtifactError(f"{path}: its tensors are damaged (SHA-256 differs); get an undamaged copy")
    return tensors, header


def fingerprint_base(model: nn.Module) -> str:
    """SHA-256 of the base model's parameters: names, shapes, and values rounded to bfloat16.

    Because of the rounding, a model and its bfloat16 copy have the same fingerprint. The tensors of memories
    and other adapters are left out, and the names are those that the model has without adapters.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "sparse_memory_" in name or "lora_" in name or "modules_to_save" in name:
            continue
        name = (
            name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        )
        digest.update(f"{name} {list(parameter.shape)} ".encode())
        digest.update(_bytes(parameter.detach().to(torch.bfloat16)))
    return digest.hexdigest()


def fingerprint_tensors(*tensors: Tensor) -> str:
    """SHA-256 of tensors: dtypes, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_digest(tensor).encode())
    return digest.hexdigest()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + _bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
