"""Give the memory layers of a model the attention mask of each call, which an MLP does not get."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..layer.memory import ProductKeyMemory


def take_back_mask(model: nn.Module, *_: Any) -> None:
    """After each call: remove the mask, so that a later call of only a part of the model does not use it."""
    if not torch.is_grad_enabled():
        return
    modules = list(model.modules())
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in modules):
        # the backward pass may run the layers again, and their reads are counted then
        return
    for module in modules:
        if isinstance(module, ProductKeyMemory):
            module.token_mask = None


def hand_out_mask(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before each call with gradients: give every memory layer the call's 2-D attention mask, or None."""
    if not torch.is_grad_enabled():
        # nothing is counted, and in generation a search for the layers would cost as much as a read
        return
    mask = kwargs.get("attention_mask")
    if (
        mask is None
        and len(args) > 1
        and list(inspect.signature(model.forward).parameters)[1] == "attention_mask"
    ):
        mask = args[1]
    mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    for module in model.modules():
        if isinstance(module, ProductKeyMemory):
            # the layers of one model may be on several devices
            module.token_mask = None if mask is None else mask.to(module.values.device)


class MaskHooks:
    """Hooks on the model that give its memory layers the attention mask during each call."""

    def __init__(self, model: nn.Module) -> None:
        self._before = model.register_forward_pre_hook(hand_out_mask, with_kwargs=True)
        self._after = model.register_forward_hook(take_back_mask, always_call=True)

    def remove(self) -> None:
        self._before.remove()
        self._after.remove()
