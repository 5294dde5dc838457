"""Create an output folder completely or not at all, and never overwrite one.

Choices: a folder is filled under a hidden temporary name and renamed when it is complete, so nobody sees a
half-written folder. What an interrupted training run needs to continue stays in `OUT.partial` until the run
is finished. With several processes (torchrun) only the first one writes; the files of the others are deleted.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..processes import is_first
from ..provenance import differences
from ..writing import new_part, read_json, write_json


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `path` when the block ends, and deleted if the block fails.

    Raises:
        ValueError: `path` is a file, or a folder that is not empty.
    """
    if not is_first():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = new_part(path)
    try:
        yield part
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Check that `path` is free.

    Raises:
        ValueError: `path` is a file, or a folder that is not empty.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--out {path} exists and is not empty; give another folder or remove this one")


@contextmanager
def checkpoints_of(out: Path, settings: dict[str, Any], resume: bool) -> Iterator[Path]:
    """Yield `OUT.partial`, the folder for checkpoints, which also holds the settings of the run.

    If the block fails, the folder is kept as soon as it holds a checkpoint.

    Raises:
        ValueError: the folder holds an interrupted run and `resume` is False, or that run has other settings.
    """
    folder = out.with_name(f"{out.name}.partial")
    if not is_first():
        yield folder
        return
    held = folder / "settings.json"
    if held.exists() and not resume:
        raise ValueError(
            f"{folder} holds an interrupted run; add --resume to continue it, or remove that folder"
        )
    if held.exists():
        refuse_other_settings(folder, read_json(held), settings)
    write_json(held, settings)
    try:
        yield folder
    finally:
        if not any(folder.glob("checkpoint-*")):
            shutil.rmtree(folder, ignore_errors=True)


def refuse_other_settings(folder: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a run in `folder` has the present settings.

    Raises:
        ValueError: the settings differ.
    """
    # through JSON and back, so that both sides have the same types
    changes = differences(there, json.loads(json.dumps(now)))
    if changes:
        advice = "give the same settings or another folder"
        raise ValueError(f"{folder} holds a run with other settings ({changes}); {advice}")
