"""finetune(): one function over `transformers.Trainer` for every method.

Choices: by default a constant rate after WARMUP_STEPS, so that a longer run continues a shorter one; every
step's loss goes into Trainer's log, from which stopping is decided, so that a resumed run stops where one
without a break would; memory is the growth of the process's resident set, as a user sees it, or of the GPU's
allocations.
"""

import json
import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from .access import Background
from .callbacks import METRICS_FILE, MetricsFile, Progress, StopAtLoss, Stopwatch, recent_loss
from .data import batches as batched
from .data import collate, encode, read_records, truncate
from .footprint import peak_memory
from .general import general_background, say_shipped
from .methods import MAX_GRAD_NORM, TOP_T, check_method, prepare
from .models import autocast, takes, tokenizer_of
from .optim import REST_LR, RowOptimizer
from .patch import RowPatch
from .selection import Rule

logger = logging.getLogger(__name__)

WARMUP_STEPS = 5
# Steps between two checkpoints, at most; an epoch if that is less.
SAVE_STEPS = 500
BACKGROUND_BATCH_SIZE = 8

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}

Data = str | Path | Sequence[dict] | Sequence[str] | datasets.Dataset


@dataclass(frozen=True)
class Finetuned:
    """What a run made and what it cost.

    Attributes:
        loss: mean training loss of the last epoch's worth of steps.
        validation_loss: at the end; None without validation data.
        seconds: of preparing (calibration and scope too) and training, over all parts of a resumed run.
        peak_bytes: growth of the process's memory, or of the GPU's, at its highest; of the last part's.
        truncated: records cut to max_length.
        patch: the rows that sparse memory wrote; None for other methods.
        background: of sparse memory: what a later `finetune` of the same model needs; None for other methods.
    """

    model: PreTrainedModel | PeftModel
    method: str
    steps: int
    loss: float
    validation_loss: float | None
    seconds: float
    trained_params: int
    peak_bytes: int
    truncated: int
    patch: RowPatch | None
    background: Background | None = None


def finetune(
    model: PreTrainedModel | PeftModel,
    data: Data,
    method: str = "smf",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    background: Background | Data | None = None,
    output_dir: str | Path | None = None,
    lr: float | None = None,
    rest_lr: float = REST_LR,
    max_steps: int | None = None,
    epochs: int = 3,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    max_length: int | None = None,
    loss_on: str = "completion",
    stop_loss: float | None = None,
    seed: int = 0,
    top_t: int = TOP_T,
    rule: Rule = "grad",
    moments: str = "table",
    schedule: str = "constant",
    warmup_steps: int = WARMUP_STEPS,
    validation: Data | None = None,
    quirks: Sequence[str] = (),
    resume: bool = False,
) -> Finetuned:
    """Teach a causal language model, in place, what the data says.

    Args:
        model: a base model, or one with an adapter of the same method, which then trains on.
        data: whatever `read_records` takes, or examples that `encode` made.
        method: one of "smf", "smf-open", "lora", "full", see `methods`.
        tokenizer: None: the one that the model's name leads to.
        background: of sparse memory: the Background that `calibrate` returned, or data (mixed shapes and
            plain strings too) on which a new memory is calibrated; None: `general_background`, for a base
            model.
        output_dir: where checkpoints and `metrics.jsonl`, one line per step, go; None: nowhere. The finished
            model is the caller's to save.
        rest_lr: of what trains beside value rows (alpha, keys), see `RowAdamW`.
        max_steps: overrides epochs.
        max_length: None: the model's context.
        moments, quirks: of sparse memory, see `RowAdamW` and `quirks`.
        schedule: "constant" or "cosine" to 0, after `warmup_steps` of linear rise.
        validation: data whose loss is read before training, after each epoch, and at the end.
        stop_loss: stop as soon as the mean loss of the last epoch's worth of steps is below.
        resume: take up the last whole checkpoint in output_dir, or begin where there is none.

    Under torchrun the processes share each step: a step's batch is `batch_size` times their number. The first
    one decides (calibration, scope, selection) and writes.

    Raises:
        ValueError: bad data or an option out of range, or a loss that is no longer finite.
    """
    _check(
        method,
        schedule,
        output_dir,
        resume,
        epochs=epochs,
        batch_size=batch_size,
        max_steps=max_steps,
        max_length=max_length,
    )
    tokenizer = tokenizer or tokenizer_of(model)
    # under an attention mask and labels of -100 any token can pad
    pad: Any = tokenizer.pad_token_id or 0
    length = max_length or getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    examples, truncated = truncate(_examples(data, tokenizer, loss_on), length)
    held_out = None if validation is None else truncate(_examples(validation, tokenizer, loss_on), length)[0]
    if background is None and method in ("smf", "smf-open") and not isinstance(model, PeftModel):
        say_shipped()
        background = general_background()
    general: Any = background
    if background is not None and not isinstance(background, Background):
        general = truncate(_examples(background, tokenizer, "completion", mixed=True), length)[0]
        general = batched(sorted(general, key=lambda one: len(one["input_ids"])), BACKGROUND_BATCH_SIZE, pad)

    with ExitStack() as stack:
        checkpoints = output_dir or stack.enter_context(tempfile.TemporaryDirectory())
        checkpoint = _last_checkpoint(checkpoints) if resume else None
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            num_train_epochs=epochs,
            max_steps=max_steps or -1,
            lr_scheduler_type=SCHEDULES[schedule],
            warmup_steps=warmup_steps,
            eval_strategy="no" if validation is None else "steps",
            eval_on_start=validation is not None and checkpoint is None,
            per_device_eval_batch_size=batch_size,
            prediction_loss_only=True,
            max_grad_norm=MAX_GRAD_NORM,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps" if output_dir else "no",
            save_total_limit=2,
            seed=seed,
            data_seed=seed,
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        num_batches = math.ceil(math.ceil(len(examples) / batch_size) / arguments.world_size)
        steps_per_epoch = math.ceil(num_batches / gradient_accumulation_steps)
        arguments.eval_steps = steps_per_epoch
        arguments.save_steps = min(steps_per_epoch, SAVE_STEPS)
        # several devices are for torchrun: within one process Trainer would copy the model in every step
        arguments._n_gpu = min(arguments.n_gpu, 1)
        memory = stack.enter_context(peak_memory(model.to(arguments.device)))  # type: ignore[arg-type]
        stopwatch = Stopwatch()
        set_seed(seed)
        model, optimizer, before = prepare(
            model,
            method,
            batches=batched(examples, batch_size, pad),
            background=general,
            lr=lr,
            rest_lr=rest_lr,
            top_t=top_t,
            rule=rule,
            moments=moments,
            quirks=quirks,
            seed=seed,
        )
        if isinstance(optimizer, RowOptimizer):
            # it clips what it moves, once, and together
            arguments.max_grad_norm = 0.0
        stack.enter_context(_without_cache(model))
        trainer = _Trainer(
            model=model,  # type: ignore[arg-type]
            args=arguments,
            train_dataset=examples,  # type: ignore[arg-type]
            data_collator=partial(collate, pad_token_id=pad),
            eval_dataset=held_out,  # type: ignore[arg-type]
            optimizers=(optimizer, None),
            callbacks=[
                stopwatch,
                StopAtLoss(stop_loss, steps_per_epoch),
                *([MetricsFile(Path(output_dir) / METRICS_FILE)] if output_dir else []),
            ],
        )
        # the stock callbacks print every log to stdout, which is for results
        trainer.remove_callback(PrinterCallback)
        if not arguments.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(Progress)
        if isinstance(optimizer, RowOptimizer):
            # it averages over processes itself, and DDP refuses a model where rows alone train
            prepare_model = partial(trainer.accelerator.prepare_model, evaluation_mode=True)
            trainer.accelerator.prepare_model = prepare_model
        reached = None
        if checkpoint is not None:
            reached = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
            stopwatch.go_on(reached)
        if checkpoint and reached and reached.global_step >= (max_steps or epochs * steps_per_epoch):
            # Trainer would look at the number of steps only after one more
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = reached
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        history = trainer.state.log_history
        if held_out is not None and _last(history, "eval_loss")["step"] < trainer.state.global_step:
            trainer.evaluate()
        seconds = stopwatch.seconds
        if isinstance(optimizer, RowOptimizer):
            optimizer.release()
    return Finetuned(
        model=model.eval(),
        method=method,
        steps=trainer.state.global_step,
        loss=recent_loss(history, steps_per_epoch),
        validation_loss=next(
            (entry["eval_loss"] for entry in reversed(trainer.state.log_history) if "eval_loss" in entry),
            None,
        ),
        seconds=seconds,
        trained_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        peak_bytes=memory.peak_bytes,
        truncated=truncated,
        patch=None if before is None else RowPatch.diff(model, since=before),
        background=getattr(optimizer, "background", None),
    )


