"""What `sparsemem learn` does with a folder: teach tasks, take one back, list what is there, check it.

Reading and checking need no base model.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..artifacts import ArtifactError
from ..atomic import finish_save, refuse_existing
from ..data.gguf import packaged_name
from ..data.names import public_model
from ..data.reading import read_records
from ..layer.scope import SCOPE_TENSORS, empty_tensor
from ..patches.facts import composed, facts_of, replaced_facts
from ..patches.space import load_spaces, memory_digest, space_digest
from .documents import data_digest, difference, of_document, renew
from .ledger import FILE, LEARN, Ledger, checked_patch
from .tasks import Task, tasks_of


def learn(
    model: str | None,
    source: str,
    out: Path,
    *,
    every: int = 1,
    background: str | None = None,
    seed: int = 0,
    resume: bool = False,
    add: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Teach the tasks of a stream one after another, each on the disk before the next begins.

    Args:
        model: name of a base model; may be None where the folder is there.
        source: whatever `read_records` takes; records with a `task` field, else `every` records are a task.
        background: general text for a new folder; None: the text that ships with the package.
        resume: continue the folder that is there; tasks that were taught before are not taught again.
        add: the source is another one than before. Tasks without a name are numbered after those of the
            folder, and tasks whose very records the folder holds are not taught again.

    Returns:
        What was taught and skipped, what it took, and the questions whose earlier answers were replaced. Of
        documents (records with a `source`) the difference is taught: changed sections again, and those that
        are gone are taken back.

    Raises:
        ValueError: bad data, a folder that exists without `resume` or `add`, a name that was given to other
            records before, or a full disk.
    """
    from ..training.retrofit import general_records
    from .stream import Stream

    is_there = is_stream(out)
    ledger = Ledger(out / FILE) if is_there else None
    tasks = tasks_of(read_records(source, mixed=True), every, first=_next_number(ledger) if add else 1)
    if is_there and not (resume or add):
        raise ValueError(
            f"--out {out} holds what was taught before; add --resume to continue an interrupted run, use "
            "--add FILE to teach another file, or name another folder"
        )
    if not is_there:
        refuse_existing(out)
        if model is None:
            raise ValueError(f"--out {out} holds nothing yet; give the MODEL that is to be taught")
    elif background is not None:
        raise ValueError(f"--background {background}: {out} keeps its own; leave it out")
    before: set[str] = set()
    found = difference(ledger, tasks)
    if ledger is not None:
        if add:
            held = {entry["data"] for entry in ledger.active()}
            before = {task.name for task in tasks if data_digest(task.records) in held}
        before = {name for name in before if not found.sources[name]} | found.same
        others = [t for t in tasks if t.name not in before and not found.sources[t.name]]
        before |= _refuse_other_data(ledger, others)
    general = None if background is None else general_records(background)
    earlier = _replaced(out, Ledger(out / FILE)) if is_there else set()
    with _one_sentence(out):
        stream = Stream(model or model_of(out), out, background=general, seed=seed)
        began = time.perf_counter()
        taught = renew(stream, tasks, found._replace(same=before), say)
    seconds = round(time.perf_counter() - began, 3)
    counts = {"taught": len(taught), "skipped": len(tasks) - len(taught), "tasks": len(stream.tasks)}
    num_bytes = sum(entry["bytes"] for entry in taught)
    replaced = [question for _, question in sorted(_replaced(out, stream.ledger) - earlier)]
    for question in replaced:
        say(f"replaced an earlier answer to: {question} (undo the newer task to get it back)")
    return {"out": str(out), **counts, "seconds": seconds, "bytes": num_bytes, "replaced": replaced}


def undo(out: Path, task: str, model: str | None = None) -> dict[str, Any]:
    """Take a task back, or all tasks of a document.

    Returns:
        What is left, and under "again" the questions of older facts that it had replaced, which are answered
        as they were taught before.

    Raises:
        ValueError: there is no such task.
        ArtifactError: `learn` did not make the folder, or a file in it was altered.
    """
    from .stream import Stream

    ledger = Ledger(out / FILE)
    of_one = [] if ledger.holds(task) else of_document(task, [entry["task"] for entry in ledger.active()])
    entry = _held(out, ledger, (of_one or [task])[0])
    with _one_sentence(out):
        stream = Stream(model or model_of(out), out)
        replaced = _replaced(out, stream.ledger)
        for name in of_one or [task]:
            stream.undo(name)
        stream.save()
    again = sorted(replaced - _replaced(out, stream.ledger))
    return {
        "out": str(out),
        "task": task,
        "question": "" if of_one else first_question(out, entry),
        "tasks": len(stream.tasks),
        "again": [question for name, question in again if name not in (of_one or [task])],
    }


