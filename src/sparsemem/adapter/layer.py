"""The PEFT layer: a module of the base model with a sparse memory for each adapter."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layer.memory import ProductKeyMemory
from .config import SparseMemoryConfig
from .tail import Tail

_TENSORS = ("values", "query", "query_bias", "keys", "key_bias", "scale", "gate_in", "gate_out")
_TRAINED = {"values": ("values",), "values+scale": ("values", "scale")}

CANNOT_MERGE = (
    "a sparse memory cannot be merged into the base weights, because it is a lookup table and not a "
    "change of a weight matrix; keep the adapter, or call unload() to get the base model back"
)


class SparseMemoryLayer(nn.Module, BaseTunerLayer):
    """A module of the base model with one product-key memory per adapter.

    A memory with `write="own"` adds to the output of the module, or replaces it. A memory with `write="last"`
    does not change the output; the layer passes the module's input to the tail.
    """

    adapter_layer_names = ("sparse_memory_layers",)

    def __init__(self, base_layer: nn.Module, path: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path, self.in_features, self.out_features = path, in_features, out_features
        self.sparse_memory_layers = nn.ModuleDict({})
        self.tail: Tail | None = None
        self.merged_adapters = []

    def update_layer(self, adapter_name: str, config: SparseMemoryConfig, d_out: int) -> None:
        memory = ProductKeyMemory(
            self.in_features,
            d_out,
            num_keys=config.num_keys,
            num_heads=config.num_heads,
            top_k=config.top_k,
            key_dim=config.key_dim,
            write=config.write,
            query_norm=config.query_norm,
            mode=config.mode,
            value_gate=config.value_gate,
            scale_init=config.scale_init,
            init_weights=config.init_weights,
            scope_sizes=config.scope_sizes.get(self.path, (0, 0, 0)),
        )
        freeze(memory, config.trainable)
        self.sparse_memory_layers[adapter_name] = memory
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.base_layer(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if self.tail is not None:
            self.tail.see(self, x)
        if self.disable_adapters:
            return result
        # A mixture of experts may return a tuple: the output and the scores of its router.
        output, *rest = result if isinstance(result, tuple) else (result,)
        for memory in self.active_memories():
            if memory.write == "own":
                output = memory(x, output)
        return (output, *rest) if isinstance(result, tuple) else output

    def active_memories(self) -> list[ProductKeyMemory]:
        names = [name for name in self.active_adapters if name in self.sparse_memory_layers]
        return [self.sparse_memory_layers[name] for name in names]  # type: ignore[misc]

    def _get_base_layer_device_and_dtype(self, base_layer):
        parameter = next(base_layer.parameters(), None)
        return (None, None) if parameter is None else (parameter.device, parameter.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise ValueError(CANNOT_MERGE)


class SparseMemoryLinear(SparseMemoryLayer):
    """A linear map with memories. PEFT's "all-linear" finds it by the word "Linear" in the class name."""


def freeze(memory: ProductKeyMemory, trainable: str) -> None:
    """Make the tensors that train parameters, and all others buffers.

    PEFT sets `requires_grad` on every parameter of an active adapter, so a frozen tensor must be a buffer.

    Args:
        memory: changed in place.
        trainable: as in `SparseMemoryConfig`.
    """
    for name in _TENSORS:
        tensor = getattr(memory, name)
        if tensor is None:
            continue
        delattr(memory, name)
        if name in _TRAINED.get(trainable, _TENSORS):
            setattr(memory, name, nn.Parameter(tensor.detach()))
        else:
            memory.register_buffer(name, tensor.detach())