class _Trainer(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        # the vocabulary's logits are a fifth of a small model's work, and most positions carry no loss
        if takes(self.model, "logits_to_keep"):  # type: ignore[arg-type]
            labels = inputs["labels"][:, 1:]
            kept = (labels != -100).any(dim=0).nonzero().squeeze(1)
            inputs = {**inputs, "logits_to_keep": kept, "shift_labels": labels[:, kept].contiguous()}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs, start_time=None):
        # Trainer's norm is that of `.grad`, which value rows do not have
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if "grad_norm" in logs and isinstance(optimizer, RowOptimizer):
            logs = {**logs, "grad_norm": float(optimizer.last_grad_norm)}  # type: ignore[arg-type]
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        # reading data draws a random number, and a resumed run does not repeat what came before it
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        # unlike accelerate's mixed precision this leaves model.forward as it was
        return autocast(self.model)  # type: ignore[arg-type]


@contextmanager
def _without_cache(model: Any):
    """Trainer switches the KV cache off for good; it comes back after the block."""
    before = model.config.use_cache
    try:
        yield
    finally:
        model.config.use_cache = before


def _check(
    method: str, schedule: str, output_dir: str | Path | None, resume: bool, **counts: int | None
) -> None:
    check_method(method)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; allowed are {', '.join(SCHEDULES)}")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is too small; give at least 1")
    if resume and output_dir is None:
        raise ValueError("resume=True needs output_dir=, the folder with the checkpoints to take up")
    if output_dir and not resume and any(Path(output_dir).glob("checkpoint-*")):
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds checkpoints; pass resume=True or name another folder"
        )


def _examples(data: Any, tokenizer: PreTrainedTokenizerBase, loss_on: str, mixed: bool = False) -> list[dict]:
    if not isinstance(data, str | Path):
        data = [{"text": record} if isinstance(record, str) else record for record in data]
        if data and isinstance(data[0], dict) and "input_ids" in data[0]:
            return data
    return encode(read_records(data, mixed=mixed), tokenizer, loss_on=loss_on)


def _last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes its state last."""
    paths = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(paths):
        with suppress(OSError, json.JSONDecodeError):
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
    if paths:
        logger.warning("no whole checkpoint in %s: training begins from the start", folder)
    return None


def _last(log_history: list[dict], key: str) -> dict:
    return next(entry for entry in reversed(log_history) if key in entry)
