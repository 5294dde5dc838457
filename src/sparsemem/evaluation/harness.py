"""Run tasks of lm-evaluation-harness, given by name or as a YAML file, on a model that is already loaded.

The harness is installed with the optional extra `eval`. It is imported only here, and only when it is needed.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..choices import TASKS
from ..data.models import cache_without_hub
from ..precision import precision_of
from .probes import Evaluation

BATCH_SIZE = 8


def find_task(task: str) -> dict[str, Any]:
    """Load a task or group of the harness, with its data, by name or from a `.yaml` file.

    Returns:
        What `evaluate_harness` runs.

    Raises:
        ValueError: an unknown task, a missing file, a broken definition, data that cannot be loaded, or the
            harness is not installed.
    """
    file = Path(task).expanduser()
    is_file = file.suffix in (".yaml", ".yml")
    if is_file and not file.is_file():
        raise ValueError(f"task file {task!r} is not there; give an existing YAML file")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"task {task!r} is not one of {', '.join(TASKS)}, and others need lm-evaluation-harness; run "
            '`pip install "sparsemem[eval]"`'
        ) from error
    with _quiet(), cache_without_hub():
        # the harness finds a group, and the tasks in it, only by name: the file's folder and all definitions
        # of the harness must be read, which takes seconds
        group = is_file and re.search(r"^group:\s*(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        manager = TaskManager(
            include_path=str(file.parent) if group else None, include_defaults=bool(group) or not is_file
        )
        if not is_file and task not in manager.all_tasks:
            raise ValueError(
                f"task {task!r} is unknown; use one of {', '.join(TASKS)}, a task of lm-evaluation-harness "
                "or a YAML file"
            )
        try:
            return {
                "manager": manager,
                **manager.load([group[1] if group else str(file) if is_file else task]),
            }
        # a definition runs other people's code, which may raise any exception
        except Exception as error:
            raise ValueError(
                f"task {task!r} cannot be loaded ({type(error).__name__}: {error}); fix its definition, or "
                "set its dataset_path to existing files"
            ) from error


def evaluate_harness(
    model: Any,
    tokenizer: Any,
    task: dict[str, Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    precision: str | None = "float32",
) -> Evaluation:
    """Run a task that `find_task` loaded, with the harness's own metrics.

    Metrics keep the harness's names without ",none". With several tasks they are named task/metric. `correct`
    is set for a single task with the metric `acc`.

    Args:
        num_fewshot: number of worked examples; None: the task's own number.
        chat: whether to use the tokenizer's chat template.
        precision: "float32", "bfloat16", or None for the faster of the two.

    Raises:
        ValueError: `chat` without a chat template, or a task that the harness refuses to run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if chat and not tokenizer.chat_template:
        raise ValueError("chat: needs a chat template and the tokenizer has none; leave it out")
    parameter = next(model.parameters())
    rounded = precision_of(model, precision) == "bfloat16" and parameter.dtype == torch.float32
    # decorators hide the arguments of both from the type checker
    make: Any = HFLM
    run: Any = simple_evaluate
    with _quiet():
        language_model = make(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=BATCH_SIZE,
            mixed_precision_dtype="bfloat16" if rounded else None,
            softmax_dtype="float32",
        )
        found = run(
            model=language_model,
            tasks=_outermost(task),
            task_manager=task["manager"],
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat,
            bootstrap_iters=0,
        )
    metrics = {}
    for name, values in found["results"].items():
        prefix = "" if len(found["results"]) == 1 else f"{name}/"
        # the other entries are names, counts and standard errors
        metrics |= {
            prefix + metric.removesuffix(",none"): float(value)
            for metric, value in values.items()
            if "," in metric and "_stderr" not in metric and isinstance(value, int | float)
        }
    n = sum(count["effective"] for count in found["n-samples"].values())
    return Evaluation(metrics, n, _correct(found["samples"]))


def _outermost(task: dict[str, Any]) -> list[Any]:
    inner = set(chain.from_iterable(task["group_map"].values()))
    groups = [group for name, group in task["groups"].items() if name not in inner]
    return groups or list(task["tasks"].values())


def _correct(samples: dict[str, list[dict[str, Any]]]) -> list[bool] | None:
    """Which items are right by the metric `acc`; None with several tasks or without this metric."""
    if len(samples) != 1:
        return None
    (answered,) = samples.values()
    # a task with several filters has several samples for one item
    if not all("acc" in one for one in answered) or len({one["doc_id"] for one in answered}) < len(answered):
        return None
    return [bool(one["acc"]) for one in sorted(answered, key=lambda one: one["doc_id"])]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's log messages, and print on stderr what it prints: stdout is for results."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
