"""What the runs of all recipes share: methods with a memory, costs of training, stages, example answers."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...choices import LEARN, MEMORY_METHODS, PRECISIONS
from ...data.general import prose
from ..compare import BASE, PARTIAL
from .questions import background_records

_COSTS = ("loss", "steps", "seconds", "trained_params", "peak_bytes")
# the costs of training in the row of the base model, which is not trained
UNTRAINED = {"loss": None, "steps": 0, "samples": 0, "seconds": 0.0, "trained_params": 0, "peak_bytes": 0}


def costs(done: Any, batch_size: int) -> dict[str, Any]:
    """The costs of training, from the `Finetuned` of `finetune`; `batch_size` is of a whole step."""
    return {**{name: getattr(done, name) for name in _COSTS}, "samples": done.steps * batch_size}


def precision_setting(name: str) -> str | None:
    """The precision that a recipe's setting names; None for "auto", which means the faster one.

    Raises:
        ValueError: the name is unknown.
    """
    allowed = ("auto", *PRECISIONS)
    if name not in allowed:
        raise ValueError(f"precision={name!r} is unknown; use one of {', '.join(allowed)}")
    return None if name == "auto" else name


def keep_metrics(folder: Path) -> None:
    """Copy the training log out of the partial folder, which is removed when the run is finished."""
    from ...training.trainer import METRICS_FILE

    shutil.copyfile(folder / PARTIAL / METRICS_FILE, folder / METRICS_FILE)


def stages(method: str, probes: Mapping[str, float], teaching: Mapping[str, float]) -> dict[str, float]:
    """Stages of one run with their expected seconds: loading, training (not for the base), evaluation."""
    taught = {} if method == BASE else {"teach": teaching.get(method, teaching["lora"])}
    return {"load the model": 2, **taught, **probes}


def told(items: Sequence[Mapping[str, Any]], answers: Any) -> list[dict[str, Any]]:
    """Questions with the model's answers, for reports; `answers` are the `Answers` of `recall`."""
    return [
        {"question": item["question"], "expected": item["answer"], "answer": text, "right": right}
        for item, text, right in zip(items, answers.texts, answers.correct, strict=True)
    ]


def spread(items: Sequence[Any], number: int = 3) -> list[Any]:
    """`number` items, evenly spaced from the first to the last."""
    return [items[i * (len(items) - 1) // (number - 1)] for i in range(number)]


def refuse_data_dir(recipe: str, data_dir: Path | None) -> None:
    """Check that no `data_dir` is given to a recipe with its own data.

    Raises:
        ValueError: a `data_dir` is given.
    """
    if data_dir is not None:
        raise ValueError(
            f"{recipe} has its own data, but data_dir is {str(data_dir)!r}; leave out --data-dir"
        )


def background(seed: int, tokenizer: Any, prose_tokens: int, piece_tokens: int) -> list[Any]:
    """Background texts: chats and pieces of prose, none of which is used for evaluation."""
    ids = tokens(tokenizer, prose()[0], prose_tokens)
    return [*background_records(seed), *map(tokenizer.decode, ids.split(piece_tokens))]


def read_prose(
    model: Any, tokenizer: Any, base_name: str, method: str, prose_tokens: int, piece_tokens: int
) -> dict[str, float]:
    """Perplexity, drift from the base model and (sparse memory) exposure, on prose outside the background."""
    from ...data.models import load_base
    from ...data.records import opening_ids
    from ...evaluation.probes import drift, exposure, perplexity

    probe = tokens(tokenizer, prose()[1], prose_tokens)
    opening = opening_ids(tokenizer)
    figures = {"perplexity": perplexity(model, probe, opening=opening), "drift": 0.0}
    if method != BASE:
        # OSF has no weights of the base to go back to, only their decomposition
        untouched = load_base(base_name)[0] if method == "osf" or not hasattr(model, "peft_config") else None
        figures["drift"] = drift(model, untouched, probe, opening=opening)
    if method in (LEARN, *MEMORY_METHODS):
        pieces = [tokenizer.decode(piece) for piece in probe.split(piece_tokens)]
        figures["exposure"] = exposure(model, pieces, tokenizer)
    return figures


def tokens(tokenizer: Any, text: str, num_tokens: int) -> Any:
    """The text's first tokens, int64 [num_tokens]."""
    import torch

    # enough text for this many tokens, but not so much that tokenizing it takes long
    return torch.tensor(tokenizer(text[: 8 * num_tokens], add_special_tokens=False).input_ids[:num_tokens])
