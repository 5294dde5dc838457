"""What the runs of all recipes share: who has a memory, what training cost, and answers to show."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..comparison.compare import BASE, PARTIAL

MEMORY_METHODS = ("smf", "smf-open")
# a row's figures of training, as the base has them
_COSTS = ("loss", "steps", "seconds", "trained_params", "peak_bytes")
UNTRAINED = {"loss": None, "steps": 0, "samples": 0, "seconds": 0.0, "trained_params": 0, "peak_bytes": 0}


def costs(done: Any, batch_size: int) -> dict[str, Any]:
    """What training cost, of the `Finetuned` by `finetune`; `batch_size` is of a whole step."""
    return {**{name: getattr(done, name) for name in _COSTS}, "samples": done.steps * batch_size}


def precision_setting(name: str) -> str | None:
    """The precision that a recipe's setting names; None for "auto", the faster one.

    Raises:
        ValueError: another word.
    """
    allowed = ("auto", "float32", "bfloat16")
    if name not in allowed:
        raise ValueError(f"precision={name!r} is unknown; allowed are {', '.join(allowed)}")
    return None if name == "auto" else name


def keep_metrics(folder: Path) -> None:
    """Training's log, out of what is removed when the run is finished."""
    from ..training.callbacks import METRICS_FILE

    shutil.copyfile(folder / PARTIAL / METRICS_FILE, folder / METRICS_FILE)


def stages(method: str, probes: Mapping[str, float], teaching: Mapping[str, float]) -> dict[str, float]:
    """Stages of one run with their expected seconds: loading, teaching where there is any, the probes."""
    taught = {} if method == BASE else {"teach": teaching.get(method, teaching["lora"])}
    return {"load the model": 2, **taught, **probes}


def told(items: Sequence[Mapping[str, Any]], answers: Any) -> list[dict[str, Any]]:
    """Questions with what was answered, for reports; `answers` are the `Answers` of `recall`."""
    return [
        {"question": item["question"], "expected": item["answer"], "answer": text, "right": right}
        for item, text, right in zip(items, answers.texts, answers.correct, strict=True)
    ]


def spread(items: Sequence[Any], number: int = 3) -> list[Any]:
    """So many of the items, from end to end."""
    return [items[i * (len(items) - 1) // (number - 1)] for i in range(number)]


def refuse_data_dir(recipe: str, data_dir: Path | None) -> None:
    """Raises:
    ValueError: a `data_dir` for a recipe that brings its own data.
    """
    if data_dir is not None:
        raise ValueError(f"{recipe} brings its own data, but data_dir is {str(data_dir)!r}; leave it out")
