"""Lessons: what was taught in the page, each a row patch of its own, kept in one folder.

Every lesson is an adapter with the addressing of one empty memory. Its reads are added to those of the other
lessons (law 11), so lessons can be switched off and taken back in any order, and the others stay as they are.
While several are there, each counts the centres of the others as known to it: a lesson does not speak where
another one was taught.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..adapter.model import memory_layers
from ..background.background import Background
from ..patches.patch import RowPatch
from ..training.finetune import finetune
from ..writing import write_json
from .answering import answer_all, gates
from .changes import changes
from .memories import add_memory

LESSONS_FILE = "lessons.json"
MEMORY = "default"
MAX_TOKENS = 60
# Steps of a lesson: enough for one fact, and passes over more.
LEAST_STEPS, BATCH_SIZE, PASSES = 40, 8, 10
NUM_ASKED = 30

# gets a phase in words, and how much of it is done: (step, of)
Progress = Callable[[str, int, int], None]


@dataclass
class Lesson:
    """One thing that was taught.

    Attributes:
        name: of its adapter and file.
        records: prompts and completions.
        rows: rows that it wrote, in all layers.
        size: bytes of its file.
    """

    name: str
    title: str
    records: list[dict[str, str]]
    created: str
    seconds: float
    rows: int
    size: int
    on: bool = True


@dataclass
class Lessons:
    """A model and its lessons.

    Attributes:
        asked: questions with both answers, the last one first.
        changed: the last result of `look_for_changes`.
        patches: by lesson, as its file has it.
    """

    folder: Path
    model: Any
    tokenizer: Any
    background: Background
    base: str
    lessons: list[Lesson] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    changed: dict[str, Any] | None = None
    patches: dict[str, RowPatch] = field(default_factory=dict)

    def file_of(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def find(self, name: str) -> Lesson:
        """Raises:
        ValueError: there is no such lesson.
        """
        for lesson in self.lessons:
            if lesson.name == name:
                return lesson
        raise ValueError(f"there is no lesson {name!r}")

    @property
    def speaking(self) -> tuple[str, ...]:
        return tuple(lesson.name for lesson in self.lessons if lesson.on)

    def teach(self, records: Sequence[dict[str, str]], title: str, progress: Progress) -> Lesson:
        """Teach records as a new lesson; an earlier lesson with one of their prompts is switched off.

        Raises:
            ValueError: records that cannot be taught.
        """
        name = self._new_name()
        progress("Reading what must stay as it is", 0, 0)
        add_memory(self.model, name, like=MEMORY)
        steps = max(LEAST_STEPS, PASSES * -(-len(records) // BATCH_SIZE))
        try:
            done = finetune(
                self.model, [_messages(record) for record in records], "smf", tokenizer=self.tokenizer,
                background=self.background, max_steps=steps, batch_size=BATCH_SIZE,
                callbacks=[_Steps(progress)],
            )  # fmt: skip
        except (ValueError, OSError, RuntimeError):
            self._forget(name)
            raise
        assert done.patch is not None
        done.patch.info.update(title=title, base=self.base)
        done.patch.save(self.file_of(name))
        prompts = {_same(record["prompt"]) for record in records}
        for lesson in self.lessons:
            if any(_same(record["prompt"]) in prompts for record in lesson.records):
                lesson.on = False
        lesson = made_lesson(name, title, list(records), done.patch, self.file_of(name), done.seconds)
        self.add(lesson, done.patch)
        return lesson

    def set_on(self, name: str, on: bool) -> None:
        """Let a lesson speak or not."""
        self.find(name).on = on
        self.save()

    def undo(self, name: str) -> None:
        """Take a lesson back for good."""
        self.lessons.remove(self.find(name))
        del self.patches[name]
        self._forget(name)
        self.separate()
        self.save()
        self.file_of(name).unlink(missing_ok=True)

    def ask(self, question: str) -> dict[str, Any]:
        """Both answers to a question; each token of the taught one with its gate and its lesson."""
        speaking = self.speaking
        asked = [(question, ()), (question, speaking)] if speaking else [(question, ())]
        base, *taught = answer_all(self.model, self.tokenizer, asked, max_tokens=MAX_TOKENS)
        answer = taught[0] if taught else base
        first = len(answer.row.prompt)
        found = gates(self.model, [*answer.row.prompt, *answer.row.tokens], speaking)
        # the state in front of a token decides it
        found = found[:, first - 1 : first - 1 + len(answer.pieces)]
        best = found.max(0) if speaking else None
        pieces = []
        for place, piece in enumerate(answer.pieces):
            gate = float(best.values[place]) if best is not None else 0.0
            spoke = speaking[int(best.indices[place])] if best is not None and gate > 0 else None
            pieces.append({"text": piece, "gate": round(gate, 3), "lesson": spoke})
        sums = found.sum(1)
        spoke = speaking[int(sums.argmax())] if speaking and float(sums.max()) > 0 else None
        if answer.cut:
            pieces.append({"text": " …", "gate": 0.0, "lesson": None})
        result = {"question": question, "base": base.shown, "taught": answer.shown, "pieces": pieces}
        result |= {"lesson": spoke, "title": self.find(spoke).title if spoke else None}
        self.asked = [result, *self.asked][:NUM_ASKED]
        self.save()
        return result

    def look_for_changes(self, progress: Progress) -> dict[str, Any]:
        """General questions, mentions and prose, before and after; see `changes`."""
        records = [record for lesson in self.lessons if lesson.on for record in lesson.records]
        found = changes(self.model, self.tokenizer, records, self.speaking, progress)
        self.changed = {**found, "lessons": list(self.speaking), "created": _now()}
        self.save()
        return self.changed

    def save(self) -> None:
        content = {
            "base": self.base,
            "lessons": [asdict(lesson) for lesson in self.lessons],
            "asked": self.asked,
            "changed": self.changed,
        }
        write_json(self.folder / LESSONS_FILE, content)

    def _new_name(self) -> str:
        numbers = [int(lesson.name.rpartition("-")[2]) for lesson in self.lessons]
        return f"lesson-{max(numbers, default=0) + 1}"

    def add(self, lesson: Lesson, patch: RowPatch) -> None:
        """A lesson whose adapter is there already."""
        self.lessons.append(lesson)
        self.patches[lesson.name] = patch
        self.separate()
        self.save()

    def _forget(self, name: str) -> None:
        self.model.set_adapter(MEMORY)
        self.model.delete_adapter(name)
        self.model.requires_grad_(False)

    def separate(self) -> None:
        """Let every lesson know what the others are about, and stay ready to answer."""
        scopes = {
            name: {layer: part.scope for layer, part in patch.layers.items() if part.scope is not None}
            for name, patch in self.patches.items()
        }
        for name, own in scopes.items():
            self.model.set_adapter(name)
            for layer, memory in memory_layers(self.model).items():
                if layer not in own:
                    continue
                others = [scopes[other][layer].centres for other in scopes if other != name]
                known = torch.cat([own[layer].task_known, *others])
                memory.scope = replace(own[layer], task_known=known)
        self.model.set_adapter(MEMORY)
        self.model.requires_grad_(False)
        self.model.eval()


def made_lesson(
    name: str, title: str, records: list[dict[str, str]], patch: RowPatch, file: Path, seconds: float
) -> Lesson:
    rows = sum(len(layer.slots) for layer in patch.layers.values())
    return Lesson(name, title, records, _now(), round(seconds, 1), rows, file.stat().st_size)


def _messages(record: dict[str, str]) -> dict[str, Any]:
    """A record as a question and its answer, as `ask` asks it, with a chat template or without one."""
    turns = (("user", record["prompt"]), ("assistant", record["completion"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _same(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


class _Steps(TrainerCallback):
    """Says how far training is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress("Learning", 0, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress("Learning", state.global_step, state.max_steps)
