"""Tasks that come from documents: other wordings, sources, and what a changed document teaches.

A document's task is named after it, or after it and a section: "notes.md § Trade". Its records have a
`source`, {"file", "lines": [first, last], "text"}, or "pages" for lines. Sources are kept beside the task's
patch and not in it: they change when lines move, which teaches nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..atomic import read_json, write_json
from ..data.reading import digest_of
from ..data.subjects import asked
from ..patches.facts import origins
from .ledger import FILE, Ledger, checked_patch
from .tasks import Task

if TYPE_CHECKING:
    from .stream import Stream

SECTION = " § "


class Difference(NamedTuple):
    """Names of tasks, by what a file of records says about them.

    Attributes:
        same: held, and not to be taught again.
        changed: held with other records, to be taken back and taught again.
        gone: held, but their documents do not have these sections any more.
        sources: of each task's questions, see `sources_of`.
    """

    same: set[str]
    changed: set[str]
    gone: list[str]
    sources: dict[str, dict[str, Any]]


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


def held_sources(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The sources of the task of a line of the folder's ledger, by question; empty: none are known."""
    file = _sources_file(folder, entry)
    return read_json(file) if file.is_file() else {}


def note_sources(folder: Path, entry: dict[str, Any], sources: dict[str, Any]) -> None:
    """Keep the sources of the task of a line of the folder's ledger, by question."""
    if sources != held_sources(folder, entry):
        write_json(_sources_file(folder, entry), sources)


def _sources_file(folder: Path, entry: dict[str, Any]) -> Path:
    return (folder / entry["patch"]).with_suffix(".sources.json")


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
    sources = [held_sources(folder, entry) for entry in entries]
    return [
        {"task": entries[place]["task"], "question": question, **sources[place].get(question, {})}
        for place, question in origins(name, patches)
    ]


def difference(ledger: Ledger | None, tasks: Sequence[Task], documents: Iterable[str] = ()) -> Difference:
    """What a file teaches anew of the documents in it; tasks without a source do not count.

    Args:
        ledger: None: of a folder that holds nothing yet.
        documents: further ones, in which no fact was found.
    """
    held = {} if ledger is None else {entry["task"]: entry["data"] for entry in ledger.active()}
    found = {task.name: sources_of(task.records) for task in tasks}
    own = [task for task in tasks if found[task.name]]
    same = {task.name for task in own if held.get(task.name) == data_digest(task.records)}
    every = {*documents, *(source["file"] for task in own for source in found[task.name].values())}
    names = {task.name for task in tasks}
    gone = [one for document in sorted(every) for one in of_document(document, held) if one not in names]
    changed = {task.name for task in own if task.name in held} - same
    return Difference(same, changed, gone, found)


def renew(
    stream: "Stream", tasks: Sequence[Task], found: Difference, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Take back what is gone, and teach the tasks that are not the same; returns the ledger's new lines."""
    for name in found.gone:
        stream.undo(name)
        say(f"took back {name}: its document does not have it any more")
    held, taught = {entry["task"]: entry for entry in stream.ledger.active()}, []
    for number, task in enumerate(tasks, start=1):
        if task.name in found.same:
            if task.name in held:
                note_sources(stream.folder, held[task.name], found.sources[task.name])
            continue
        if task.name in found.changed:
            stream.undo(task.name)
        entry = stream.teach(task.name, task.records)
        taught.append(entry)
        say(f"[{number}/{len(tasks)}] {task.name}: {entry['seconds']:.2f} s, {entry['bytes']:,} bytes")
    stream.save()
    return taught
