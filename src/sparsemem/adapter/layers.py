"""The tail: adds the reads of several late layers to the residual stream, once, after the last block.

    x_l = input of module l in the base model, for each read layer l
    g   = relevance gate of the deepest read layer, one number per token
    h'  = h_last + g * sum_l scale_l * read_l(x_l), then final norm and head as in the base model

A read layer is a module with a memory that has `write="last"`. It does not change the module's output. Only
the input of the final norm changes. So all hidden states up to the last block's output and all KV cache
tensors are bit-identical to the base model's (law 11), and training the memory needs no backward pass through
the blocks.

Reference: ours (no paper).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..layer.memory import ProductKeyMemory
from .config import SparseMemoryConfig

if TYPE_CHECKING:
    pass

BASE_ROW = "__base__"


class Tail:
    """The read layers of one model, and their inputs in the current forward pass.

    Attributes:
        layers: by module path, from first to last layer.
        row_adapters: the adapter name for each row of the current batch, or a tuple of several names, whose
            reads are added. None: every row uses the active adapters.
    """

    def __init__(self, model: nn.Module, norm: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, SparseMemoryLayer] = {}
        self.row_adapters: Sequence[str | tuple[str, ...]] | None = None
        self._states: dict[str, Tensor] = {}
        self._hook = norm.register_forward_pre_hook(self._write, with_kwargs=True)

    def see(self, layer: "SparseMemoryLayer", x: Tensor) -> None:
        """Keep the input of a read layer until the final norm runs, if the current batch needs it.

        If an earlier forward pass was aborted, its input is replaced or removed.

        Args:
            layer: the read layer.
            x: its input [..., d_in].
        """
        if not layer.disable_adapters and self._reads(layer):
            self._states[layer.path] = x.detach()
        else:
            self._states.pop(layer.path, None)

    def _reads(self, layer: "SparseMemoryLayer") -> bool:
        """Whether the current batch uses a memory of this layer that has `write="last"`."""
        rows = layer.active_adapters if self.row_adapters is None else self.row_adapters
        names = {name for row in rows for name in adapters_of(row)}
        held: Any = layer.sparse_memory_layers
        return any(name in held and held[name].write == "last" for name in names)

    def remove(self) -> None:
        self._hook.remove()

    def memories(self, adapter: str) -> dict[str, ProductKeyMemory]:
        """The memories of an adapter that have `write="last"`, by module path."""
        held = {path: layer.sparse_memory_layers for path, layer in self.layers.items()}
        return {
            path: memories[adapter]  # type: ignore[misc]
            for path, memories in held.items()
            if adapter in memories and memories[adapter].write == "last"
        }

    def _write(self, norm: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        states, self._states = self._states, {}
        if not states:
            return None
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        if hidden.requires_grad and not self._base_trains():
            # Gradient checkpointing makes the embeddings require a gradient, but nothing in the base trains.
            hidden = hidden.detach()
        return (self._written(hidden, states), *rest), kwargs

    def _written(self, hidden: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        if self.row_adapters is None:
            active = {name: None for layer in self.layers.values() for name in layer.active_adapters}
            for adapter in active:
                hidden = add_reads(hidden, self.memories(adapter), states)
            return hidden
        names = list(self.row_adapters)
        if len(hidden) % len(names):
            raise ValueError(
                f"adapter_names: has {len(names)} names for {len(hidden)} rows; give one name per row"
            )
        # Beam search and num_return_sequences repeat each row, so the names are repeated too.
        several = [adapters_of(name) for name in names for _ in range(len(hidden) // len(names))]
        for adapter in dict.fromkeys(name for row in several for name in row):
            if adapter == BASE_ROW:
                continue
            rows = torch.tensor([adapter in row for row in several], device=hidden.device)
            hidden = add_reads(hidden, self.memories(adapter), states, rows)
        return hidden

    def _base_trains(self) -> bool:
        return any(
            p.requires_grad for name, p in self.model.named_parameters() if "sparse_memory_" not in name
        )


def adapters_of(row: str | tuple[str, ...]) -> tuple[str, ...]:
    """The adapters whose reads are added in a row of a batch."""
    return (row,) if isinstance(row, str) else row


def add_reads(
    hidden: Tensor,
    memories: Mapping[str, ProductKeyMemory],
    states: Mapping[str, Tensor],
    rows: Tensor | None = None,
) -> Tensor:
    """Add the gated sum of one adapter's reads to the residual stream.

    Args:
        hidden: [batch, seq, d], the output of the last block. Not changed.
        memories: by module path, the deepest last.
        states: by module path, the inputs [..., d_in] of the read layers.
        rows: [batch] bool, the rows that use this adapter. None: all rows.

    Returns:
        [batch, seq, d]. With gradients switched off and no token in scope, `hidden` itself or a view of it.
    """
    if not memories:
        return hidden
    flat = {path: states[path].reshape(-1, memory.d_in) for path, memory in memories.items()}
    out = hidden.reshape(-1, hidden.shape[-1])
    gate_path, gate_memory = list(memories.items())[-1]
    g = gate_memory.relevance(flat[gate_path])
    if rows is not None:
        g = g * rows.repeat_interleave(len(out) // len(rows))
    gate = None if rows is None and not gate_memory.has_scope else g
    return gated_sum(out, memories, flat, gate).view_as(hidden)


def gated_sum(
    hidden: Tensor, memories: Mapping[str, ProductKeyMemory], states: Mapping[str, Tensor], g: Tensor | None
) -> Tensor:
    """hidden + g * sum_l scale_l * read_l(x_l). Only tokens with g > 0 read.

    A read is counted only if the loss depends on it. So padding and positions without a label are not
    counted.

    Args:
        hidden: [tokens, d]. Not changed.
        memories: by module path.
        states: by module path, [tokens, d_in].
        g: [tokens] float32. None: 1 everywhere.

    Returns:
        [tokens, d]
    """
    if g is None:
        y = _sum_of_reads(memories, states)
        return hidden + y.to(hidden.dtype)
    inside = g.nonzero().squeeze(1)
    # In training, keep the rows in the graph. Without them, backward() fails if no token is in scope.
    if len(inside) == 0 and not torch.is_grad_enabled():
        return hidden
    y = _sum_of_reads(memories, {path: x[inside] for path, x in states.items()})
    return hidden.index_add(0, inside, (g[inside, None] * y).to(hidden.dtype))


def _sum_of_reads(memories: Mapping[str, ProductKeyMemory], states: Mapping[str, Tensor]) -> Tensor:
    """The sum of all memories' reads, [tokens, d] float32."""
    reads = [memory.read(states[path]) for path, memory in memories.items()]
    return torch.stack(reads).sum(0) if len(reads) > 1 else reads[0]


def tail_of(model: nn.Module) -> Tail | None:
    """The tail of a model. None if no memory has `write="last"`."""
    for module in model.modules():
        tail: Any = vars(module).get(TAIL)
        if tail is not None:
            return tail
    return None


TAIL = "_sparse_memory_tail"


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
            scope_sizes=config.scope_sizes.get(self.path, ()),
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
