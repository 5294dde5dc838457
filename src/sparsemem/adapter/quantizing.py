"""Turn the value rows of a model into 8 or 4 bits, for inference."""

from typing import Any

from torch import nn

from ..layer.quantized import QuantizedRows
from .model import memory_layers


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
