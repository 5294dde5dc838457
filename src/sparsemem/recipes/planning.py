"""Estimate the memory of a run from the model's configuration alone, for dry runs with or without the Hub."""

from typing import Any

from peft import PeftConfig, get_peft_model

# Qwen2.5-0.5B-Instruct, the paper's model.
_PAPER_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
_PAPER_CONFIG = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def empty_model(name: str) -> Any:
    """The model with this name, without weights (on the meta device).

    Raises:
        ValueError: no model has this name.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from ..data.models import config_of

    try:
        config: Any = config_of(name)
    except ValueError:
        if name != _PAPER_MODEL:
            raise
        config = Qwen2Config(**_PAPER_CONFIG)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def training_bytes(model: Any, adapter: PeftConfig | None) -> int:
    """Bytes that training adds: the adapter, and gradients and two moments of trained parameters, in float32.

    Activations are not counted. Sparse memory is counted as if all its rows were selected, the maximum.

    Args:
        model: from `empty_model`; the adapter is added to it in place.
        adapter: None for full finetuning.
    """
    import torch

    before = _numbers(model)
    if adapter is not None:
        with torch.device("meta"):
            model = get_peft_model(model, adapter)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return 4 * (_numbers(model) - before + 3 * trained)


def weight_bytes(model: Any) -> int:
    """Bytes of the model's weights in float32."""
    return 4 * _numbers(model)


def _numbers(model: Any) -> int:
    return sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
