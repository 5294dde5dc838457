"""A device that this machine does not have: CPU tensors that claim to lie on it.

Within `FakeDevice()`, tensors "on the device" refuse what an accelerator refuses (operands on the CPU, and
float64 as Apple's does), and whatever makes the program wait for the device is counted in `syncs`.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# "meta" is a device type that autograd runs without a driver.
DEVICE = torch.device("meta")
# The host needs the values of these: a number, or the size of the result.
_WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "bincount", "masked_select", "equal")
# A CPU tensor may be an index, or what is copied.
_MIXED = ("index", "index_put", "_index_put_impl", "_to_copy", "copy", "copy_")


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


class FakeDevice(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.syncs = Counter()

    def put(self, tensor):
        """The tensor on the device, which floats in float64 do not reach."""
        assert tensor.dtype != torch.float64, "float64 on the device"
        return OnDevice(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        flat = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        there = [isinstance(leaf, OnDevice) for leaf in flat]
        target = kwargs.get("device")
        if target == DEVICE:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(
            lambda leaf: leaf.held if isinstance(leaf, OnDevice) else leaf, (args, kwargs)
        )
        if any(there):
            mixed = not all(on or leaf.dim() == 0 for on, leaf in zip(there, flat, strict=True))
            assert not mixed or name.rstrip("_") in _MIXED or name in _MIXED, (
                f"{name}: operands on both devices"
            )
            masks = name.startswith("index") and any(leaf.dtype == torch.bool for leaf in flat[1:])
            to_host = name == "_to_copy" and target is not None and target != DEVICE
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
