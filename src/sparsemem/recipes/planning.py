"""What a run will take, from the model's configuration alone: for dry runs, with or without the Hub."""

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
    """The model of this name without its weights, on the meta device.

    Raises:
        ValueError: nothing goes by this name.
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
    """Memory that training adds: an adapter, and gradients and two moments of what trains, all in float32.

    Activations come on top. Sparse memory is counted as if all of its rows were selected: the most that there
    can be.

    Args:
        model: of `empty_model`; an adapter is put into it.
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
    """Memory of the model's weights in float32."""
    return 4 * _numbers(model)


def _numbers(model: Any) -> int:
    return sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