def status(out: Path) -> dict[str, Any]:
    """What the folder's ledger says: its model, the tasks it holds and those taken back.

    Raises:
        ArtifactError: no ledger, or a file that was altered or is missing.
    """
    ledger = Ledger(out / FILE)
    keys = ("task", "records", "bytes", "seconds")
    active = ledger.active()
    held = {entry["task"] for entry in active}
    undone = [e["task"] for e in ledger.entries[1:] if e["op"] != LEARN and e["task"] not in held]
    return {
        "out": str(out),
        "model": public_model(ledger.about["model"]),
        "tasks": [
            {**{key: entry[key] for key in keys}, "question": first_question(out, entry)} for entry in active
        ],
        "undone": list(dict.fromkeys(undone)),
        "bytes": sum(entry["bytes"] for entry in active),
        "interrupted": ledger.torn,
    }


def verify(out: Path) -> dict[str, Any]:
    """Check every line, every patch, the space, and that the adapter is what follows from them.

    Raises:
        ArtifactError: naming the first that is not as it was written.
    """
    finish_save(out)
    ledger = Ledger(out / FILE)
    taught = [entry for entry in ledger.entries[1:] if entry["op"] == LEARN]
    patches = {entry["patch"]: checked_patch(out, entry) for entry in taught}
    spaces, _ = load_spaces(out / "space.safetensors")
    ((name, space),) = spaces.items()
    if space_digest(space) != ledger.about["space"]:
        raise ArtifactError(f"{out / 'space.safetensors'}: is not the ledger's; get an undamaged copy")
    scope = composed(name, [patches[entry["patch"]] for entry in ledger.active()], space)
    weights = out / SAFETENSORS_WEIGHTS_NAME
    try:
        held = {key.rpartition(".")[2]: tensor for key, tensor in load_file(weights).items()}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{weights}: cannot be read ({error}); get an undamaged copy") from error
    if memory_digest(held) != ledger.about["memory"]:
        raise ArtifactError(f"{weights}: was altered; get an undamaged copy")
    follows = {} if scope is None else scope.tensors()
    for key in SCOPE_TENSORS:
        there = held.get(f"scope_{key}")
        if there is None:
            raise ArtifactError(f"{weights}: was altered; get an undamaged copy")
        wanted = follows.get(key, empty_tensor(key))
        if not torch.equal(wanted, there):
            raise ArtifactError(f"{weights}: is not what the ledger says; learn --resume writes it again")
    return {"out": str(out), "lines": len(ledger.entries), "patches": len(patches), "ok": True}


def _replaced(out: Path, ledger: Ledger) -> set[tuple[str, str]]:
    """Task and question of each fact that a newer one replaces."""
    entries = ledger.active()
    patches = [checked_patch(out, entry) for entry in entries]
    return {
        (entries[place]["task"], fact.question)
        for place, facts in replaced_facts(patches).items()
        for fact in facts
    }


def _refuse_other_data(ledger: Ledger, tasks: list[Task]) -> set[str]:
    """Names of tasks that were taught before, whether they were taken back or not.

    Raises:
        ValueError: one of them was taught from other data.
    """
    before = {entry["task"]: entry["data"] for entry in ledger.entries[1:] if entry["op"] == LEARN}
    for task in tasks:
        if before.get(task.name, digest := data_digest(task.records)) != digest:
            raise ValueError(
                f"task {task.name!r} was taught from other records before; give the new ones another name in "
                "their field `task`, or, if they have no such field, teach the file with --add"
            )
    return {task.name for task in tasks if task.name in before}


def _next_number(ledger: Ledger | None) -> int:
    """The number after that of the last task without a name, whether it was taken back or not."""
    names = [str(entry.get("task", "")) for entry in ledger.entries] if ledger is not None else []
    numbers = [int(name.removeprefix("task-")) for name in names if re.fullmatch(r"task-\d{5,}", name)]
    return 1 + max(numbers, default=0)


def _held(out: Path, ledger: Ledger, task: str) -> dict[str, Any]:
    active = ledger.active()
    for entry in active:
        if entry["task"] == task:
            return entry
    last = [f"{entry['task']} ({first_question(out, entry)})" for entry in active[-5:]]
    raise ValueError(
        f"task {task!r} is not taught; the last ones that are: {', '.join(last) or 'none'}; "
        "`sparsemem learn status` lists all"
    )


def first_question(out: Path, entry: dict[str, Any]) -> str:
    """The first question of a task's line of the ledger; empty if its records have no questions.

    Raises:
        ArtifactError: the task's patch is missing or was altered.
    """
    return next((fact.question for fact in facts_of(checked_patch(out, entry))), "")


def is_stream(folder: Path) -> bool:
    """Whether `learn` or the page made this folder."""
    return (folder / FILE).is_file()


def model_of(out: Path) -> str:
    """Name of the base model that a stream's folder belongs to.

    Raises:
        ArtifactError: its ledger cannot be read.
    """
    name = Ledger(out / FILE).about["model"]
    return packaged_name(Path(name).name) or name


@contextmanager
def _one_sentence(out: Path) -> Iterator[None]:
    """Turn a full disk, within, into one sentence, as for bad input."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{out} cannot be written ({error}); what was taught before is safe: make room, then add --resume"
        ) from error
