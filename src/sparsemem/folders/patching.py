"""Row patches and saved adapters: what changed between two of them, and a patch applied or taken back."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from .card import write_card
from .contents import ADAPTER_FILE, describe_patch
from .front_matter import read_front_matter
from .staging import new_folder, refuse_existing


def diff_adapters(before: Path, after: Path, out: Path) -> dict[str, Any]:
    """Save what changed between two states of one adapter as a row patch.

    Raises:
        ValueError: no adapter, adapters that do not belong together, or `out` is there already.
    """
    from ..patches.patch import RowPatch

    refuse_existing(out)
    patch = RowPatch.diff(load_adapter(after), since=before)
    patch.save(out)
    return {"out": str(out), **describe_patch(patch)}


def move_patch(adapter: Path, file: Path, out: Path | None, *, forward: bool) -> dict[str, Any]:
    """Apply a row patch to a saved adapter, or take it back; into a copy at `out`, or in place.

    Raises:
        ValueError: no adapter, a damaged or unfitting patch, or `out` is there already.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    from ..patches.patch import RowPatch

    if out is not None:
        refuse_existing(out)
    patch = RowPatch.load(file)
    # a card that cannot be read must be found before anything is written
    read_front_matter(adapter)
    model = load_adapter(adapter)
    (patch.apply if forward else patch.revert)(model)
    if out is not None:
        with new_folder(out) as part:
            shutil.copytree(adapter, part, dirs_exist_ok=True)
            model.save_pretrained(part)
            write_card(part, out.name)
    else:
        with tempfile.TemporaryDirectory(dir=adapter.parent) as part:
            model.save_pretrained(part)
            # nothing but the weights has changed, and one file can be replaced as a whole
            (Path(part) / SAFETENSORS_WEIGHTS_NAME).replace(adapter / SAFETENSORS_WEIGHTS_NAME)
        write_card(adapter)
    return {"out": str(out or adapter), **describe_patch(patch)}


def load_adapter(adapter: Path) -> Any:
    """The base model with the adapter in this folder.

    Raises:
        ValueError: the folder holds no adapter, or its base model cannot be loaded.
    """
    from ..data.models import load

    if not (adapter / ADAPTER_FILE).is_file():
        raise ValueError(f"{adapter} has no {ADAPTER_FILE}; give a folder that graft or train made")
    return load(str(adapter))[0]
