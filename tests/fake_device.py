"""A device that this machine does not have: CPU tensors that claim to lie on it.

Within `FakeDevice()`, tensors "on the device" refuse what an accelerator refuses (operands on the CPU, and
float64 as Apple's does), and whatever makes the program wait for the device is counted in `syncs`.
"""

from collections import Counter
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# "meta" is a device type that autograd runs without a driver.
DEVICE = torch.device("meta")
# The host needs the values of these: a number, or the size of the result.
_WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "bincount", "masked_select", "equal")
# A CPU tensor may be an index, or what is copied.
_MIXED = ("index", "index_put", "_index_put_impl", "_to_copy", "to", "copy", "copy_")


class OnDevice(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of FakeDevice()")


class _Unseen(TorchFunctionMode):
    """What no dispatch mode sees: `torch.tensor([...], device=...)`, and `tolist` of a subclass."""

    def __init__(self, syncs):
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            self.syncs["tolist"] += 1
            return args[0].held.tolist()
        made = func in (torch.tensor, torch.as_tensor)
        if (
            made
            and torch.device(kwargs.get("device") or "cpu") == DEVICE
            and not isinstance(args[0], torch.Tensor)
        ):
            return func(*args, **(kwargs | {"device": "cpu"})).to(DEVICE)
        return func(*args, **kwargs)


def _on_cpu(leaf):
    if isinstance(leaf, OnDevice):
        return leaf.held
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf == DEVICE else leaf


def _as_cpu(function):
    """The function, which takes the fake device for the CPU: "meta" has no autocast."""

    def called(kind, *args, **kwargs):
        return function("cpu" if kind == DEVICE.type else kind, *args, **kwargs)

    return called


class FakeDevice(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.syncs = Counter()
        asked = ("autocast", "is_autocast_enabled", "get_autocast_dtype")
        self._others = (
            _Unseen(self.syncs),
            *(patch.object(torch, name, _as_cpu(getattr(torch, name))) for name in asked),
        )

    def __enter__(self):
        for one in self._others:
            one.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for one in self._others[::-1]:
            one.__exit__(*error)

    def move(self, module):
        """Put a module's parameters and buffers on the device, in place."""
        with self:
            for one in module.modules():
                for name, held in one._parameters.items():
                    if held is not None:
                        moved = torch.nn.Parameter(self.put(held.detach()), requires_grad=held.requires_grad)
                        one._parameters[name] = moved
                for name, held in one._buffers.items():
                    if held is not None:
                        one._buffers[name] = self.put(held)
        return module

    def put(self, tensor):
        """The tensor on the device, which floats in float64 do not reach."""
        assert tensor.dtype != torch.float64, "float64 on the device"
        return OnDevice(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        flat = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        there = [isinstance(leaf, OnDevice) for leaf in flat]
        named = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.device)]
        target = named[0] if named else None
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        if any(there):
            mixed = not all(on or leaf.dim() == 0 for on, leaf in zip(there, flat, strict=True))
            assert not mixed or name.rstrip("_") in _MIXED or name in _MIXED, (
                f"{name}: operands on both devices"
            )
            masks = name.startswith("index") and any(leaf.dtype == torch.bool for leaf in flat[1:])
            to_host = name in ("_to_copy", "to") and target is not None and target != DEVICE
            from_there = name == "copy_" and not there[0]
            if name in _WAITING or masks or to_host or from_there:
                self.syncs[name] += 1
            if name == "_local_scalar_dense" or to_host:
                return func(*args, **kwargs)
        elif target != DEVICE:
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if any(there) and there[0] and name.endswith("_") and isinstance(out, torch.Tensor):
            return flat[0]
        return tree_map(lambda leaf: self.put(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)
