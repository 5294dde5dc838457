"""Write files and folders so that a kill at any time leaves the old content or the new one.

A file is written under a temporary name beside it and renamed. Several files of one folder are written to a
hidden folder in it. The rename of this folder to `.saved` decides that the new files are valid; they are then
moved to their places. If the process is killed between these moves, `finish_save` does the rest: the next
save or load calls it. Temporary names contain host and process, so what a killed process left is recognised
and removed by the next save.
"""

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

_SAVED = ".saved"
# An empty file NAME.removed in a save means: remove NAME from the folder.
_REMOVED = ".removed"
_PART = ".part"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that readers see either the old content or the new one, never a part of it.

    Args:
        path: the file. Its folder is made if it does not exist.
        write: gets the path of a temporary file and writes it. The file is then moved to `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=_PART, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(
        path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file cannot be read or is not JSON. The message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"cannot read {path} as JSON ({error}); delete it, and it will be made again"
        ) from None


def new_part(path: Path) -> Path:
    """Make a hidden temporary folder beside `path`, to be renamed to it or moved into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    part = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=_PART, dir=path.parent))
    part.chmod(0o777 & ~_umask())
    return part


def save_into(
    folder: Path, write: Callable[[Path], object], *, instead_of: dict[str, str] | None = None
) -> None:
    """Write files into a folder that may have others: all of them or, when killed or failed, none.

    Args:
        folder: made if it does not exist. Files in it that `write` does not write are kept.
        write: gets an empty folder and writes files, or folders of files, into it. A folder in it is saved
            into the folder of the same name, as a save of its own.
        instead_of: by name of a file that may be written, the name of an old file to remove then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
    part = new_part(folder / "save")
    try:
        write(part)
        for inner in sorted(path for path in part.iterdir() if path.is_dir()):
            save_into(folder / inner.name, lambda to, inner=inner: _move(inner, to), instead_of=instead_of)
            inner.rmdir()
        for new, old in (instead_of or {}).items():
            if (part / new).exists() and (folder / old).exists():
                (part / f"{old}{_REMOVED}").touch()
        for file in part.iterdir():
            _sync(file)
        part.replace(folder / _SAVED)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    finish_save(folder)


def finish_save(folder: Path) -> None:
    """Finish a save that was killed after it was decided, so that the folder has all its new files.

    Raises:
        OSError: the folder cannot be written.
    """
    saved = folder / _SAVED
    if not saved.is_dir():
        return
    for file in sorted(saved.iterdir()):
        # another process that reads this folder may finish the save at the same time
        with suppress(FileNotFoundError):
            if file.name.endswith(_REMOVED):
                (folder / file.name.removesuffix(_REMOVED)).unlink(missing_ok=True)
                file.unlink()
            else:
                file.replace(folder / file.name)
    with suppress(FileNotFoundError):
        saved.rmdir()


def remove_stale(path: Path) -> None:
    """Remove temporary files and folders of `path` whose process has ended."""
    for left in path.parent.glob(f".{_glob_escaped(path.name)}.*{_PART}"):
        found = re.fullmatch(r"(.+)-(\d+)\..*", left.name.removeprefix(f".{path.name}."))
        if found is None or found[1] != _host() or psutil.pid_exists(int(found[2])):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _move(files: Path, to: Path) -> None:
    for file in files.iterdir():
        file.replace(to / file.name)


def _prefix(path: Path) -> str:
    return f".{path.name}.{_host()}-{os.getpid()}."


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _glob_escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `path` when the block ends, and deleted if the block fails.

    Raises:
        ValueError: `path` is a file, or a folder that is not empty.
    """
    # imports torch, which takes seconds
    from .processes import is_first

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
