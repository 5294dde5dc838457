"""finetune(): one function over `transformers.Trainer` for every method.

Choices: for LoRA and full finetuning the rate is constant by default after WARMUP_STEPS, so that a longer run
continues a shorter one. Every step's loss is written to Trainer's log. The decision to stop uses this log, so
a resumed run stops at the same step as an uninterrupted one. Memory use is the growth of the process's
resident set, or of the GPU's allocations.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..background.background import Background
from ..data.models import tokenizer_of
from ..data.records import collate
from ..optim.rows import REST_LR, RowOptimizer
from ..optim.selection import Rule
from ..patches.patch import RowPatch
from ..precision import computing_in, precision_of
from .cached import StateRows, collate_states
from .checkpoints import StopAtSignal, check_folder, keep_run, last_checkpoint, run_of
from .loading import Data, RunData, load_data
from .methods import Prepared, prepare
from .options import (
    CACHE_BYTES,
    MENTION_FORMS,
    TOP_T,
    WARMUP_STEPS,
    Options,
    check_trackers,
    training_arguments,
)
from .trainer import (
    METRICS_FILE,
    FinetuneTrainer,
    MetricsFile,
    StopAtLoss,
    Stopwatch,
    peak_memory,
    recent_loss,
)


@dataclass(frozen=True)
class Finetuned:
    """The result of a run and what it cost.

    Attributes:
        steps: optimizer steps, over all parts of a resumed run.
        loss: mean training loss of the last steps, as many as one epoch has.
        validation_loss: loss on the validation data at the end; None without validation data.
        seconds: time of preparation (with calibration and scope) and training, over all parts of a resumed
            run.
        trained_params: number of parameters that training may change.
        peak_bytes: largest growth of the process's or the GPU's memory; for a resumed run, of its last part.
        truncated: number of records cut to max_length.
        patch: the rows that sparse memory wrote; None for other methods.
        background: what a later `finetune` of the same memory needs; None for other methods.
        precision: "float32" or "bfloat16", in which the model computed; another dtype if the weights have it.
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
    trainable: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    precision: str | None = None,
    resume: bool = False,
    report_to: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> Finetuned:
    """Train a causal language model, in place, on the data.

    Args:
        model: a base model, or one with an adapter of the same method, which is trained further.
        data: anything that `read_records` reads, or examples that `encode` returned.
        method: one of "smf", "smf-open", "lora", "peft", "full", see `methods`.
        tokenizer: None: the tokenizer that is found by the model's name.
        background: for sparse memory: the Background that `calibrate` returned, or data on which a new memory
            is calibrated (records of mixed shapes and plain strings are allowed). None: `general_background`,
            for a base model.
        keep: for "smf": records whose answers must not change although they are similar to what is taught.
            They may be about anything.
        mentions: for "smf": number of other questions about each taught subject whose answers by the base
            model are kept too (`mention_records`); 0: none. Not used for more than MENTION_SUBJECTS subjects,
            which are a domain rather than facts, nor for data without prompts.
        output_dir: folder for checkpoints and `metrics.jsonl` (one line per step); None: neither is written.
            The caller saves the finished model.
        lr: learning rate; None: the method's own, see `methods`.
        rest_lr: learning rate of what trains besides value rows (alpha, keys), see `RowAdamW`.
        max_steps: number of steps; overrides epochs.
        epochs: None: EPOCHS, and for sparse memory at least MIN_STEPS steps, unless it has learnt before.
        max_length: in tokens; longer records are cut. None: the model's context length.
        loss_on: as for `encode`.
        stop_loss: stop when the mean loss of the last steps, as many as one epoch has, is below this. None:
            for "smf" without max_steps and epochs LEARNT, else never.
        top_t, rule: for sparse memory: which rows a step may change, see `select_rows`.
        moments, quirks: for sparse memory, see `RowAdamW` and `ReleaseAdamW`.
        trainable: for sparse memory: which of its parameters train, as in `SparseMemoryConfig`. None: as the
            model's adapter says, and only the rows of a new memory.
        schedule: of the learning rate, after `warmup_steps` of linear increase: "constant", or "linear" or
            "cosine" down to 0. None: "linear" for sparse memory, "constant" for other methods.
        validation: data on which the loss is measured before training, after each epoch, and at the end.
        cache_bytes: a tail memory trains on the base model's states, computed once. They are kept in memory,
            or in a file next to the checkpoints if larger than this. 0: each step computes them.
        precision: "float32", "bfloat16" (autocast of float32 weights), or None for the faster of the two on
            this device.
        resume: continue from the last complete checkpoint in output_dir; without one, start from the
            beginning.
        report_to: trackers that get the loss of every step: "tensorboard", "wandb", "trackio".
        callbacks: more callbacks for Trainer.

    Under torchrun the processes share each step: its batch is `batch_size` times the number of processes. The
    first process computes calibration, scope and selection for all, and writes the files.

    Raises:
        ValueError: bad data, an option out of range, an output_dir that cannot be written, a run to resume of
            other data or arguments, or a loss or gradient that is NaN or infinite in 10 steps in a row (each
            of these steps is skipped, with a warning).
        OSError: a checkpoint cannot be written. Earlier ones are unchanged.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, with output_dir, when a checkpoint of the last
            step has been written; continue with resume=True.
    """
    options = Options(
        method=method, lr=lr, rest_lr=rest_lr, max_steps=max_steps, epochs=epochs, batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps, max_length=max_length, loss_on=loss_on,
        stop_loss=stop_loss, seed=seed, top_t=top_t, rule=rule, moments=moments, schedule=schedule,
        warmup_steps=warmup_steps, quirks=tuple(quirks), mentions=mentions, trainable=trainable,
        cache_bytes=cache_bytes, precision=precision,
    )  # fmt: skip
    check_trackers(report_to)
    if output_dir is not None:
        check_folder(Path(output_dir), resume)
    elif resume:
        raise ValueError(
            "resume=True needs output_dir=; give the folder with the checkpoints to continue from"
        )
    tokenizer = tokenizer or tokenizer_of(model)
    taught = load_data(
        model, tokenizer, options, data=data, validation=validation, keep=keep, background=background
    )
    with ExitStack() as stack:
        stack.enter_context(computing_in(precision))
        used = precision_of(model)
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = last_checkpoint(folder) if resume else None
        if output_dir:
            run = run_of(model, {**options.record(), **taught.digests, "precision": used})
            keep_run(folder, run, resumes=checkpoint is not None)
        arguments, steps_per_epoch = training_arguments(
            options,
            folder,
            len(taught.examples),
            validates=validation is not None,
            resumes=checkpoint is not None,
            saves=bool(output_dir),
            report_to=report_to,
        )
        memory = stack.enter_context(peak_memory(model.to(arguments.device)))  # type: ignore[arg-type]
        stopwatch = Stopwatch()
        set_seed(seed)
        prepared = prepare(model, taught, options, folder)
        stack.enter_context(without_cache(prepared.model))
        stop = StopAtSignal()
        ours = [stopwatch, StopAtLoss(options.stops_below, steps_per_epoch)]
        ours += [stop, MetricsFile(folder / METRICS_FILE)] if output_dir else []
        trainer = trainer_of(prepared, taught, options, arguments, [*ours, *callbacks])
        with stop.listening() if output_dir else nullcontext():
            train(trainer, checkpoint, stopwatch)
        seconds = stopwatch.seconds
        if isinstance(prepared.optimizer, RowOptimizer):
            prepared.optimizer.release()
    history = trainer.state.log_history
    return Finetuned(
        model=prepared.model.eval(),
        method=method,
        steps=trainer.state.global_step,
        loss=recent_loss(history, steps_per_epoch),
        validation_loss=last_with(history, "eval_loss").get("eval_loss"),
        seconds=seconds,
        trained_params=sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        peak_bytes=memory.peak_bytes,
        truncated=taught.truncated,
        patch=None if prepared.before is None else RowPatch.diff(prepared.model, since=prepared.before),
        background=getattr(prepared.optimizer, "background", None),
        precision=used,
    )


