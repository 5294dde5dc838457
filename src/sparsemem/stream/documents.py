"""Tasks that come from documents: other wordings, sources, and what a changed document teaches.

A document's task is named after it, or after it and a section: "notes.md § Trade". Its records have a
`source`, {"file", "lines": [first, last], "text"}, or "pages" for lines. A source is kept beside the ledger
and not in the patch: it changes when lines move, which teaches nothing.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..atomic import read_json
from ..data.reading import digest_of
from ..data.subjects import asked
from ..patches.facts import owners, questions
from .ledger import FILE, Ledger, checked_patch
from .tasks import Task

SOURCES = "sources.json"
SECTION = " § "


class Difference(NamedTuple):
    """Names of tasks, by what a file of records says about them.

    Attributes:
        same: held, and not to be taught again.
        changed: held with other records, to be taken back and taught again.
        gone: held, but their documents do not have these sections any more.
    """

    same: set[str]
    changed: set[str]
    gone: list[str]


def spelled_out(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with one for each of their `wordings` behind them.

    Raises:
        ValueError: wordings that are no list of questions, or of a record without a prompt.
    """
    made = []
    for number, record in enumerate(records, start=1):
        wordings = record.get("wordings") or []
        listed = isinstance(wordings, list) and all(isinstance(one, str) and one.strip() for one in wordings)
        if not listed or (wordings and "prompt" not in record):
            raise ValueError(
                f"record {number}: wordings={wordings!r} must be a list of questions, beside a prompt"
            )
        one = {key: value for key, value in record.items() if key != "wordings"}
        made += [one, *({**one, "prompt": wording} for wording in wordings)]
    return made


def data_digest(records: Iterable[dict[str, Any]]) -> str:
    """Digest of what records teach, which is all but their sources."""
    return digest_of({key: value for key, value in one.items() if key != "source"} for one in records)


def sources_of(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The source of each question of a task; empty where its records have none.

    Raises:
        ValueError: a source that does not name a file.
    """
    found = {}
    for record in records:
        if (source := record.get("source")) is None:
            continue
        if not isinstance(source, dict) or not isinstance(source.get("file"), str):
            raise ValueError(f'source={source!r} must be like {{"file": "notes.md", "lines": [3, 4]}}')
        question, _ = asked(record) or ("", "")
        found |= dict.fromkeys((question, *(record.get("wordings") or ())), source)
    return found


def place_of(fact: dict[str, Any]) -> str | None:
    """Where a fact of `Stream.sources_at` comes from, to be read: "notes.md, lines 3-4"; None: nowhere."""
    if "file" not in fact:
        return None
    unit = next((unit for unit in ("lines", "pages") if unit in fact), None)
    return f"{fact['file']}, {unit} {'-'.join(map(str, fact[unit]))}" if unit else fact["file"]


def of_document(document: str, names: Iterable[str]) -> list[str]:
    """The tasks that come from a document."""
    return [name for name in names if name == document or name.startswith(document + SECTION)]


def facts_in(folder: Path) -> list[dict[str, Any]]:
    """Task, question and source of each fact in the adapter of a stream's folder; none of another folder.

    Raises:
        ArtifactError: the ledger or a patch was altered.
    """
    if not (folder / FILE).is_file():
        return []
    entries = Ledger(folder / FILE).active()
    patches = [checked_patch(folder, entry) for entry in entries]
    if not patches:
        return []
    name = next(iter(patches[0].layers))
    sources = read_json(folder / SOURCES) if (folder / SOURCES).is_file() else {}
    tasks = [entries[place]["task"] for place in owners(name, patches)]
    return [
        {"task": task, "question": question, **sources.get(task, {}).get(question, {})}
        for task, question in zip(tasks, questions(name, patches), strict=True)
    ]


def difference(ledger: Ledger, tasks: Sequence[Task], documents: Iterable[str] = ()) -> Difference:
    """What a file teaches anew of the documents in it; tasks without a source do not count.

    Args:
        documents: further ones, in which no fact was found.
    """
    held = {entry["task"]: entry["data"] for entry in ledger.active()}
    found = {task.name: sources_of(task.records) for task in tasks}
    own = [task for task in tasks if found[task.name]]
    same = {task.name for task in own if held.get(task.name) == data_digest(task.records)}
    every = {*documents, *(source["file"] for task in own for source in found[task.name].values())}
    names = {task.name for task in tasks}
    gone = [one for document in sorted(every) for one in of_document(document, held) if one not in names]
    return Difference(same, {task.name for task in own if task.name in held} - same, gone)
