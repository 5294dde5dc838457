"""Records as a stream of tasks, and what fact a record teaches."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..data.subjects import question_and_subject, subjects_in
from ..data.wordings import own_words


class Task(NamedTuple):
    """Records that are taught, and taken back, together."""

    name: str
    records: list[dict[str, Any]]


def tasks_of(records: Sequence[dict[str, Any]], every: int = 1, first: int = 1) -> list[Task]:
    """The tasks of a stream, in order: records with one `task` name, or `every` records.

    Args:
        first: number in the name of the first task that has no name.

    Raises:
        ValueError: some records have a name and some have none, or one name comes back after another.
    """
    named = [record.get("task") for record in records]
    if not any(name is not None for name in named):
        parts = [list(records[at : at + every]) for at in range(0, len(records), every)]
        return [Task(f"task-{number:05d}", part) for number, part in enumerate(parts, start=first)]
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


def fact_of(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """What a record is about: "key", "subject" and "question", empty where it does not say.

    Two records of one key contradict each other: the key is the fields `subject` and `relation` where the
    record has both, else its question, letter case and white space aside.
    """
    question, _ = question_and_subject(record)
    relation = _plain(record.get("relation"))
    key = f"{_plain(names[0])} | {relation}" if names and relation else _plain(question)
    return {"key": key, "subject": _plain(names[0]) if names else "", "question": question}


def names_of(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The names of each record's subject; none of a record without a question.

    A subject is what the record gives as its `subject`, else words that several records of the task share,
    else a name, else `own_words`.

    Raises:
        ValueError: a record's `subject` is not a name or a list of names, or its prompt has none of them.
    """
    found = subjects_in(records)
    number = Counter(found)
    names = []
    for record, one in zip(records, found, strict=True):
        given, (question, name) = record.get("subject"), question_and_subject(record)
        if given is not None:
            # other names of the subject, which this prompt does not have, are its names too
            names.append((given,) if isinstance(given, str) else tuple(given))
        elif number[one] > 1:
            names.append(one)
        else:
            names.append(tuple(filter(None, [name or own_words(question)])))
    return names


def _plain(text: Any) -> str:
    return " ".join(text.casefold().split()) if isinstance(text, str) else ""
