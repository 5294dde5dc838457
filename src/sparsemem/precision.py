"""In which precision a model computes: its own, or bfloat16 products of float32 weights (autocast).

`precision=None` is automatic: autocast where the weights are float32 and the device is faster at bfloat16.
Every result says which one it was, `precision_of`. Addressing, scopes and statistics are float32 in any case.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from inspect import signature
from typing import Any

import torch

PRECISIONS = ("float32", "bfloat16")

_chosen: ContextVar[str | None] = ContextVar("precision", default=None)


def check_precision(precision: str | None) -> None:
    """Raises:
    ValueError: another word.
    """
    if precision is not None and precision not in PRECISIONS:
        allowed = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision={precision!r} must be one of {allowed}, or None for the faster one")


@contextlib.contextmanager
def computing_in(precision: str | None) -> Iterator[None]:
    """Within, models that are told no precision compute in this one; None leaves it as it was.

    Raises:
        ValueError: another word.
    """
    check_precision(precision)
    token = _chosen.set(_chosen.get() if precision is None else precision)
    try:
        yield
    finally:
        _chosen.reset(token)


def precision_of(model: torch.nn.Module, precision: str | None = None) -> str:
    """The precision that the model computes in, told this one: one of PRECISIONS, or other weights' dtype.

    Raises:
        ValueError: another word, or weights of another dtype than float32 that are to compute in another.
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

    Automatic float32 leaves an autocast that the caller runs in; a float32 that was asked for does not.

    Raises:
        ValueError: as `precision_of`.
    """
    parameter, used = next(model.parameters()), precision_of(model, precision)
    if used == "bfloat16" and parameter.dtype == torch.float32:
        return torch.autocast(parameter.device.type, torch.bfloat16)
    if precision is None and _chosen.get() is None:
        return contextlib.nullcontext()
    return torch.autocast(parameter.device.type, enabled=False)


def precise(model: torch.nn.Module) -> torch.autocast:
    """No autocast within: statistics, addressing and scopes are float32 whatever the caller runs in."""
    return torch.autocast(device_of(model).type, enabled=False)


def fast_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 matrix products are faster than float32 on this device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(device).type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def takes(model: Any, argument: str) -> bool:
    """Whether the base model's forward, under whatever adapter of PEFT, has this argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in signature(base.forward).parameters
