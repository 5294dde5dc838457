"""finetune(): one function over `transformers.Trainer` for every method.

Choices: by default a constant rate after WARMUP_STEPS, so that a longer run continues a shorter one; every
step's loss goes into Trainer's log, from which stopping is decided, so that a resumed run stops where one
without a break would; memory is the growth of the process's resident set, as a user sees it, or of the GPU's
allocations.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
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
from ..data.records import batches as batched
from ..data.records import collate
from ..optim.rows import REST_LR, RowOptimizer
from ..optim.selection import Rule
from ..patches.patch import RowPatch
from ..precision import computing_in, precision_of
from .arguments import WARMUP_STEPS, check_arguments, last_checkpoint, training_arguments
from .cached import StateRows, collate_states, train_states
from .callbacks import METRICS_FILE, MetricsFile, StopAtLoss, Stopwatch, recent_loss
from .footprint import peak_memory
from .loading import MENTION_FORMS, Data, RunData, known_batches, load_data, mention_examples
from .methods import TOP_T, Prepared, prepare
from .trainer import FinetuneTrainer

CACHE_BYTES = 2**31


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
    counts = {"epochs": epochs, "batch_size": batch_size, "max_steps": max_steps, "max_length": max_length}
    check_arguments(method, mentions, schedule, output_dir, resume, cache_bytes, **counts)
    tokenizer = tokenizer or tokenizer_of(model)
    loaded = load_data(
        model,
        method,
        tokenizer,
        data=data,
        validation=validation,
        keep=keep,
        background=background,
        max_length=max_length,
        loss_on=loss_on,
    )
    with ExitStack() as stack:
        stack.enter_context(computing_in(precision))
        used = precision_of(model)
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = last_checkpoint(folder) if resume else None
        arguments, steps_per_epoch = training_arguments(
            folder,
            len(loaded.examples),
            method,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            schedule=schedule,
            warmup_steps=warmup_steps,
            seed=seed,
            validates=validation is not None,
            resumes=checkpoint is not None,
            saves=bool(output_dir),
        )
        memory = stack.enter_context(peak_memory(model.to(arguments.device)))  # type: ignore[arg-type]
        stopwatch = Stopwatch()
        set_seed(seed)
        if method == "smf" and mentions:
            named = mention_examples(model, data, tokenizer, mentions)
            loaded = loaded._replace(kept=[*loaded.kept, *named])
        prepared = prepare(
            model,
            method,
            batches=batched(loaded.examples, batch_size, loaded.pad),
            background=loaded.general,
            lr=lr,
            rest_lr=rest_lr,
            top_t=top_t,
            rule=rule,
            moments=moments,
            quirks=quirks,
            seed=seed,
            known=partial(known_batches, loaded, tokenizer),
            states=lambda ready: train_states(ready, loaded.examples, loaded.pad, cache_bytes, folder),
        )
        stack.enter_context(_without_cache(prepared.model))
        callbacks = [stopwatch, StopAtLoss(stop_loss, steps_per_epoch)]
        callbacks += [MetricsFile(folder / METRICS_FILE)] if output_dir else []
        trainer = _trainer(prepared, loaded, arguments, callbacks, cache_bytes, folder)
        _train(trainer, checkpoint, stopwatch)
        seconds = stopwatch.seconds
        if isinstance(prepared.optimizer, RowOptimizer):
            prepared.optimizer.release()
    history = trainer.state.log_history
    return Finetuned(
        model=prepared.model.eval(),
        method=method,
        steps=trainer.state.global_step,
        loss=recent_loss(history, steps_per_epoch),
        validation_loss=_last(history, "eval_loss").get("eval_loss"),
        seconds=seconds,
        trained_params=sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        peak_bytes=memory.peak_bytes,
        truncated=loaded.truncated,
        patch=None if prepared.before is None else RowPatch.diff(prepared.model, since=prepared.before),
        background=getattr(prepared.optimizer, "background", None),
        precision=used,
    )


def _trainer(
    prepared: Prepared,
    loaded: RunData,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
    cache_bytes: int,
    folder: Path,
) -> FinetuneTrainer:
    """Trainer through the model, or through the head on cached states where `prepare` made them."""
    if isinstance(prepared.optimizer, RowOptimizer):
        # it clips what it moves, once, and together
        arguments.max_grad_norm = 0.0
    head, rows = prepared.states or (None, loaded.examples)
    held_out = loaded.held_out
    if head is not None and held_out is not None:
        held_out = StateRows(head, held_out, cache_bytes, folder)
    return FinetuneTrainer(
        head,
        model=prepared.model,
        args=arguments,
        train_dataset=rows,
        data_collator=partial(collate, pad_token_id=loaded.pad) if head is None else collate_states,
        eval_dataset=held_out,
        optimizers=(prepared.optimizer, None),
        callbacks=callbacks,
    )


def _train(trainer: FinetuneTrainer, checkpoint: str | None, stopwatch: Stopwatch) -> None:
    """Train to the end, from a checkpoint where there is one, and measure the loss on held-out data."""
    reached = None
    if checkpoint is not None:
        reached = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        stopwatch.go_on(reached)
    if checkpoint and reached and reached.global_step >= trainer.args.max_steps:
        # Trainer would look at the number of steps only after one more
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = reached
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.eval_dataset is None:
        return
    if _last(trainer.state.log_history, "eval_loss")["step"] < trainer.state.global_step:
        trainer.evaluate()


@contextmanager
def _without_cache(model: Any):
    """Trainer switches the KV cache off for good; it comes back after the block."""
    before = model.config.use_cache
    try:
        yield
    finally:
        model.config.use_cache = before


def _last(log_history: list[dict], key: str) -> dict:
    """The last entry with this key; an empty one where there is none."""
    return next((entry for entry in reversed(log_history) if key in entry), {})
