"""Count the slots that a corpus reads."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..adapter.model import memory_layers
from ..layer.memory import ProductKeyMemory
from .background import Background, addressing_fingerprint
from .states import layer_inputs


def count_accesses(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Background:
    """Count the slots that a corpus reads. Tokens out of scope are counted too.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids and, if there is padding, attention_mask. Padding is not counted.

    Returns:
        A Background with only counts and df.

    Raises:
        ValueError: `batches` is empty, or a batch has no input_ids.
    """
    return count_reads(memory_layers(model), layer_inputs(model, batches, memory=True))


def count_reads(
    layers: Mapping[str, ProductKeyMemory], inputs: Iterable[tuple[Mapping[str, Tensor], dict[str, Tensor]]]
) -> Background:
    """As `count_accesses`, but from the output of `layer_inputs`."""
    counts = {name: torch.zeros(m.num_slots, dtype=torch.int64) for name, m in layers.items()}
    df = {name: torch.zeros_like(c) for name, c in counts.items()}
    digest, num_batches = hashlib.sha256(), 0

    for batch, states in inputs:
        digest.update(batch["input_ids"].cpu().contiguous().numpy().tobytes())
        num_batches += 1
        for name, x in states.items():
            read = torch.bincount(
                layers[name].address(x)[0].flatten().cpu(), minlength=layers[name].num_slots
            )
            counts[name] += read
            df[name] += (read > 0).long()
    background = Background.from_counts(counts, df, num_batches)
    background.corpus = digest.hexdigest()
    for name, memory in layers.items():
        background[name].addressing = addressing_fingerprint(memory)
    return background
