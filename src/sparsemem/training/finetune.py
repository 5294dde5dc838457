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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..background.background import Background
from ..data.elsewhere import answers_elsewhere
from ..data.general import general_background, say_shipped
from ..data.mentions import KEEP_FORMS, mention_records, subjects_of
from ..data.models import tokenizer_of
from ..data.records import batches as batched
from ..data.records import collate, encode, read_records, truncate
from ..optim.rows import REST_LR, RowOptimizer
from ..optim.selection import Rule
from ..patches.patch import RowPatch
from ..precision import computing_in, precision_of
from .cached import StateRows, TailHead, collate_states, train_states
from .callbacks import METRICS_FILE, MetricsFile, StopAtLoss, Stopwatch, recent_loss
from .footprint import peak_memory
from .methods import MAX_GRAD_NORM, MEMORY_METHODS, TOP_T, check_method, prepare
from .trainer import FinetuneTrainer

logger = logging.getLogger(__name__)

WARMUP_STEPS = 5
# Steps between two checkpoints, at most; an epoch if that is less.
SAVE_STEPS = 500
BACKGROUND_BATCH_SIZE = 8

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
# Passes over the data; a step on cached states costs little, so that sparse memory takes at least so many.
EPOCHS, MIN_STEPS = 3, 200
CACHE_BYTES = 2**31
# Other questions about each taught subject, tokens of their answers, and subjects that are facts, at most.
MENTION_FORMS, MENTION_LENGTH, MENTION_SUBJECTS = 4, 12, 256

Data = str | Path | Sequence[dict] | Sequence[str] | datasets.Dataset


@dataclass(frozen=True)
class Finetuned:
    """What a run made and what it cost.

    Attributes:
        precision: "float32" or "bfloat16", in which the model computed; other weights' own dtype.
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
    precision: str = "float32"


def finetune(
    model: PreTrainedModel | PeftModel,
    data: Data,
    method: str = "smf",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    background: Background | Data | None = None,
    keep: Data | None = None,
    mentions: int = MENTION_FORMS,
    output_dir: str | Path | None = None,
    lr: float | None = None,
    rest_lr: float = REST_LR,
    max_steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    max_length: int | None = None,
    loss_on: str = "completion",
    stop_loss: float | None = None,
    seed: int = 0,
    top_t: int = TOP_T,
    rule: Rule = "grad",
    moments: str = "table",
    schedule: str | None = None,
    warmup_steps: int = WARMUP_STEPS,
    validation: Data | None = None,
    quirks: Sequence[str] = (),
    cache_bytes: int = CACHE_BYTES,
    precision: str | None = None,
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
        keep: of "smf": records whose answers must stay as they are although they are near to what is taught,
            whatever they are about.
        mentions: of "smf": other questions about each taught subject, so many, whose answers by the base are
            kept too (`mention_records`). Not for more than MENTION_SUBJECTS subjects, which are a domain
            rather than facts, nor for data without prompts. 0: none.
        output_dir: where checkpoints and `metrics.jsonl`, one line per step, go; None: nowhere. The finished
            model is the caller's to save.
        rest_lr: of what trains beside value rows (alpha, keys), see `RowAdamW`.
        epochs: None: EPOCHS, and for sparse memory at least MIN_STEPS steps.
        max_steps: overrides epochs.
        max_length: None: the model's context.
        moments, quirks: of sparse memory, see `RowAdamW` and `quirks`.
        schedule: "constant", "linear" or "cosine" to 0, after `warmup_steps` of linear rise; None: "linear"
            for sparse memory, "constant" for the others.
        validation: data whose loss is read before training, after each epoch, and at the end.
        stop_loss: stop as soon as the mean loss of the last epoch's worth of steps is below.
        cache_bytes: a tail memory trains on the base's states, computed once; up to so many bytes of them are
            kept in memory, more in a file beside the checkpoints. 0: every step computes its own.
        precision: "float32", "bfloat16" (products of float32 weights, by autocast), or None for the faster
            one on this device.
        resume: continue from the last whole checkpoint in output_dir, or begin where there is none.

    Under torchrun the processes share each step: a step's batch is `batch_size` times their number. The first
    one decides (calibration, scope, selection) and writes.

    Raises:
        ValueError: bad data or an option out of range, or a loss that is no longer finite.
    """
    if not 0 <= mentions <= len(KEEP_FORMS):
        raise ValueError(f"mentions={mentions} is out of range; give 0 to {len(KEEP_FORMS)} question forms")
    counts = {"epochs": epochs, "batch_size": batch_size, "max_steps": max_steps, "max_length": max_length}
    _check(method, schedule, output_dir, resume, cache_bytes, **counts)
    schedule = schedule or ("linear" if method in MEMORY_METHODS else "constant")
    tokenizer = tokenizer or tokenizer_of(model)
    # under an attention mask and labels of -100 any token can pad
    pad: Any = tokenizer.pad_token_id or 0
    length = max_length or getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    examples, truncated = truncate(_examples(data, tokenizer, loss_on), length)
    held_out = None if validation is None else truncate(_examples(validation, tokenizer, loss_on), length)[0]
    kept = [] if keep is None else truncate(_examples(keep, tokenizer, "completion"), length)[0]
    mentioned = data if method == "smf" and mentions else []
    general = _general(background, model, method, tokenizer, length, pad)

    with ExitStack() as stack:
        stack.enter_context(computing_in(precision))
        used = precision_of(model)
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = _last_checkpoint(folder) if resume else None
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
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
        least = MIN_STEPS if epochs is None and method in MEMORY_METHODS else 0
        num_steps = max_steps or max(least, (epochs or EPOCHS) * steps_per_epoch)
        arguments.max_steps = num_steps
        arguments.eval_steps = steps_per_epoch
        arguments.save_steps = min(steps_per_epoch, SAVE_STEPS)
        # several devices are for torchrun: within one process Trainer would copy the model in every step
        arguments._n_gpu = min(arguments.n_gpu, 1)
        memory = stack.enter_context(peak_memory(model.to(arguments.device)))  # type: ignore[arg-type]
        stopwatch = Stopwatch()
        set_seed(seed)
        kept = [*kept, *_mention_examples(model, mentioned, tokenizer, mentions)]

        def known(seen: Background) -> list[dict[str, Tensor]]:
            elsewhere = answers_elsewhere(examples, tokenizer, seen.contexts)
            return batched([*elsewhere, *kept], BACKGROUND_BATCH_SIZE, pad)

        def states(prepared: PeftModel) -> tuple[TailHead, StateRows] | None:
            return train_states(prepared, examples, pad, cache_bytes, folder)

        prepared = prepare(
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
            known=known,
            states=states,
        )
        model, optimizer = prepared.model, prepared.optimizer
        if isinstance(optimizer, RowOptimizer):
            # it clips what it moves, once, and together
            arguments.max_grad_norm = 0.0
        stack.enter_context(_without_cache(model))
        head, rows = prepared.states or (None, examples)
        if head is not None and held_out is not None:
            held_out = StateRows(head, held_out, cache_bytes, folder)
        trainer = FinetuneTrainer(
            head,
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=partial(collate, pad_token_id=pad) if head is None else collate_states,
            eval_dataset=held_out,
            optimizers=(optimizer, None),
            callbacks=[
                stopwatch,
                StopAtLoss(stop_loss, steps_per_epoch),
                *([MetricsFile(folder / METRICS_FILE)] if output_dir else []),
            ],
        )
        reached = None
        if checkpoint is not None:
            reached = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
            stopwatch.go_on(reached)
        if checkpoint and reached and reached.global_step >= num_steps:
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
        patch=None if prepared.before is None else RowPatch.diff(model, since=prepared.before),
        background=getattr(optimizer, "background", None),
        precision=used,
    )


