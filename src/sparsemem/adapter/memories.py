"""The memories of a model: which are active, what of them trains, their gates, and rows in fewer bits."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..layer.memory import ProductKeyMemory
from ..layer.tables import QuantizedRows
from .config import TRAINABLE
from .layers import SparseMemoryLayer, freeze, tail_of


def memory_layers(model: nn.Module) -> dict[str, ProductKeyMemory]:
    """The memory layers of the active adapter, by module path in the base model, from first to last layer.

    Raises:
        ValueError: the model has no active sparse memory, or several adapters with one are active.
    """
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, SparseMemoryLayer)
    }
    found = {name: layer.active_memories() for name, layer in layers.items()}
    if not any(found.values()):
        raise ValueError(
            f"model: {type(model).__name__} has no active sparse memory; add one with "
            "get_peft_model(model, SparseMemoryConfig())"
        )
    active = {
        name
        for layer in layers.values()
        for name in layer.active_adapters
        if name in layer.sparse_memory_layers
    }
    if len(active) > 1:
        raise ValueError(
            f"model: several sparse memories are active ({', '.join(sorted(active))}); "
            "call set_adapter(name) to make one active"
        )
    return {name: memories[0] for name, memories in found.items() if memories}


def check_bare(model: nn.Module) -> None:
    """Check that no adapter has changed a base model's layers.

    Raises:
        ValueError: one has. Two models on one base would change each other's answers.
    """
    held = [one for one in model.modules() if isinstance(one, BaseTunerLayer)]
    found = [one for one in held if not isinstance(one, SparseMemoryLayer) or one.sparse_memory_layers]
    if found:
        kind = "a sparse memory" if isinstance(found[0], SparseMemoryLayer) else "an adapter"
        raise ValueError(
            f"model: the base model already carries {kind}, of an earlier run or Stream, and a second one "
            "would change its answers; load the base model again for each, or call unload() (for a LoRA, "
            "merge_and_unload()) on the model that carries it"
        )


def gated_layers(layers: Mapping[str, ProductKeyMemory]) -> dict[str, ProductKeyMemory]:
    """The memory layers that have a scope of their own.

    With `write="last"` this is the deepest layer, whose gate holds for all layers. With `write="own"` it is
    every layer.

    Args:
        layers: all memory layers of one adapter, by name, from first to last.
    """
    return dict(list(layers.items())[-1:]) if writes_last(layers) else dict(layers)


def layer_gates(
    layers: Mapping[str, ProductKeyMemory], states: Mapping[str, Tensor], places: Tensor | None = None
) -> dict[str, Tensor]:
    """The gate of each layer: by layer name, g [tokens], by which the layer's read is multiplied.

    Args:
        layers: all memory layers of one adapter, by name, from first to last.
        states: by layer name, the layer's input [tokens, d_in].
        places: [tokens] int64, which token of a taught answer is given, as from `fact_places`, -1 for none.
    """
    gates = {name: memory.relevance(states[name]) for name, memory in gated_layers(layers).items()}
    if places is not None:
        gates = {name: torch.where(places.to(g.device) >= 0, 1.0, g) for name, g in gates.items()}
    return {name: gates.get(name, next(reversed(gates.values()))) for name in layers}


@torch.no_grad()
def fact_places(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Which token of a taught answer the active adapter gives at each token: [batch, seq] int64, -1 for none.

    Numbers are places in `Scope.facts.answers` of its deepest layer. The model runs once.

    Args:
        batch: input_ids and, if there is padding, attention_mask, [batch, seq].

    Raises:
        ValueError: the model has no active sparse memory.
    """
    ids = batch["input_ids"]
    deepest = list(memory_layers(model).values())[-1]
    tail = tail_of(model)
    if tail is None or not deepest.has_facts:
        return torch.full_like(ids, -1)
    with tail.recording() as found:
        model(
            **{key: one.to(deepest.values.device) for key, one in batch.items() if key != "labels"},
            use_cache=False,
        )
    return found.get(model.active_adapter, torch.full_like(ids, -1))  # type: ignore[arg-type]


def key_layers_of(model: Any) -> list[str]:
    """Paths of the modules whose inputs give the active adapter's question key; none: it holds no facts."""
    return model.peft_config[model.active_adapter].key_layers or []


def writes_last(layers: Mapping[str, ProductKeyMemory]) -> bool:
    """Whether all layers have `write="last"`."""
    return all(memory.write == "last" for memory in layers.values())


def set_trainable(model: nn.Module, trainable: str) -> None:
    """Change which parameters of the active adapter's memory train (`SparseMemoryConfig.trainable`).

    For example between the two stages of the paper: the dense retrofit trains the whole memory, finetuning
    trains only its value rows.

    Args:
        model: a model with memory layers, changed in place.
        trainable: "values", "values+scale" or "memory".

    Raises:
        ValueError: `trainable` is not one of these, or the model has no active sparse memory.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable={trainable!r} must be one of {', '.join(map(repr, TRAINABLE))}")
    for memory in memory_layers(model).values():
        freeze(memory, trainable)
    model.peft_config[model.active_adapter].trainable = trainable  # type: ignore[index,union-attr]


def quantize_rows(model: nn.Module, bits: int = 8) -> dict[str, QuantizedRows]:
    """Store the value rows of the active adapter in 8 or 4 bits, in place. They can only be read then.

    Args:
        model: a model with memory layers.
        bits: 8 or 4.

    Returns:
        The rows by `memory_layers` name; `num_bytes()` of each says how much it takes.

    Raises:
        ValueError: another number of bits, an odd row width with 4 bits, the rows are quantised already, or
            the model has no active sparse memory.
    """
    layers = memory_layers(model)
    done = [name for name, memory in layers.items() if isinstance(memory.values, QuantizedRows)]
    if done:
        raise ValueError(f"model: the rows of {done[0]} are quantised already; load the adapter again")
    tables = {name: QuantizedRows(memory.values, bits) for name, memory in layers.items()}
    for name, memory in layers.items():
        del memory.values
        memory.values = tables[name]  # type: ignore[assignment]
        memory.register_state_dict_pre_hook(_refuse)
    return tables


def _refuse(*_: Any) -> None:
    raise ValueError(
        "model: its value rows are quantised, so its state cannot be saved; save the adapter before "
        "quantize_rows"
    )
