"""The paper's stage 1: make a new memory useful by training all of it on general text.

Deviations from 2605.03229: one record in HELD_OUT is held out, and the loss is measured on these records.
Statistics of states are kept with the access counts, so that a scope can be set on such a memory too.

Reference: 2605.03229, stage 1.
"""

from pathlib import Path
from typing import Any

from ..adapter.memories import set_trainable
from ..background.background import Background
from ..background.calibration import observe
from ..data.reading import read_records
from ..data.records import batches
from .finetune import finetune

# OpenAssistant's messages: the smallest length in characters, and the largest number of messages.
OASST_LEAST, OASST_MOST = 50, 50_000
HELD_OUT = 20
NUM_BACKGROUND_BATCHES = 2_000


def general_records(source: str) -> list[dict[str, Any]]:
    """Read records of general text; of OpenAssistant's messages, only those that the paper uses.

    These are English assistant messages of rank 0 or 1 with 50 characters or more, at most 50,000.

    Raises:
        ValueError: as `read_records`, or no message is of this kind.
    """
    records = read_records(source, mixed=True)
    if not {"message_tree_id", "role", "lang", "rank", "text"} <= records[0].keys():
        return records
    chosen = [
        {"text": one["text"]}
        for one in records
        if one["role"] == "assistant" and one["lang"] == "en" and one["rank"] in (0, 1)
    ]
    chosen = [one for one in chosen if len(one["text"]) >= OASST_LEAST]
    if not chosen:
        raise ValueError(
            f"{source} has no English assistant message of rank 0 or 1 with {OASST_LEAST} characters; "
            "give other text"
        )
    return chosen[:OASST_MOST]


def dense_retrofit(
    model: Any,
    examples: list[dict[str, Any]],
    tokenizer: Any,
    checkpoints: Path,
    resume: bool,
    *,
    seed: int,
    **options: Any,
) -> tuple[Background, dict[str, Any]]:
    """Train all of the model's memory on general text; afterwards only its value rows are trainable.

    Args:
        model: a base model with a new memory, see `methods.retrofit_config`.
        examples: as `encode` returns them.
        checkpoints: folder for checkpoints; with `resume` the run continues from the last one.
        options: of `finetune`: lr, epochs, max_steps, batch_size.

    Returns:
        The background, from batches of one example each as in the paper, and the run's figures.
    """
    held_out = examples[::HELD_OUT] if len(examples) > 1 else None
    kept = [one for place, one in enumerate(examples) if place % HELD_OUT] or examples
    done = finetune(
        model,
        kept,
        "dense",
        tokenizer=tokenizer,
        validation=held_out,
        schedule="cosine",
        output_dir=checkpoints,
        resume=resume,
        seed=seed,
        **options,
    )
    set_trainable(model, "values")
    single = batches(kept[:NUM_BACKGROUND_BATCHES], 1, tokenizer.pad_token_id)
    figures = ("steps", "loss", "validation_loss", "seconds", "trained_params", "peak_bytes")
    return observe(model, single, seed=seed), {key: getattr(done, key) for key in figures}
