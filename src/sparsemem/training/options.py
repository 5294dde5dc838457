"""The options of a run: checked once, kept beside its checkpoints, and turned into Trainer's arguments."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..choices import LOSS_ON, MEMORY_METHODS, SCHEDULES, TRAINABLE
from ..data.known import KEEP_FORMS
from ..optim.rows import REST_LR
from ..optim.selection import Rule, check_selection

# The methods of `finetune` with their learning rates; None: the caller gives one.
LEARNING_RATES = {"smf": 0.4, "smf-open": 0.4, "lora": 2e-4, "peft": None, "full": 5e-5, "dense": 5e-4}
# Rows that a step may change in each table.
TOP_T = 1024
WARMUP_STEPS = 5
# The largest number of steps between two checkpoints; an epoch if that is shorter.
SAVE_STEPS = 500
# Default passes over the data, and the fewest steps of sparse memory, whose steps on cached states are cheap.
EPOCHS, MIN_STEPS = 3, 200
# "smf" has learnt when an epoch's mean loss is below this, and stops where no number of steps was given. On
# the choosing handbook recall does not rise after it (docs/results/stopping.jsonl).
LEARNT = 0.005
MENTION_FORMS = 4
CACHE_BYTES = 2**31
MAX_GRAD_NORM = 1.0
TRACKERS = ("tensorboard", "wandb", "trackio")

_AT_LEAST = {"epochs": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1, "max_length": 1}
_AT_LEAST |= {"warmup_steps": 0, "cache_bytes": 0}
# A run may be resumed with other values of these.
_FREE = ("max_steps", "epochs", "stop_loss", "cache_bytes")


@dataclass(frozen=True)
class Options:
    """All that decides how a run trains, except for model and data; `finetune` describes each field.

    Raises:
        ValueError: one or more are wrong. The message names all of them.
    """

    method: str = "smf"
    lr: float | None = None
    rest_lr: float = REST_LR
    max_steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_length: int | None = None
    loss_on: str = "completion"
    stop_loss: float | None = None
    seed: int = 0
    top_t: int = TOP_T
    rule: Rule = "grad"
    moments: str = "table"
    schedule: str | None = None
    warmup_steps: int = WARMUP_STEPS
    quirks: Sequence[str] = ()
    mentions: int = MENTION_FORMS
    trainable: str | None = None
    cache_bytes: int = CACHE_BYTES
    precision: str | None = None

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("; ".join(problems))

    @property
    def has_memory(self) -> bool:
        """Whether the method trains rows of a memory."""
        return self.method in MEMORY_METHODS

    @property
    def rate(self) -> float:
        """The learning rate: the one given, or the method's own."""
        found = LEARNING_RATES[self.method] if self.lr is None else self.lr
        assert found is not None
        return found

    @property
    def stops_below(self) -> float | None:
        """The mean loss of an epoch at which the run stops; None: it does not."""
        chosen = (self.stop_loss, self.max_steps, self.epochs) != (None, None, None)
        return self.stop_loss if chosen or self.method != "smf" else LEARNT

    def record(self) -> dict[str, Any]:
        """What a resumed run must have again, as JSON values; a callable is given by its name."""
        values = {key: value for key, value in asdict(self).items() if key not in _FREE}
        return {key: getattr(value, "__name__", value) for key, value in values.items()}

    def _problems(self) -> list[str]:
        found = [
            f"{name}={value} is too small; give at least {least}"
            for name, least in _AT_LEAST.items()
            if (value := getattr(self, name)) is not None and value < least
        ]
        for name, allowed in (("method", LEARNING_RATES), ("schedule", SCHEDULES), ("loss_on", LOSS_ON)):
            if (value := getattr(self, name)) is not None and value not in allowed:
                found.append(f"{name}={value!r} is unknown; allowed are {', '.join(allowed)}")
        if self.trainable is not None and self.trainable not in TRAINABLE:
            allowed = ", ".join(map(repr, TRAINABLE))
            found.append(f"trainable={self.trainable!r} must be one of {allowed}")
        if not 0 <= self.mentions <= len(KEEP_FORMS):
            found.append(
                f"mentions={self.mentions} is out of range; give 0 to {len(KEEP_FORMS)} question forms"
            )
        if self.lr is None and LEARNING_RATES.get(self.method, 0) is None:
            found.append(f"lr=None, and method {self.method!r} has no rate of its own; give one")
        for name, value in (("quirks", list(self.quirks)), ("trainable", self.trainable)):
            if value and not self.has_memory and self.method in LEARNING_RATES:
                found.append(
                    f"{name}={value!r} is for sparse memory only and method is {self.method!r}; leave it out"
                )
        try:
            check_selection(self.top_t, self.rule)
        except ValueError as error:
            found.append(str(error))
        return found


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
    options: Options,
    folder: Path,
    num_examples: int,
    *,
    validates: bool,
    resumes: bool,
    saves: bool,
    report_to: Sequence[str] = (),
) -> tuple[TrainingArguments, int]:
    """Trainer's arguments with the number of steps set, and the steps of one epoch.

    Args:
        folder: where checkpoints go.
        num_examples: number of training examples.
        validates: whether there is validation data.
        resumes: whether the run continues from a checkpoint.
        saves: whether checkpoints are written.
        report_to: as for `finetune`.
    """
    schedule = options.schedule or ("linear" if options.has_memory else "constant")
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        lr_scheduler_type=SCHEDULES[schedule],
        warmup_steps=options.warmup_steps,
        eval_strategy="steps" if validates else "no",
        eval_on_start=validates and not resumes,
        per_device_eval_batch_size=options.batch_size,
        prediction_loss_only=True,
        # a row optimizer clips the gradients of all that it trains itself
        max_grad_norm=0.0 if options.has_memory else MAX_GRAD_NORM,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saves else "no",
        save_total_limit=2,
        seed=options.seed,
        data_seed=options.seed,
        report_to=list(report_to),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
    )
    num_batches = math.ceil(math.ceil(num_examples / options.batch_size) / arguments.world_size)
    steps_per_epoch = math.ceil(num_batches / options.gradient_accumulation_steps)
    least = MIN_STEPS if options.epochs is None and options.has_memory else 0
    arguments.max_steps = options.max_steps or max(least, (options.epochs or EPOCHS) * steps_per_epoch)
    arguments.eval_steps = steps_per_epoch
    arguments.save_steps = min(steps_per_epoch, SAVE_STEPS)
    # one process uses one device: on several, Trainer would copy the model in every step (use torchrun)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments, steps_per_epoch
