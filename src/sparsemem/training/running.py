"""What `finetune` does with a prepared model: make its trainer, and train from the start or a checkpoint."""

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..data.records import collate
from ..optim.rows import RowOptimizer
from .cached import StateRows, collate_states
from .callbacks import Stopwatch
from .loading import RunData
from .methods import Prepared
from .trainer import FinetuneTrainer


def trainer_of(
    prepared: Prepared,
    loaded: RunData,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
    cache_bytes: int,
    folder: Path,
) -> FinetuneTrainer:
    """The trainer, of the whole model or, if `prepare` returned states, of the head on these states."""
    if isinstance(prepared.optimizer, RowOptimizer):
        # a row optimizer clips the gradients of all that it trains itself
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
    before = model.config.use_cache
    try:
        yield
    finally:
        model.config.use_cache = before


def last_with(log_history: list[dict], key: str) -> dict:
    """The last entry with this key; an empty one where there is none."""
    return next((entry for entry in reversed(log_history) if key in entry), {})
