"""The memories of a model: which are active, what of them trains, their gates, and rows in fewer bits."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layer.memory import ProductKeyMemory
from ..layer.tables import QuantizedRows
from .config import TRAINABLE
from .layers import SparseMemoryLayer, freeze


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


def gated_layers(layers: Mapping[str, ProductKeyMemory]) -> dict[str, ProductKeyMemory]:
    """The memory layers that have a scope of their own.

    With `write="last"` this is the deepest layer, whose gate holds for all layers. With `write="own"` it is
    every layer.

    Args:
        layers: all memory layers of one adapter, by name, from first to last.
    """
    return dict(list(layers.items())[-1:]) if writes_last(layers) else dict(layers)


def layer_gates(layers: Mapping[str, ProductKeyMemory], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gate of each layer: by layer name, g [tokens], by which the layer's read is multiplied.

    Args:
        layers: all memory layers of one adapter, by name, from first to last.
        states: by layer name, the layer's input [tokens, d_in].
    """
    gates = {name: memory.relevance(states[name]) for name, memory in gated_layers(layers).items()}
    return {name: gates.get(name, next(reversed(gates.values()))) for name in layers}


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
