"""Find a layer's tensors in a snapshot, in a state dict or in the folder of a saved adapter."""

from collections.abc import Mapping
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..adapter.digests import verify_tensors
from ..files import ArtifactError
from ..writing import finish_save, read_json


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
