"""Estimate the memory of a run from the model's configuration alone, for dry runs with or without the Hub."""

from typing import Any

from peft import PeftConfig, get_peft_model

# Operations a second of a 24 GB card (A10, L4, RTX 4090), at a third of its bfloat16 peak.
GPU_FLOPS = 4e13
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

    from ...data.models import config_of

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


def gpu_estimate(
    model: Any, *, added_bytes: int, batch_tokens: int, all_tokens: int, trains_base: bool
) -> dict[str, float]:
    """Hours and peak memory of training on one 24 GB GPU with bfloat16 autocast: estimated, not measured.

    Operations per weight and token: two forward, two for the gradients of activations, and two for those of
    the base's weights where it trains. Activations per block and token: about 16 hidden states and 3 MLP
    states in bfloat16; logits with their gradient come on top.

    Args:
        model: of `empty_model`, without an adapter.
        added_bytes: of `training_bytes`.
        batch_tokens: of the largest batch that is held at once; all_tokens: of the whole run.
    """
    config = model.config.get_text_config()
    numbers = _numbers(model)
    block = 2 * (16 * config.hidden_size + 3 * config.intermediate_size)
    activations = batch_tokens * (config.num_hidden_layers * block + 10 * config.vocab_size)
    operations = (6 if trains_base else 4) * numbers * all_tokens
    return {
        "gpu_hours": round(operations / GPU_FLOPS / 3600, 2),
        "gpu_gb": round((4 * numbers + added_bytes + activations) / 1e9, 1),
    }


def weight_bytes(model: Any) -> int:
    """Bytes of the model's weights in float32."""
    return 4 * _numbers(model)


def _numbers(model: Any) -> int:
    return sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
