"""The precision in which a model computes: that of its weights, or bfloat16 autocast of float32 weights.

`precision=None` chooses automatically: autocast if the weights are float32 and the device is faster in
bfloat16. `precision_of` tells which precision is used, and every result records it. Addressing, scopes and
statistics are always float32.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from inspect import signature
from typing import Any

import torch

from .choices import PRECISIONS

_chosen: ContextVar[str | None] = ContextVar("precision", default=None)


def check_precision(precision: str | None) -> None:
    """Check that a precision is one of PRECISIONS or None.

    Raises:
        ValueError: it is not.
    """
    if precision is not None and precision not in PRECISIONS:
        allowed = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision={precision!r} must be one of {allowed}, or None to use the faster one")


@contextlib.contextmanager
def computing_in(precision: str | None) -> Iterator[None]:
    """Within, this is the precision of all functions that get `precision=None`. None changes nothing.

    Raises:
        ValueError: `precision` is not one of PRECISIONS or None.
    """
    check_precision(precision)
    token = _chosen.set(_chosen.get() if precision is None else precision)
    try:
        yield
    finally:
        _chosen.reset(token)


def precision_of(model: torch.nn.Module, precision: str | None = None) -> str:
    """The precision in which the model computes.

    Args:
        model: its first parameter decides the device and the dtype of the weights.
        precision: one of PRECISIONS. None: that of `computing_in`, or else the faster one.

    Returns:
        One of PRECISIONS, or the dtype of the weights if it is another one, for example "float16".

    Raises:
        ValueError: `precision` is not one of PRECISIONS, or the weights are not float32 and have another
            dtype than `precision`.
    """
    check_precision(precision)
    precision = precision or _chosen.get()
    parameter = next(model.parameters())
    weights = str(parameter.dtype).removeprefix("torch.")
    if weights != "float32" and precision not in (None, weights):
        raise ValueError(
            f"precision={precision!r}: the weights are {weights}; give precision=None, or load the model in "
            "float32"
        )
    if weights == "float32" and precision is None:
        return "bfloat16" if fast_bf16(parameter.device) else weights
    return precision or weights


def autocast(model: torch.nn.Module, precision: str | None = None) -> contextlib.AbstractContextManager:
    """Within, the model computes in `precision_of(model, precision)`.

    If float32 was chosen automatically, an autocast of the caller stays on. If float32 was asked for, it is
    switched off.

    Raises:
        ValueError: as for `precision_of`.
    """
    parameter, used = next(model.parameters()), precision_of(model, precision)
    if used == "bfloat16" and parameter.dtype == torch.float32:
        return torch.autocast(parameter.device.type, torch.bfloat16)
    if precision is None and _chosen.get() is None:
        return contextlib.nullcontext()
    return torch.autocast(parameter.device.type, enabled=False)


def precise(model: torch.nn.Module) -> torch.autocast:
    """Switch autocast off, so that statistics, addressing and scopes are computed in float32."""
    return torch.autocast(device_of(model).type, enabled=False)


def fast_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 matrix products are faster than float32 on this device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(device).type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def device_of(model: Any) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def takes(model: Any, argument: str) -> bool:
    """Whether the forward method of the base model, without PEFT's wrappers, has this argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in signature(base.forward).parameters
