"""Read records from files, folders, the Hub and Python lists; torch is not needed, so bad ones fail at once.

Files are JSON lines, `.json` lists, CSV, TSV and Parquet, all but Parquet also with `.gz`. Text is UTF-8, or
UTF-16 with a byte order mark. A folder is all such files in it, in the order of their names.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .names import DATA_FILES, hub_dataset
from .shapes import checked, form_of

if TYPE_CHECKING:
    import datasets

WANTED = "give JSON lines, a .json list, CSV, TSV or Parquet"


class Records(list[dict[str, Any]]):
    """Records that `read_records` has checked; it returns them as they are."""


def read_records(source: "str | Path | Sequence[Any] | datasets.Dataset", *, mixed: bool = False) -> Records:
    """Read records from a file, a folder, a dataset on the Hub, a list or a Dataset.

    The Hub's are `hub:NAME[:SPLIT]`, split `train` by default; `hub:` may be left out where no such file
    exists. `shapes` says which records are read, and what they become: `{"messages"}`,
    `{"prompt", "completion"}`, `{"question", "choices", "answer"}` or `{"text"}`. Other fields are kept.
    Unless `mixed` is true, all records must become the same.

    Raises:
        ValueError: a missing file, a line that is not JSON, an unknown record, mixed shapes, or no records.
    """
    return _checked(source, None, mixed)


def check_records(source: str | None, *, mixed: bool = False, most: int = 10_000) -> None:
    """Read the first records of a file or folder, before anything slow begins. The Hub's are not asked for.

    Raises:
        ValueError: as `read_records`.
    """
    if source is not None and hub_dataset(source) is None:
        _checked(source, most, mixed)


def digest_of(records: Iterable[Any]) -> str:
    """SHA-256 of records, or of examples, as they were given."""
    digest = hashlib.sha256(b"[")
    for number, record in enumerate(records):
        text = json.dumps(
            record, sort_keys=True, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)
        )
        digest.update(f"{', ' if number else ''}{text}".encode())
    digest.update(b"]")
    return digest.hexdigest()


def from_hub(
    name: str,
    config: str | None = None,
    *,
    split: str,
    instead: str = "check both, or put the split into a JSONL file and give that",
) -> "datasets.Dataset":
    """Load a split of a dataset from the Hub, or from the local cache if the Hub cannot be reached.

    Args:
        instead: what the error message tells the user to do.

    Raises:
        ValueError: the split cannot be loaded.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    from .models import cache_without_hub

    try:
        with cache_without_hub():
            return datasets.load_dataset(name, config, split=split)  # type: ignore[return-value]
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"split {split!r} of {name} cannot be loaded from the Hub ({error}); {instead}"
        ) from error


def read_rows(path: Path) -> tuple[list[str], list[Any]]:
    """The file and line of each row of a file, for error messages, and the rows, which are not checked.

    Raises:
        ValueError: a file that cannot be read.
    """
    rows = list(_file(path))
    return [place for place, _ in rows], [row for _, row in rows]


def _checked(source: Any, most: int | None, mixed: bool) -> Records:
    records, first = Records(), None
    for place, raw in islice(_rows(source), most):
        record = raw if isinstance(source, Records) else checked(raw, place)
        form = form_of(record)
        first = first or form
        if form != first and not mixed:
            raise ValueError(
                f"{place}: {'/'.join(form)} record among {'/'.join(first)} records; use one shape per file"
            )
        records.append(record)
    if not records:
        raise ValueError(f"data is empty ({source}); give at least one record")
    return records


def _rows(source: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(source, str | Path):
        # a dict of splits and a table of pandas would give their keys
        if isinstance(source, Mapping) or not (
            isinstance(source, Sequence) or hasattr(source, "column_names")
        ):
            kind = type(source).__name__
            raise ValueError(f"data is a {kind}; give a list of records, a Dataset or the name of a file")
        if not hasattr(source, "__len__"):
            raise ValueError("data is streamed and may have no end; give list(data.take(N))")
        yield from ((f"data record {number}", row) for number, row in enumerate(source, start=1))
    elif name := hub_dataset(str(source)):
        name, _, split = name.partition(":")
        for number, row in enumerate(from_hub(name, split=split or "train"), start=1):
            yield f"{name}, record {number}", row
    elif (path := Path(source).expanduser()).is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(DATA_FILES))
        if not files:
            raise ValueError(f"folder {str(path)!r} has no data file; {WANTED}")
        for file in files:
            yield from _file(file)
    else:
        yield from _file(path)


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and content of each row of a file, read as it is asked for."""
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path)
            return
        with _opened(path) as text:
            if name.endswith((".csv", ".tsv")):
                yield from _table(text, path, "," if name.endswith(".csv") else "\t")
            elif name.endswith(".json"):
                yield from _json(text, path)
            else:
                yield from _lines(text, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {str(path)!r} is not UTF-8 or UTF-16 text; {WANTED}") from error
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"data file {str(path)!r} cannot be read ({why}); {WANTED}") from error


def _opened(path: Path) -> TextIO:
    raw: Any = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 (handed on)
    try:
        marks = raw.read(2)
        raw.seek(0)
    except (OSError, EOFError, zlib.error):
        raw.close()
        raise
    wide = marks in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    # line ends within the quotes of a table stay as they are
    return io.TextIOWrapper(raw, encoding="utf-16" if wide else "utf-8-sig", newline="")


def _lines(text: Iterable[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _parsed(line, place, "put one object on each line")


def _json(text: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, one record, or JSON lines under another name."""
    whole = text.read()
    if whole.lstrip().startswith("["):
        rows = _parsed(whole, str(path), "repair the list")
    else:
        try:
            rows = [json.loads(whole)]
        except (json.JSONDecodeError, RecursionError):
            yield from _lines(io.StringIO(whole), path)
            return
    yield from ((f"{path}, record {number}", row) for number, row in enumerate(rows, start=1))


def _parsed(text: str, place: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not valid JSON ({error.msg}); {advice}") from error
    except RecursionError as error:
        raise ValueError(f"{place}: JSON nested too deeply; {advice}") from error


def _table(text: TextIO, path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise ValueError(f'{place}: more values than the first line has names; put " around text')
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a table ({error}); {WANTED}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            raise ValueError(f"data file {str(path)!r} is not Parquet; {WANTED}")
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        rows: Any = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from ((f"{path}, record {number}", row) for number, row in enumerate(rows, start=1))
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"data file {str(path)!r} cannot be read as Parquet ({error}); {WANTED}") from error
