"""A layer's tensors in what a patch is made from: a snapshot, a state dict or an adapter's folder."""

from collections.abc import Mapping
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files import ArtifactError


def read_adapter(folder: Path) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error}); pass the folder of a saved adapter"
        ) from error


def lookup(tensors: Mapping[str, Tensor], name: str, key: str) -> Tensor | None:
    """A layer's tensor in a snapshot, a dict by layer name (values alone), or an adapter's state dict."""
    if key == "values" and name in tensors:
        return tensors[name]
    for candidate, tensor in tensors.items():
        stem, _, last = candidate.rpartition(".")
        if last == key and (stem == name or f".{name}.sparse_memory_layers" in f".{stem}"):
            return tensor
    return None
