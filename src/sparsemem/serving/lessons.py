"""Lessons: what was taught in the page, each a task of a `Stream`, in the stream's folder.

So each lesson has rows of its own, which no other lesson changes, and `sparsemem learn` can continue the
folder. What only the page needs lies beside the ledger, in PAGE_FILE: the typed records, which lessons are
switched off, and the answers that were given. If it is lost, the lessons are still there.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..adapter.saving import load_onto
from ..atomic import read_json, refuse_existing, write_json
from ..data.models import load
from ..data.names import public_model
from ..patches.facts import facts_of, replaced_facts
from ..stream.folder import is_stream, model_of
from ..stream.ledger import LEARN, UNDO
from ..stream.stream import Stream
from .answering import changes
from .memories import check_writes_last

PAGE_FILE = "page.json"
# The adapter of the stream, and that of an adapter that the page was started with.
MEMORY, GIVEN = "default", "given"
NUM_UNDONE = 5

# gets a phase in words, and how much of it is done: (step, of)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Lesson:
    """One thing that was taught.

    Attributes:
        name: of its file, without the ending.
        title: the task's name in the ledger.
        records: prompts and completions; the completions are empty if the page did not teach it.
        rows: rows that it wrote.
        size: bytes of its file.
        replaced: whether newer lessons answer all of its questions.
        given: whether it is the adapter that the page was started with, which cannot be taken back.
    """

    name: str
    title: str
    records: list[dict[str, Any]]
    seconds: float
    rows: int
    size: int
    on: bool
    replaced: bool = False
    given: bool = False


@dataclass
class Page:
    """What PAGE_FILE holds.

    Attributes:
        records: by the lesson's name.
        off: names of lessons that are switched off.
        asked: exchanges, see `exchanges`; the last one first.
        changed: the last result of `look_for_changes`.
    """

    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    off: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    changed: dict[str, Any] | None = None


class Lessons:
    """A stream and the lessons in it.

    Attributes:
        base: the base model's public name.
        given: title of the adapter GIVEN; None: there is none.
        lessons: in the order of teaching.
    """

    def __init__(self, stream: Stream, base: str, given: str | None = None) -> None:
        self.stream, self.base, self.given = stream, base, given
        file = stream.folder / PAGE_FILE
        self.page = Page(**read_json(file)) if file.is_file() else Page()
        self.lessons: list[Lesson] = []
        self._refresh()

    @property
    def asked(self) -> list[dict[str, Any]]:
        return self.page.asked

    @property
    def changed(self) -> dict[str, Any] | None:
        return self.page.changed

    @property
    def undone(self) -> list[dict[str, str]]:
        """Name and title of lessons that were taken back and can be taught again, the last one first."""
        found = [{"name": name, "title": entry["task"]} for name, entry in self._undone().items()]
        return [one for one in found[::-1] if not self.stream.ledger.holds(one["title"])][:NUM_UNDONE]

    @property
    def speaking(self) -> tuple[str, ...]:
        """The adapters that answer."""
        on = [lesson for lesson in self.lessons if lesson.on]
        taught = (MEMORY,) if any(not lesson.given for lesson in on) else ()
        return (*taught, GIVEN) if any(lesson.given for lesson in on) else taught

    def find(self, name: str) -> Lesson:
        """Raises:
        ValueError: there is no such lesson.
        """
        for lesson in self.lessons:
            if lesson.name == name:
                return lesson
        raise ValueError(f"there is no lesson {name!r}; it may have been taken back in another tab")

    def file_of(self, name: str) -> tuple[Path, str]:
        """A lesson's file, and a name for a copy of it.

        Raises:
            ValueError: there is no such lesson, or it has no file.
        """
        entry = self._entry(name)
        words = re.sub(r"[^a-z0-9]+", "-", entry["task"].casefold()).strip("-")
        return self.stream.folder / entry["patch"], f"{words[:60] or name}.safetensors"

    def teach(self, records: Sequence[dict[str, Any]], title: str, progress: Progress) -> Lesson:
        """Teach records as a new lesson. An earlier answer to one of their questions is not given any more.

        Raises:
            ValueError: records that cannot be taught.
            OSError: the disk is full.
        """
        progress("Learning", 0, 0)
        entry = self.stream.teach(
            self._task(title),
            [_messages(record) for record in records],
            lambda done, of: progress("Learning", done, of),
        )
        self.page.records[_name_of(entry)] = list(records)
        self._write()
        return self.lessons[-1]

    def set_on(self, name: str, on: bool) -> None:
        """Let a lesson speak or not, in the page."""
        self.find(name)
        self.page.off = [one for one in self.page.off if one != name] + ([] if on else [name])
        self._refresh()
        self.save_page()

    def undo(self, name: str) -> None:
        """Take a lesson back.

        Raises:
            ValueError: there is no such lesson, or it is the given adapter.
        """
        self.stream.undo(self._entry(name)["task"])
        self.page.off = [one for one in self.page.off if one != name]
        self._write()

    def redo(self, name: str) -> None:
        """Teach a lesson that was taken back again, with the same rows; it is the newest one then.

        Raises:
            ValueError: there is no such lesson, or one with its title is there.
            ArtifactError: its file is missing or was altered.
        """
        entry = self._undone().get(name)
        if entry is None:
            raise ValueError(f"no lesson {name!r} was taken back; another tab may have taught it again")
        if self.stream.ledger.holds(entry["task"]):
            raise ValueError(f"{entry['task']!r} is taught already; undo that lesson first")
        self.stream.redo(entry)
        self._write()

    def look_for_changes(self, progress: Progress) -> dict[str, Any]:
        """General questions, neighbours and prose, before and after; see `changes`."""
        on = [lesson for lesson in self.lessons if lesson.on]
        records = [record for lesson in on for record in lesson.records]
        found = changes(self.stream.model, self.stream.tokenizer, records, self.speaking, progress)
        created = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        self.page.changed = {**found, "lessons": [lesson.name for lesson in on], "created": created}
        self.save_page()
        return self.page.changed

    def _entry(self, name: str) -> dict[str, Any]:
        """The ledger's line of a lesson."""
        if self.find(name).given:
            raise ValueError(
                f"{name} is the adapter that the page was started with; start it with the base model instead"
            )
        return next(entry for entry in self.stream.ledger.active() if _name_of(entry) == name)

    def _undone(self) -> dict[str, dict[str, Any]]:
        """By the name of each lesson that was taken back, the ledger's line that taught it."""
        taught: dict[str, dict[str, Any]] = {}
        undone: dict[str, dict[str, Any]] = {}
        for entry in self.stream.ledger.entries:
            if entry["op"] == LEARN:
                taught[entry["task"]] = entry
                undone.pop(_name_of(entry), None)
            elif entry["op"] == UNDO:
                entry = taught[entry["task"]]
                undone[_name_of(entry)] = entry
        return undone

    def _task(self, title: str) -> str:
        """A task's name that is free: the title, with a number if it was taught before."""
        names = [title, *(f"{title} ({number})" for number in range(2, len(self.stream.tasks) + 3))]
        return next(name for name in names if name not in self.stream.tasks)

    def _write(self) -> None:
        """After the ledger has changed: the adapter and the page's own file."""
        self.stream.save()
        self._refresh()
        self.save_page()

    def save_page(self) -> None:
        """Write what only the page needs."""
        write_json(self.stream.folder / PAGE_FILE, vars(self.page))

    def _refresh(self) -> None:
        """Read the lessons from the ledger again, and let those speak that are on."""
        entries = self.stream.ledger.active()
        patches = [self.stream.patch(entry) for entry in entries]
        silent = replaced_facts(patches)
        lessons = [] if self.given is None else [self._given_lesson(self.given)]
        for place, (entry, patch) in enumerate(zip(entries, patches, strict=True)):
            name, facts = _name_of(entry), facts_of(patch)
            unknown = [{"prompt": fact.question, "completion": ""} for fact in facts]
            lessons.append(
                Lesson(
                    name=name,
                    title=entry["task"],
                    records=self.page.records.get(name, unknown),
                    seconds=round(entry["seconds"], 1),
                    rows=len(patch.layers[self.stream.layer].scope.facts.rows),  # type: ignore[union-attr]
                    size=entry["bytes"],
                    on=name not in self.page.off,
                    replaced=len(silent.get(place, [])) == len(facts),
                )
            )
        self.lessons = lessons
        self.stream.select(lesson.title for lesson in lessons if lesson.on and not lesson.given)

    def _given_lesson(self, title: str) -> Lesson:
        return Lesson(GIVEN, title, [], 0.0, 0, 0, on=GIVEN not in self.page.off, given=True)


