"""Records as a stream of tasks, and what fact a record teaches."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..data.subjects import question_and_subject


class Task(NamedTuple):
    """Records that are taught, and taken back, together."""

    name: str
    records: list[dict[str, Any]]


def tasks_of(records: Sequence[dict[str, Any]], every: int = 1) -> list[Task]:
    """The tasks of a stream, in order: records with one `task` name, or `every` records.

    Raises:
        ValueError: some records have a name and some have none, or one name comes back after another.
    """
    named = [record.get("task") for record in records]
    if not any(name is not None for name in named):
        parts = [list(records[at : at + every]) for at in range(0, len(records), every)]
        return [Task(f"task-{number:05d}", part) for number, part in enumerate(parts, start=1)]
    tasks: list[Task] = []
    for number, (name, record) in enumerate(zip(named, records, strict=True), start=1):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"stream record {number}: task={name!r} must be a name; give every record one, or none"
            )
        if tasks and tasks[-1].name == name:
            tasks[-1].records.append(record)
        elif any(task.name == name for task in tasks):
            raise ValueError(
                f"stream record {number}: the task {name!r} was there before, and another one after it; "
                "put its records together, or give the second one another name"
            )
        else:
            tasks.append(Task(name, [record]))
    return tasks


def fact_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What a record is about: "key", "subject" and "question", empty where it does not say.

    Two records of one key contradict each other: the key is the fields `subject` and `relation` where the
    record has both, else its question, letter case and white space aside.
    """
    question, found = question_and_subject(record)
    given = [_plain(record.get(name)) for name in ("subject", "relation")]
    key = " | ".join(given) if all(given) else _plain(question)
    return {"key": key, "subject": given[0] or _plain(found), "question": question}


def _plain(text: Any) -> str:
    return " ".join(text.casefold().split()) if isinstance(text, str) else ""
