"""Row patches of saved adapters: compare two adapters, apply a patch, revert a patch."""

import shutil
from pathlib import Path
from typing import Any

from ..atomic import new_folder, refuse_existing
from .card import read_front_matter, write_card
from .contents import ADAPTER_FILE, describe_patch


def diff_adapters(before: Path, after: Path, out: Path) -> dict[str, Any]:
    """Save the difference between two states of one adapter as a row patch.

    Args:
        before: folder of the adapter before training.
        after: folder of the same adapter after training.
        out: the patch file to write.

    Returns the path and `describe_patch` of the patch.

    Raises:
        ValueError: a folder holds no adapter, the adapters do not belong together, or `out` exists.
    """
    from ..patches.patch import RowPatch

    refuse_existing(out)
    patch = RowPatch.diff(load_adapter(after), since=before)
    patch.save(out)
    return {"out": str(out), **describe_patch(patch)}


def move_patch(adapter: Path, file: Path, out: Path | None, *, forward: bool) -> dict[str, Any]:
    """Apply a row patch to a saved adapter, or revert it.

    Args:
        adapter: the adapter's folder.
        file: the patch.
        out: folder for a changed copy; None changes the adapter itself.
        forward: True applies the patch, False reverts it.

    Returns the changed folder and `describe_patch` of the patch.

    Raises:
        ValueError: the folder holds no adapter, the patch is damaged or does not fit, or `out` exists.
    """
    from ..patches.patch import RowPatch

    if out is not None:
        refuse_existing(out)
    patch = RowPatch.load(file)
    # an unreadable card must be found before anything is written
    read_front_matter(adapter)
    model = load_adapter(adapter)
    if forward:
        patch.apply(model, spaces=spaces_of(adapter))
    else:
        patch.revert(model)
    if out is not None:
        with new_folder(out) as part:
            shutil.copytree(adapter, part, dirs_exist_ok=True)
            model.save_pretrained(part)
            write_card(part, out.name)
    else:
        model.save_pretrained(adapter)
        write_card(adapter)
    return {"out": str(out or adapter), **describe_patch(patch)}


def spaces_of(adapter: Path) -> dict[str, Any] | None:
    """The spaces that patches may refer to, of an adapter that `learn` made; else None.

    Raises:
        ArtifactError: the file is damaged.
    """
    from ..patches.space import load_spaces

    file = adapter / "space.safetensors"
    return load_spaces(file)[0] if file.is_file() else None


def load_adapter(adapter: Path) -> Any:
    """Load the base model together with the adapter in this folder.

    Raises:
        ValueError: the folder holds no adapter, or its base model cannot be loaded.
    """
    from ..data.models import load

    if not (adapter / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{adapter} has no {ADAPTER_FILE}; give a folder that `sparsemem graft` or `sparsemem train` made"
        )
    return load(str(adapter))[0]
