"""Read and check records from JSONL files, the Hub and Python lists."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from .models import cache_without_hub

SHAPES = (("messages",), ("prompt", "completion"), ("text",), ("question", "choices", "answer"))


def read_records(
    source: str | Path | Sequence[dict] | datasets.Dataset, *, mixed: bool = False
) -> list[dict]:
    """Read records from a JSONL file, `hub:NAME[:SPLIT]` (split `train` by default), a list or a Dataset.

    A record is `{"messages"}`, `{"prompt", "completion"}`, `{"text"}` or `{"question", "choices", "answer"}`
    with `answer` the index of the right choice. Other fields are kept. Unless `mixed` is true, all records
    must have the same shape.

    Raises:
        ValueError: a missing file, a line that is not JSON, an unknown record, mixed shapes, or no records.
    """
    if isinstance(source, str) and source.startswith("hub:"):
        name, _, split = source.removeprefix("hub:").partition(":")
        source = from_hub(name, split=split or "train")
    if isinstance(source, str | Path):
        places, records = read_jsonl(Path(source).expanduser())
    else:
        records: list[Any] = list(source)
        places = [f"data record {number}" for number in range(1, len(records) + 1)]
    if not records:
        raise ValueError(f"data is empty ({source}); give at least one record")
    first = shape_of(records[0], places[0])
    for place, record in zip(places, records, strict=True):
        if (shape := shape_of(record, place)) != first and not mixed:
            raise ValueError(
                f"{place}: {'/'.join(shape)} record among {'/'.join(first)} records; use one shape per file"
            )
    return records


def from_hub(
    name: str,
    config: str | None = None,
    *,
    split: str,
    instead: str = "check both, or put the split into a JSONL file and give that",
) -> datasets.Dataset:
    """Load a split of a dataset from the Hub, or from the local cache if the Hub cannot be reached.

    Args:
        instead: what the error message tells the user to do.

    Raises:
        ValueError: the split cannot be loaded.
    """
    try:
        with cache_without_hub():
            return datasets.load_dataset(name, config, split=split)  # type: ignore[return-value]
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"split {split!r} of {name} cannot be loaded from the Hub ({error}); {instead}"
        ) from error


def read_jsonl(path: Path) -> tuple[list[str], list[Any]]:
    """The file and line of each record, for error messages, and the unchecked records.

    Raises:
        ValueError: a file that cannot be read as UTF-8 text, or a line that is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(
            f"data file {str(path)!r} cannot be read ({error.strerror}); give a JSONL file"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {str(path)!r} is not UTF-8 text; give a JSONL file") from error
    places, records = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not valid JSON ({error.msg}); put one object on each line"
            ) from error
        except RecursionError as error:
            raise ValueError(
                f"{path}, line {number}: JSON nested too deeply; put one object on each line"
            ) from error
        places.append(f"{path}, line {number}")
    return places, records


def shape_of(record: Any, place: str) -> tuple[str, ...]:
    """The fields that make up a record: one of SHAPES.

    Args:
        place: where the record is, for error messages.

    Raises:
        ValueError: a record of no known shape, or with wrong values.
    """
    allowed = "; ".join(", ".join(shape) for shape in SHAPES)
    shapes = [shape for shape in SHAPES if isinstance(record, dict) and all(key in record for key in shape)]
    if not shapes:
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place}: record with {found or 'no field'}; allowed are the fields {allowed}")
    problem = _problem(record, shapes[0])
    if problem:
        raise ValueError(f"{place}: {problem}")
    return shapes[0]


def _problem(record: dict, shape: tuple[str, ...]) -> str | None:
    """What is wrong with a record's values, if anything."""
    if shape == ("messages",):
        turns = record["messages"]
        good = isinstance(turns, list) and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in turns
        )
        if not good or not any(turn["role"] == "assistant" for turn in turns):
            return "messages must be a list of {role, content} with at least one assistant turn"
        return None
    if shape == ("question", "choices", "answer"):
        choices, answer = record["choices"], record["answer"]
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            return "choices must be a list of strings"
        if type(answer) is not int or not 0 <= answer < len(choices):
            return f"answer={answer!r} must be the index of the right choice, 0 to {len(choices) - 1}"
        shape = ("question",)
    wrong = [key for key in shape if not isinstance(record[key], str)]
    return f"{wrong[0]} must be a string, not {type(record[wrong[0]]).__name__}" if wrong else None
