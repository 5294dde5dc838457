"""Teach documents to a stream in one call: study them, and teach what is new."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.reading import read_records
from ..stream.documents import difference, renew
from ..stream.stream import Stream
from ..stream.tasks import tasks_of
from . import passages
from .study import study
from .teachers import Prompted, Teacher, ask_of, of_model, token_count


def teach_documents(
    stream: Stream,
    documents: Sequence[str | Path],
    *,
    teacher: str | Teacher | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the facts of documents into a file, and teach a stream the difference to what it holds of them.

    Args:
        documents: files and folders: text, Markdown, HTML, and PDF where pypdf is installed.
        teacher: who writes the questions: a model's name, the address of an OpenAI-compatible server, or an
            object with the methods of `Teacher`; None: the stream's base model.
        out: the file of records, to be read and corrected; None: facts.jsonl in the stream's folder.

    Returns:
        What `study` found, and under "taught", "held" and "taken_back" the names of tasks.

    Raises:
        ValueError: a document or a teacher that fails, or a file that was edited: teach that with `learn`.
    """
    out = out or stream.folder / "facts.jsonl"
    model, tokenizer = stream.model, stream.tokenizer
    with model.disable_adapter():
        base = of_model(model, tokenizer)
        asked = base if teacher is None else ask_of(teacher) if isinstance(teacher, str) else None
        teaching: Any = teacher if asked is None else Prompted(asked)
        about = {
            "model": stream.ledger.about["base"],
            "teacher": teacher if isinstance(teacher, str) else type(teaching).__name__,
        }
        names = [str(one) for one in documents]
        done = study(names, out, teaching, base, token_count(tokenizer), about=about, say=say)
    tasks = tasks_of(read_records(out, mixed=True)) if done["kept"] else []
    files = [file.as_posix() for file in passages.documents(names)]
    found = difference(stream.ledger, tasks, files)
    taught = [entry["task"] for entry in renew(stream, tasks, found)]
    return {**done, "taught": taught, "held": sorted(found.same), "taken_back": found.gone}
