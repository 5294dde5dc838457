"""The facts of the lifelong benchmark, out of its data files, in the order in which they are taught."""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# the fields of a fact: subject, taught wording, answer, another wording, a question about something else
DATA = {
    "zsre": ("subject", "src", "alt", "rephrase", "loc"),
    "counterfact": ("subject", "prompt", "target_new", "rephrase_prompt", "locality_prompt"),
    "pokemqa": ("subject", "relation", "object"),
}
# of PokeMQA's subjects one half chooses settings, the other reports
HALVES = ("report", "choose")


class Edit(NamedTuple):
    """One fact: how it is taught, how it is asked otherwise, and a question about something else.

    `subject` is given to the method with the fact; empty: the method has to find it.
    """

    question: str
    answer: str
    rephrases: tuple[str, ...]
    locality: str
    subject: str = ""

    @property
    def record(self) -> dict[str, str]:
        named = {"subject": self.subject} if self.subject else {}
        return {"prompt": self.question, "completion": self.answer, **named}


def read_edits(path: Path, data: str, half: str = "report") -> list[Edit]:
    """The facts in the order in which they are taught, without those whose answer is blank.

    Raises:
        ValueError: the file cannot be read, or a line lacks a field.
    """
    from ...data.reading import read_rows

    fields, rows = DATA[data], []
    for place, row in zip(*read_rows(path), strict=True):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in fields):
            raise ValueError(f"{place}: has not all of the fields {', '.join(fields)} as text")
        if data == "pokemqa" and not _several(row.get("questions")):
            raise ValueError(f"{place}: questions must be a list of two or more wordings")
        rows.append(row)
    if data == "pokemqa":
        if not (edits := _paired([row for row in rows if half_of(row["subject"]) == half])):
            raise ValueError(
                f"{path}: has no two facts of one relation in the half {half!r}; give the whole file"
            )
        return edits
    found = ([row[name].strip() for name in fields] for row in rows)
    edits = (Edit(asked, answer, (other,), local, subject) for subject, asked, answer, other, local in found)
    return [edit for edit in edits if edit.answer]


def half_of(subject: str) -> str:
    """The half of PokeMQA to which all facts about a subject belong."""
    # the first byte: the file was cut by the last one
    return HALVES[1 - hashlib.sha256(subject.encode()).digest()[0] % 2]


def _several(questions: Any) -> bool:
    return isinstance(questions, list) and len(questions) > 1 and all(isinstance(q, str) for q in questions)


def _paired(rows: Sequence[dict[str, Any]]) -> list[Edit]:
    """Facts in a mixed order, each with the same question about a subject of which it is not taught."""
    rng, by_relation = random.Random(0), {}
    # a question that the data have twice is asked once
    for row in {row["questions"][0].casefold(): row for row in rows}.values():
        by_relation.setdefault(row["relation"], []).append(row)
    edits = []
    for several in by_relation.values():
        rng.shuffle(several)
        for taught, other in zip(several[::2], several[1::2], strict=False):
            first, *rest = taught["questions"]
            edits.append(Edit(first, taught["object"], tuple(rest), other["questions"][0], taught["subject"]))
    rng.shuffle(edits)
    return edits
