"""The ledger: what a model was taught and untaught, one JSON line each, append-only.

Each line holds its own SHA-256 and that of the line before it ("parent"), so that a line that was altered,
moved or taken out is found. A line without a line break at its end is what a killed process leaves
behind: it does not count, and the next process that writes removes it.

Lines: {"op": "begin"} first, with what the whole ledger belongs to; {"op": "learn", "task", ...}; and
{"op": "undo", "task"}.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..artifacts import ArtifactError
from ..patches.patch import RowPatch

try:
    import fcntl
except ImportError:
    # Windows has no such lock; the length is checked there too
    fcntl = None

FILE = "ledger.jsonl"
BEGIN, LEARN, UNDO = "begin", "learn", "undo"
# What each line must have besides its digests.
_FIELDS: dict[str, dict[str, type]] = {
    BEGIN: {"model": str, "base": str, "space": str, "memory": str, "seed": int},
    LEARN: {
        "task": str,
        "data": str,
        "records": int,
        "patch": str,
        "patch_sha256": str,
        "bytes": int,
        "seconds": float,
    },
    UNDO: {"task": str},
}


class Ledger:
    """The lines of a ledger file, checked when read.

    Attributes:
        entries: one dict a line.
        torn: whether the file ends in a line without its end, which is not among the entries.
    """

    def __init__(self, path: Path) -> None:
        """Read a ledger.

        Raises:
            ArtifactError: no such file, or one that was altered.
        """
        self.path = path
        self.entries: list[dict[str, Any]] = []
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"{path}: cannot be read ({error.strerror}); give a folder of learn"
            ) from error
        *lines, rest = content.split(b"\n")
        self.torn = bool(rest)
        # of the whole lines, and of the file
        self._size, self._length = len(content) - len(rest), len(content)
        self._held: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            entry = _checked(path, number, line, self.entries)
            # a task is taught when it is not held, and taken back when it is
            if entry["op"] != BEGIN and (entry["op"] == UNDO) != (entry["task"] in self._held):
                raise ArtifactError(
                    f"{path}, line {number}: was altered; get an undamaged copy of the folder"
                )
            self._add(entry)
        if not self.entries:
            raise ArtifactError(f"{path}: has no line; remove the folder and begin again")

    @classmethod
    def begin(cls, path: Path, about: dict[str, Any]) -> "Ledger":
        """A new ledger whose first line says what it belongs to."""
        path.write_bytes(_line({"op": BEGIN, **about}, ""))
        return cls(path)

    @property
    def about(self) -> dict[str, Any]:
        """The first line."""
        return self.entries[0]

    def active(self) -> list[dict[str, Any]]:
        """The lines of the tasks that were taught and not taken back since, in the order of teaching."""
        return list(self._held.values())

    def holds(self, task: str) -> bool:
        """Whether a task was taught and not taken back since."""
        return task in self._held

    def _add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if entry["op"] == UNDO:
            del self._held[entry["task"]]
        elif entry["op"] == LEARN:
            self._held[entry["task"]] = entry

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other process writes the folder, and what this ledger has read is what is there.

        Raises:
            ArtifactError: lines were added since it was read, by another process for example.
        """
        with self.path.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_size != self._length:
                raise ArtifactError(
                    f"{self.path.parent}: has changed since it was opened; open the folder again"
                )
            yield

    def append(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Add a line, on the disk before this returns; the line, with its digests.

        Raises:
            OSError: it could not be written; the file is then as it was.
        """
        line = _line(entry, self.entries[-1]["sha256"])
        with self.path.open("r+b", buffering=0) as file:
            file.truncate(self._size)
            file.seek(self._size)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self._size)
                self._length = self._size
                raise
        self._size += len(line)
        self._length = self._size
        self.torn = False
        self._add(json.loads(line))
        return self.entries[-1]


def _line(entry: dict[str, Any], parent: str) -> bytes:
    entry = {**entry, "parent": parent}
    return json.dumps({**entry, "sha256": _digest(entry)}, sort_keys=True).encode() + b"\n"


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _checked(path: Path, number: int, line: bytes, before: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry that a line holds.

    Raises:
        ArtifactError: the line, or the one before it, is not what was written.
    """
    altered = f"{path}, line {number}: was altered; get an undamaged copy of the folder"
    try:
        entry = json.loads(line)
        digest = entry.pop("sha256")
        parent = entry["parent"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(altered) from error
    expected = before[-1]["sha256"] if before else ""
    if digest != _digest(entry) or parent != expected:
        raise ArtifactError(altered)
    needed = _FIELDS.get(entry.get("op")) if isinstance(entry.get("op"), str) else None
    # a digest shows that a line is whole, not that learn wrote it
    if needed is None or any(type(entry.get(key)) is not kind for key, kind in needed.items()):
        raise ArtifactError(altered)
    if (entry["op"] == BEGIN) != (not before):
        raise ArtifactError(altered)
    return {**entry, "sha256": digest}


def checked_patch(folder: Path, entry: dict[str, Any]) -> RowPatch:
    """The patch of a line of the folder's ledger.

    Raises:
        ArtifactError: it is missing, or is not the one that the line names.
    """
    file = folder / entry["patch"]
    if Path(entry["patch"]).is_absolute() or ".." in Path(entry["patch"]).parts:
        raise ArtifactError(f"{file}: is outside the folder; get an undamaged copy of the folder")
    if not file.is_file():
        raise ArtifactError(f"{file}: the patch of task {entry['task']!r} is missing; get a whole copy")
    if hashlib.sha256(file.read_bytes()).hexdigest() != entry["patch_sha256"]:
        raise ArtifactError(f"{file}: the patch of task {entry['task']!r} was altered; get an undamaged copy")
    return RowPatch.load(file)
