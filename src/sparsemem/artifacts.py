"""Artefacts on disk (backgrounds and patches): written atomically, and checked when they are read.

An artefact is one safetensors file. Its metadata is a JSON text and the SHA-256 of this text. The text
contains the SHA-256 of each tensor. So a damaged file is refused, with a clear error, before anything is
changed. Nothing is unpickled.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic import write_atomically

_KEY = "sparsemem"
_DIGEST = "sha256"
# Of all kinds of files; 2: facts with names and question keys.
FORMAT = 2

# A base model's fingerprint: larger parameters are sampled, so many elements in so many runs.
WHOLE, SAMPLED, RUNS = 2**16, 4_096, 64


class ArtifactError(ValueError):
    """An artefact is damaged, or does not fit the model that it is used with. Nothing was changed."""


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
        "format": FORMAT,
        "tensors": {n: digest_tensor(t) for n, t in sorted(tensors.items())},
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
    if header.get("kind") != kind or header.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: contains a {header.get('kind')} of format {header.get('format')}; "
            f"give a {kind} of format {FORMAT}, made by this version"
        )
    if {name: digest_tensor(tensor) for name, tensor in sorted(tensors.items())} != header["tensors"]:
        raise ArtifactError(f"{path}: its tensors are damaged (SHA-256 differs); get an undamaged copy")
    return tensors, header


def fingerprint_base(model: nn.Module) -> str:
    """A fingerprint of the base: "sampled-" and the SHA-256 of its parameters' names, shapes and values.

    Of a parameter with more than WHOLE elements only SAMPLED of them are read, in runs that are evenly
    spaced, so that a model of 7 billion parameters takes less than a second. A change of a few elements
    between these runs is not seen. Values are rounded to bfloat16: a model and its bfloat16 copy have the
    same fingerprint. The tensors of memories and other adapters are left out, and the names are those that
    the model has without adapters.
    """
    digest = hashlib.sha256()
    for name, parameter in _base_parameters(model):
        digest.update(f"{name} {list(parameter.shape)} ".encode())
        digest.update(_bytes(_sampled(_values(parameter)).to(torch.bfloat16)))
    return f"sampled-{digest.hexdigest()}"


def fits_base(model: nn.Module, fingerprint: str) -> bool:
    """Whether the model's base has this fingerprint, of `fingerprint_base` or an earlier form of it.

    Those are the SHA-256 of all elements.
    """
    if fingerprint.startswith("sampled-"):
        return fingerprint == fingerprint_base(model)
    digest = hashlib.sha256()
    for name, parameter in _base_parameters(model):
        digest.update(f"{name} {list(parameter.shape)} ".encode())
        digest.update(_bytes(parameter.detach().to(torch.bfloat16)))
    return fingerprint == digest.hexdigest()


def comparable_base(model: nn.Module) -> bool:
    """Whether the base model's fingerprint can be compared with that of its float32 or bfloat16 original.

    It cannot if the weights are quantised or float16, which round differently, or are not in memory.
    """
    held = [parameter for _, parameter in _base_parameters(model)]
    kinds = {parameter.dtype for parameter in held}
    return not any(parameter.is_meta or _by_torchao(parameter) for parameter in held) and all(
        kind.is_floating_point and (kind.itemsize > 2 or kind == torch.bfloat16) for kind in kinds
    )


def _by_torchao(parameter: Tensor) -> bool:
    """Whether a weight is quantised by torchao, whose tensors have classes of their own."""
    return type(parameter).__module__.startswith("torchao.")


def _values(parameter: Tensor) -> Tensor:
    return parameter.dequantize() if _by_torchao(parameter) else parameter.detach()


def _base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The base model's parameters, by the names that they have without adapters."""
    named = [
        (name.removeprefix("base_model.model."), parameter)
        for name, parameter in sorted(model.named_parameters())
        if not any(part in name for part in ("sparse_memory_", "lora_", "modules_to_save"))
    ]
    return [(n.replace(".base_layer", "").replace(".original_module", ""), p) for n, p in named]


def _sampled(parameter: Tensor) -> Tensor:
    """The elements of a parameter that its fingerprint is made of, 1-D."""
    flat = parameter.reshape(-1)
    if len(flat) <= WHOLE:
        return flat
    run = SAMPLED // RUNS
    starts = torch.arange(RUNS) * (len(flat) - run) // (RUNS - 1)
    return flat[(starts[:, None] + torch.arange(run)).flatten().to(flat.device)]


def fingerprint_tensors(*tensors: Tensor) -> str:
    """SHA-256 of tensors: dtypes, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(digest_tensor(tensor).encode())
    return digest.hexdigest()


def digest_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor: its dtype, shape and bytes."""
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + _bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
