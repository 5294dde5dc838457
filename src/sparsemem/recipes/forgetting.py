"""Measure forgetting on general prose, and make the background that should prevent it."""

from typing import Any

from ..comparison.compare import BASE
from ..data.general import prose
from .questions import background_records
from .runs import MEMORY_METHODS


def background(seed: int, tokenizer: Any, prose_tokens: int, piece_tokens: int) -> list[Any]:
    """Background texts: chats and pieces of prose, none of which is used for evaluation."""
    ids = tokens(tokenizer, prose()[0], prose_tokens)
    return [*background_records(seed), *map(tokenizer.decode, ids.split(piece_tokens))]


def read_prose(
    model: Any, tokenizer: Any, base_name: str, method: str, prose_tokens: int, piece_tokens: int
) -> dict[str, float]:
    """Perplexity, drift from the base model and (sparse memory) exposure, on prose outside the background."""
    from ..data.models import load_base
    from ..data.records import opening_ids
    from ..evaluation.probes import drift, exposure, perplexity

    probe = tokens(tokenizer, prose()[1], prose_tokens)
    opening = opening_ids(tokenizer)
    figures = {"perplexity": perplexity(model, probe, opening=opening), "drift": 0.0}
    if method != BASE:
        # OSF has no weights of the base to go back to, only their decomposition
        untouched = load_base(base_name)[0] if method == "osf" or not hasattr(model, "peft_config") else None
        figures["drift"] = drift(model, untouched, probe, opening=opening)
    if method in MEMORY_METHODS:
        pieces = [tokenizer.decode(piece) for piece in probe.split(piece_tokens)]
        figures["exposure"] = exposure(model, pieces, tokenizer)
    return figures


def tokens(tokenizer: Any, text: str, num_tokens: int) -> Any:
    """The text's first tokens, int64 [num_tokens]."""
    import torch

    # enough text for this many tokens, but not so much that tokenizing it takes long
    return torch.tensor(tokenizer(text[: 8 * num_tokens], add_special_tokens=False).input_ids[:num_tokens])
