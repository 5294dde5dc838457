"""Open the folder of a page's lessons, which is a stream's: the one that is there, or a new one."""

from pathlib import Path
from typing import Any

from peft import PeftModel

from ..data.models import load
from ..folders.names import public_model
from ..folders.staging import refuse_existing
from ..folders.streams import is_stream, model_of
from ..training.stream import Stream
from .lessons import GIVEN, MEMORY, Lessons, Progress
from .memories import check_writes_last

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
        stream.model.load_adapter(str(given), adapter_name=GIVEN)
        stream.model.set_adapter(MEMORY)
    stream.model.requires_grad_(False).eval()
    title = given.resolve().name if given is not None else None
    return Lessons(stream, public_model(str(getattr(model.config, "name_or_path", ""))), title)