def _name_of(entry: dict[str, Any]) -> str:
    return Path(entry["patch"]).stem


def _messages(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a question and its answer, as `ask` asks it, with a chat template or without one."""
    turns = (("user", record["prompt"]), ("assistant", record["completion"]))
    kept = {key: record[key] for key in ("subject", "source") if key in record}
    return {"messages": [{"role": role, "content": text} for role, text in turns], **kept}


DEFAULT_FOLDER = Path("sparsemem-ui")


def open_lessons(name: str, folder: Path | None, progress: Progress) -> Lessons:
    """The lessons of a folder, or none in a new folder.

    Args:
        name: of the model; an adapter of ours, which is then a lesson that the page cannot take back; or a
            folder that `learn` or the page made, which is continued.
        folder: of the lessons; None: `name`, if it is such a folder, else DEFAULT_FOLDER.

    Raises:
        ValueError: a model that cannot be loaded or taught, or a folder that is another model's, or holds
            something else.
    """
    progress("Loading the model", 0, 0)
    named = Path(name).expanduser()
    if is_stream(named):
        if folder is not None and folder.resolve() != named.resolve():
            raise ValueError(f"--out {folder}: {name} holds lessons and is continued itself; leave --out out")
        return _opened(*load(model_of(named)), named, progress)
    folder = folder or DEFAULT_FOLDER
    if not is_stream(folder):
        refuse_existing(folder)
    model, tokenizer = load(name)
    if not isinstance(model, PeftModel):
        return _opened(model, tokenizer, folder, progress)
    check_writes_last(model, name)
    found = _opened(model.unload(), tokenizer, folder, progress, given=named)
    return found


def _opened(
    model: Any, tokenizer: Any, folder: Path, progress: Progress, given: Path | None = None
) -> Lessons:
    if not is_stream(folder):
        progress("Setting up the memory: once, a minute or so", 0, 0)
    stream = Stream(model, folder, tokenizer=tokenizer)
    if given is not None:
        load_onto(stream.model, given, GIVEN)
        stream.model.set_adapter(MEMORY)
    stream.model.requires_grad_(False).eval()
    title = given.resolve().name if given is not None else None
    return Lessons(stream, public_model(str(getattr(model.config, "name_or_path", ""))), title)