def _mention_examples(model: Any, data: Any, tokenizer: PreTrainedTokenizerBase, number: int) -> list[dict]:
    """The base's own answers to other questions about what the data teaches, encoded."""
    if not isinstance(data, str | Path):
        data = [record for record in data if isinstance(record, dict) and "input_ids" not in record]
    records = read_records(data) if data else []
    subjects = subjects_of(records) if any("text" not in record for record in records) else []
    if not subjects:
        return []
    if len(subjects) > MENTION_SUBJECTS:
        logger.info("%d subjects are a domain, so other questions about them are not kept", len(subjects))
        return []
    options = {"forms": KEEP_FORMS[:number], "max_new_tokens": MENTION_LENGTH}
    return encode(mention_records(model, tokenizer, records, **options), tokenizer)


def _general(
    background: Any, model: Any, method: str, tokenizer: PreTrainedTokenizerBase, length: int, pad: int
) -> Background | list[dict[str, Tensor]] | None:
    """The Background that was given, or batches of general text for a new memory."""
    if background is None and method in MEMORY_METHODS and not isinstance(model, PeftModel):
        say_shipped()
        background = general_background()
    if background is None or isinstance(background, Background):
        return background
    general = truncate(_examples(background, tokenizer, "completion", mixed=True), length)[0]
    return batched(sorted(general, key=lambda one: len(one["input_ids"])), BACKGROUND_BATCH_SIZE, pad)


@contextmanager
def _without_cache(model: Any):
    """Trainer switches the KV cache off for good; it comes back after the block."""
    before = model.config.use_cache
    try:
        yield
    finally:
        model.config.use_cache = before


def _check(
    method: str,
    schedule: str | None,
    output_dir: str | Path | None,
    resume: bool,
    cache_bytes: int,
    **counts: int | None,
) -> None:
    check_method(method)
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes={cache_bytes} is negative; give 0 for no cache, or a number of bytes")
    if schedule is not None and schedule not in SCHEDULES:
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