def trainer_of(
    prepared: Prepared,
    data: RunData,
    options: Options,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> FinetuneTrainer:
    """The trainer, of the whole model or, if `prepare` returned states, of the head on these states."""
    head, rows = prepared.states or (None, data.examples)
    held_out = data.held_out
    if head is not None and held_out is not None:
        held_out = StateRows(head, held_out, options.cache_bytes, Path(arguments.output_dir or "."))
    return FinetuneTrainer(
        head,
        model=prepared.model,
        args=arguments,
        train_dataset=rows,
        data_collator=partial(collate, pad_token_id=data.pad) if head is None else collate_states,
        eval_dataset=held_out,
        optimizers=(prepared.optimizer, None),
        callbacks=callbacks,
    )


def train(trainer: FinetuneTrainer, checkpoint: str | None, stopwatch: Stopwatch) -> None:
    """Train to the end, from a checkpoint if there is one, and measure the loss on the held-out data."""
    reached = None
    if checkpoint is not None:
        reached = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        stopwatch.add_earlier(reached)
    if checkpoint and reached and reached.global_step >= trainer.args.max_steps:
        # Trainer would take one more step before it compares the number of steps
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = reached
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.skipped.in_a_row and trainer.skipped.in_a_row * 2 >= trainer.state.global_step:
            raise ValueError(
                f"the loss is NaN or infinite in the last {trainer.skipped.in_a_row} of "
                f"{trainer.state.global_step} steps; choose a smaller lr or check the data"
            )
    if trainer.eval_dataset is None:
        return
    if last_with(trainer.state.log_history, "eval_loss").get("step", -1) < trainer.state.global_step:
        trainer.evaluate()


@contextmanager
def without_cache(model: Any):
    """Restore `use_cache` after the block: Trainer switches the key-value cache off for good."""
    # the outer config of a model of several modalities has none
    before = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        if before is not None:
            model.config.use_cache = before
        elif hasattr(model.config, "use_cache"):
            del model.config.use_cache


def last_with(log_history: list[dict], key: str) -> dict:
    """The last entry with this key; an empty one where there is none."""
    return next((entry for entry in reversed(log_history) if key in entry), {})
