"""Open the folder of a page's lessons: with the model that they were made on, or a new one."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from ..adapter.model import memory_layers
from ..background.background import Background
from ..background.calibration import calibrate
from ..data.general import general_background
from ..data.models import load
from ..data.records import batches, encode
from ..folders.contents import ADAPTER_FILE, BACKGROUND_FILE
from ..folders.names import is_local, public_model
from ..patches.patch import RowPatch
from ..training.methods import memory_config
from ..writing import read_json
from .lessons import LESSONS_FILE, MEMORY, Lesson, Lessons, Progress, made_lesson
from .memories import add_memory, check_writes_last, empty_snapshot

MEMORY_FOLDER = "memory"
CALIBRATION_BATCH, CALIBRATION_LENGTH = 8, 512


def open_lessons(name: str, folder: Path, progress: Progress) -> Lessons:
    """The lessons of a folder with the model that they were made on, or none in a new folder.

    Args:
        name: of the model, or an adapter of ours; what is written in its rows becomes the first lesson.

    Raises:
        ValueError: a model that cannot be loaded, or a folder whose lessons were made on another one.
    """
    memory = folder / MEMORY_FOLDER
    progress("Loading the model", 0, 0)
    if (memory / ADAPTER_FILE).is_file():
        return _reopened(name, folder, memory)
    model, tokenizer = load(name)
    base = _base_of(model, name)
    taught: RowPatch | None = None
    if isinstance(model, PeftModel):
        check_writes_last(model, name)
        if not (Path(name) / BACKGROUND_FILE).is_file():
            raise ValueError(f"{name} has no {BACKGROUND_FILE}; give a folder that graft or train made")
        background = Background.load(Path(name) / BACKGROUND_FILE)
        taught = RowPatch.diff(model, since=empty_snapshot(model))
        for table in memory_layers(model).values():
            table.values.data.zero_()
            table.scope = None
    else:
        progress("Setting up the memory: once, a minute or so", 0, 0)
        model = get_peft_model(model, memory_config())  # type: ignore[arg-type]
        background = calibrate(model, _general(tokenizer, model), seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{MEMORY_FOLDER}.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(str(part))
    tokenizer.save_pretrained(part)
    background.save(part / BACKGROUND_FILE)
    part.rename(memory)
    model.requires_grad_(False)
    lessons = Lessons(folder, model, tokenizer, background, base)
    if taught is not None and any(len(layer.slots) for layer in taught.layers.values()):
        add_memory(model, "lesson-1", like=MEMORY, patch=taught)
        taught.save(lessons.file_of("lesson-1"))
        title = Path(name).resolve().name
        lessons.add(made_lesson("lesson-1", title, [], taught, lessons.file_of("lesson-1"), 0.0), taught)
    lessons.save()
    return lessons


def _reopened(name: str, folder: Path, memory: Path) -> Lessons:
    state = read_json(folder / LESSONS_FILE)
    if (Path(name).expanduser() / ADAPTER_FILE).is_file():
        given = str(read_json(Path(name).expanduser() / ADAPTER_FILE)["base_model_name_or_path"])
    else:
        given = name
    if _public(given) != state["base"]:
        raise ValueError(
            f"{folder} holds lessons of {state['base']}, not of {name}; give that model, or another --out"
        )
    model, tokenizer = load(str(memory))
    assert isinstance(model, PeftModel)
    background = Background.load(memory / BACKGROUND_FILE)
    lessons = Lessons(
        folder, model, tokenizer, background, state["base"], asked=state["asked"], changed=state["changed"]
    )
    for held in state["lessons"]:
        lesson = Lesson(**held)
        patch = RowPatch.load(lessons.file_of(lesson.name))
        add_memory(model, lesson.name, like=MEMORY, patch=patch)
        lessons.lessons.append(lesson)
        lessons.patches[lesson.name] = patch
    lessons.separate()
    return lessons


def _general(tokenizer: Any, model: Any) -> list[dict[str, torch.Tensor]]:
    room = getattr(model.config, "max_position_embeddings", None) or CALIBRATION_LENGTH
    examples = encode(general_background(), tokenizer, max_length=min(CALIBRATION_LENGTH, room))
    examples.sort(key=lambda one: len(one["input_ids"]))
    return batches(examples, CALIBRATION_BATCH, int(tokenizer.pad_token_id or 0))


def _base_of(model: Any, name: str) -> str:
    return _public(str(getattr(model.config, "name_or_path", "") or name))


def _public(name: str) -> str:
    public = public_model(name)
    return Path(public).name if is_local(public) else public
