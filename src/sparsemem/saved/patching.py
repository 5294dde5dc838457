"""Row patches of saved adapters: compare two adapters, apply a patch, revert a patch."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..adapter.memories import memory_layers
from ..artifacts import ArtifactError
from ..atomic import new_folder, refuse_existing
from ..data.models import load
from ..patches.patch import RowPatch
from ..patches.space import load_spaces
from ..patches.tensors import addressing_before
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
    if out is not None:
        refuse_existing(out)
    patch = RowPatch.load(file)
    # an unreadable card must be found before anything is written
    read_front_matter(adapter)
    model = load_adapter(adapter)
    refuse_other_memory(model, adapter, patch, file)
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


def refuse_other_memories(patches: Mapping[Path, RowPatch]) -> None:
    """Check that patches belong to one memory.

    Raises:
        ArtifactError: two of them do not; it names both files.
    """
    seen: dict[str, tuple[Path, str]] = {}
    for file, patch in patches.items():
        for name, layer in patch.layers.items():
            first, addressing = seen.setdefault(name, (file, layer.addressing))
            if addressing != layer.addressing:
                _refuse_memory(str(first), str(file), name, addressing, layer.addressing)


def refuse_other_memory(model: Any, adapter: Path, patch: RowPatch, file: Path) -> None:
    """Check that a patch was made on the memory of this adapter.

    Raises:
        ArtifactError: it was not.
    """
    memories = memory_layers(model)
    for name, layer in patch.layers.items():
        if name not in memories:
            raise ArtifactError(
                f"{file} changes layer {name}, but {adapter} has memories only at {', '.join(memories)}; use "
                "the adapter that it was made with"
            )
        here = addressing_before(name, memories[name], patch.tensors)
        if layer.addressing != here:
            _refuse_memory(str(adapter), str(file), name, here, layer.addressing)


def _refuse_memory(one: str, other: str, name: str, here: str, there: str) -> NoReturn:
    raise ArtifactError(
        f"{one} and {other} were made with different memories: their addressing of {name} is {here[:12]} and "
        f"{there[:12]}. Each `sparsemem train MODEL` makes a memory of its own; make one with `sparsemem "
        "graft` and train all from it, or serve the adapter folders side by side with `sparsemem serve MODEL "
        "--patch NAME=FOLDER`"
    )


def spaces_of(adapter: Path) -> dict[str, Any] | None:
    """The spaces that patches may refer to, of an adapter that `learn` made; else None.

    Raises:
        ArtifactError: the file is damaged.
    """
    file = adapter / "space.safetensors"
    return load_spaces(file)[0] if file.is_file() else None


def load_adapter(adapter: Path) -> Any:
    """Load the base model together with the adapter in this folder.

    Raises:
        ValueError: the folder holds no adapter, or its base model cannot be loaded.
    """
    if not (adapter / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{adapter} has no {ADAPTER_FILE}; give a folder that `sparsemem graft` or `sparsemem train` made"
        )
    return load(str(adapter))[0]
