"""Check the arguments of `finetune` and turn them into Trainer's."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..data.known import KEEP_FORMS
from .methods import MAX_GRAD_NORM, MEMORY_METHODS, check_method

WARMUP_STEPS = 5
# The largest number of steps between two checkpoints; an epoch if that is shorter.
SAVE_STEPS = 500

TRACKERS = ("tensorboard", "wandb", "trackio")
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
# Default passes over the data, and the fewest steps of sparse memory, whose steps on cached states are cheap.
EPOCHS, MIN_STEPS = 3, 200


def check_arguments(
    method: str,
    mentions: int,
    schedule: str | None,
    output_dir: str | Path | None,
    resume: bool,
    cache_bytes: int,
    **counts: int | None,
) -> None:
    """Check the arguments that can be checked before the data is read.

    Args:
        counts: numbers that must be at least 1, or None, by the name of their argument.

    Raises:
        ValueError: an argument out of range, or checkpoints in `output_dir` without `resume`.
    """
    if not 0 <= mentions <= len(KEEP_FORMS):
        raise ValueError(f"mentions={mentions} is out of range; give 0 to {len(KEEP_FORMS)} question forms")
    check_method(method)
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes={cache_bytes} is negative; give 0 for no cache, or a number of bytes")
    if schedule is not None and schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; allowed are {', '.join(SCHEDULES)}")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is too small; give at least 1")
    if resume and output_dir is None:
        raise ValueError(
            "resume=True needs output_dir=; give the folder with the checkpoints to continue from"
        )
    if output_dir and not resume and any(Path(output_dir).glob("checkpoint-*")):
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds checkpoints; pass resume=True or give another folder"
        )


def check_trackers(report_to: Sequence[str]) -> None:
    """Raises:
    ValueError: a tracker that is unknown or not installed.
    """
    for name in report_to:
        if name not in TRACKERS:
            raise ValueError(f"report_to={name!r} is unknown; allowed are {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise ValueError(f"report_to={name!r}: the package is not installed; run `pip install {name}`")


def training_arguments(
    folder: Path,
    num_examples: int,
    method: str,
    *,
    epochs: int | None,
    max_steps: int | None,
    batch_size: int,
    gradient_accumulation_steps: int,
    schedule: str | None,
    warmup_steps: int,
    seed: int,
    validates: bool,
    resumes: bool,
    saves: bool,
    report_to: Sequence[str] = (),
) -> tuple[TrainingArguments, int]:
    """Trainer's arguments with the number of steps set, and the steps of one epoch.

    Args:
        folder: where checkpoints go.
        num_examples: number of training examples.
        method, epochs, max_steps, schedule: as for `finetune`, which has checked them.
        validates: whether there is validation data.
        resumes: whether the run continues from a checkpoint.
        saves: whether checkpoints are written.
        report_to: as for `finetune`.

    Raises:
        ValueError: a tracker that is unknown or not installed.
    """
    check_trackers(report_to)
    schedule = schedule or ("linear" if method in MEMORY_METHODS else "constant")
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        lr_scheduler_type=SCHEDULES[schedule],
        warmup_steps=warmup_steps,
        eval_strategy="steps" if validates else "no",
        eval_on_start=validates and not resumes,
        per_device_eval_batch_size=batch_size,
        prediction_loss_only=True,
        max_grad_norm=MAX_GRAD_NORM,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saves else "no",
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        report_to=list(report_to),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    num_batches = math.ceil(math.ceil(num_examples / batch_size) / arguments.world_size)
    steps_per_epoch = math.ceil(num_batches / gradient_accumulation_steps)
    least = MIN_STEPS if epochs is None and method in MEMORY_METHODS else 0
    arguments.max_steps = max_steps or max(least, (epochs or EPOCHS) * steps_per_epoch)
    arguments.eval_steps = steps_per_epoch
    arguments.save_steps = min(steps_per_epoch, SAVE_STEPS)
    # one process uses one device: on several, Trainer would copy the model in every step (use torchrun)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments, steps_per_epoch
