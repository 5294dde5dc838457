"""What `sparsemem eval` does: run a task on a model, or on an adapter and its base model."""

from functools import partial
from typing import Any

import torch
from peft import PeftModel

from ..data.models import load
from ..precision import precision_of
from .items import read_items
from .tasks import TASKS, evaluate


def evaluate_named(
    model: str,
    task: str,
    data: str | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    dtype: str = "float32",
    precision: str | None = "float32",
) -> dict[str, Any]:
    """Evaluate a model or an adapter on a task; for an adapter, evaluate its base model too.

    Args:
        model: a name or folder that `load` can load.
        task: one of `TASKS`, a task of lm-evaluation-harness, or a YAML file that defines such a task.
        data: file with the items; None: a benchmark's own data from the Hub.
        dtype: of the weights, "float32" or "bfloat16".
        precision: "float32", "bfloat16", or None for the faster of the two. bfloat16 weights allow only
            "bfloat16" or None.

    Returns:
        `{"task", "metrics", "n", "model", "precision"}`, and for an adapter "base": the base model's metrics.

    Raises:
        ValueError: a model, task, option or data that is missing, has the wrong form, or does not fit.
    """
    options: dict[str, Any] = {"chat": chat, "precision": precision}
    if task in TASKS:
        items = read_items(task, data, limit=limit, num_fewshot=num_fewshot or 0)
        run = partial(evaluate, task=task, items=items, **options)
    else:
        from .harness import evaluate_harness, find_task

        if data is not None:
            raise ValueError(
                f"data={str(data)!r}: task {task!r} is not one of {', '.join(TASKS)}, and tasks of "
                "lm-evaluation-harness name their own data; leave out --data"
            )
        run = partial(evaluate_harness, task=find_task(task), limit=limit, num_fewshot=num_fewshot, **options)
    loaded, tokenizer = load(model, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    result = run(loaded, tokenizer)
    found = {"task": task, "metrics": result.metrics, "n": result.n, "model": model}
    found["precision"] = precision_of(loaded, precision)
    if result.base is not None:
        found["base"] = result.base
    elif isinstance(loaded, PeftModel):
        with loaded.disable_adapter():
            found["base"] = run(loaded, tokenizer).metrics
    return found
