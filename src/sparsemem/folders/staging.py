"""How a folder comes to be: whole or not at all, and never over another.

Choices: a folder is made under a hidden name beside its own and renamed when whole, so that nobody finds half
of one; what an interrupted training run needs to go on lies in `OUT.partial` until it is finished. Of several
processes (torchrun) the first one writes, and what the others fill vanishes.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..processes import is_first
from ..provenance import differences


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends, or vanishes when it fails.

    Raises:
        ValueError: `path` is a file or a folder with something in it.
    """
    if not is_first():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    part.chmod(0o755)
    try:
        yield part
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raises:
    ValueError: `path` is a file or a folder with something in it.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"--out {path} exists and is not empty; name another folder or remove that one")


@contextmanager
def checkpoints_of(out: Path, settings: dict[str, Any], resume: bool) -> Iterator[Path]:
    """`OUT.partial`, with the settings that its checkpoints belong to; kept on failure once there are any.

    Raises:
        ValueError: a run that is not to be resumed, or one of other settings.
    """
    folder = out.with_name(f"{out.name}.partial")
    if not is_first():
        yield folder
        return
    held = folder / "settings.json"
    if held.exists() and not resume:
        raise ValueError(
            f"{folder} holds an interrupted run; add --resume to go on with it, or remove that folder"
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
    """Raises:
    ValueError: the settings differ.
    """
    # through JSON and back, so that both sides know the same types
    changes = differences(there, json.loads(json.dumps(now)))
    if changes:
        advice = "name another folder or give the same settings"
        raise ValueError(f"{folder} holds a run of other settings ({changes}); {advice}")
