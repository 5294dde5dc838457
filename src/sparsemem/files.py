"""Artefacts on disk: written whole or not at all, checked when read.

One safetensors file per artefact. Its metadata is one canonical JSON text with a SHA-256 over the tensors'
bytes and over itself, so that a damaged file is refused with one sentence before anything is changed. Nothing
is unpickled.
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
    """An artefact is damaged, or does not fit what it is used with. Nothing was changed."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then move it to `path`: readers see the old file or the new one."""
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
    write_atomically(
        path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: naming the file, when it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as JSON ({error}); delete it to have it made again") from None


def save_artifact(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON header as one file of the given kind, atomically."""
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
    """Read what `save_artifact` wrote.

    Raises:
        ArtifactError: no such file, not of this kind, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; a {kind} file was expected there")
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
            f"{path}: its header is missing or damaged; a {kind} file of sparsemem was expected"
        )
    header = json.loads(text)
    if header.get("kind") != kind or header.get("format") != 1:
        raise ArtifactError(
            f"{path}: holds a {header.get('kind')} of format {header.get('format')}, "
            f"a {kind} of format 1 was expected"
        )
    if {name: _digest(tensor) for name, tensor in sorted(tensors.items())} != header["tensors"]:
        raise ArtifactError(f"{path}: its tensors are damaged (SHA-256 differs); get an undamaged copy")
    return tensors, header


def fingerprint_base(model: nn.Module) -> str:
    """SHA-256 of the base model's weights under the memory: names, shapes and values rounded to bfloat16.

    Rounding makes a model and its bfloat16 copy the same base. Memory layers, other adapters and their
    wrapping do not enter.
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
