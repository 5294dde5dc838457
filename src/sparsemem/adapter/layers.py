"""The tail: adds the reads of several late layers to the residual stream, once, after the last block.

    x_l = input of module l in the base model, for each read layer l
    g   = relevance gate of the deepest read layer, one number per token
    r   = row of the taught answer that is given at the token, if one is (see `layer.facts`)
    h'  = h_last + g * (r + sum_l scale_l * read_l(x_l)), then final norm and head as in the base model

A read layer is a module with a memory that has `write="last"`. It does not change the module's output. Only
the input of the final norm changes. So all hidden states up to the last block's output and all KV cache
tensors are bit-identical to the base model's (law 11), and training the memory needs no backward pass through
the blocks.

Reference: ours (no paper).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..layer.facts import given_at, noted
from ..layer.memory import ProductKeyMemory
from .config import SparseMemoryConfig
from .context import CallContext
from .reads import add_reads

BASE_ROW = "__base__"


class Tail:
    """The read layers of one model, and their inputs in the current forward pass.

    Attributes:
        layers: by module path, from first to last layer.
        key_layers: by adapter, the paths of the modules whose inputs give the question key.
        row_adapters: the adapter name for each row of the current batch, or a tuple of several names, whose
            reads are added. None: every row uses the active adapters.
        call: the tokens and the KV cache of the current call; None outside calls.
    """

    def __init__(self, model: nn.Module, norm: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, SparseMemoryLayer] = {}
        self.key_layers: dict[str, list[str]] = {}
        self.row_adapters: Sequence[str | tuple[str, ...]] | None = None
        self.call: CallContext | None = None
        self._states: dict[str, Tensor] = {}
        self._hooks = [norm.register_forward_pre_hook(self._write, with_kwargs=True)]
        self._watched: set[str] = set()
        self._recorded: dict[str, Tensor] | None = None

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

    def watch(self, adapter: str, paths: Sequence[str]) -> None:
        """Keep the inputs of these modules in each pass in which a memory of the adapter needs them."""
        self.key_layers[adapter] = list(paths)
        for path in [path for path in paths if path not in self._watched]:
            self._watched.add(path)
            module = self.model.get_submodule(path)
            keep = _Keep(self, path)
            self._hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))

    def needs(self, path: str) -> bool:
        """Whether a memory of the current batch needs the input of a watched module."""
        wanted = [name for name, paths in self.key_layers.items() if path in paths]
        used = self._names() if wanted else ()
        return any(self._gate_memory(name) is not None for name in wanted if name in used)

    def has_facts(self) -> bool:
        """Whether a memory of the current batch holds facts."""
        return any(self._gate_memory(name) is not None for name in self._names())

    def keep(self, path: str, x: Tensor) -> None:
        self._states[f"{_WATCHED}{path}"] = x.detach()

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Within, holds by adapter which tokens of taught answers the last pass gave, see `places_of`."""
        self._recorded = recorded = {}
        try:
            yield recorded
        finally:
            self._recorded = None

    def _names(self) -> list[str]:
        """The adapters of the current batch."""
        if self.row_adapters is not None:
            return list(dict.fromkeys(name for row in self.row_adapters for name in adapters_of(row)))
        layers = [layer for layer in self.layers.values() if not layer.disable_adapters]
        return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))

    def _gate_memory(self, adapter: str) -> ProductKeyMemory | None:
        """The memory of an adapter that holds facts, if it has any."""
        memories = list(self.memories(adapter).values())
        return memories[-1] if memories and memories[-1].has_facts else None

    def _reads(self, layer: "SparseMemoryLayer") -> bool:
        """Whether the current batch uses a memory of this layer that has `write="last"`."""
        rows = layer.active_adapters if self.row_adapters is None else self.row_adapters
        names = {name for row in rows for name in adapters_of(row)}
        held: Any = layer.sparse_memory_layers
        return any(name in held and held[name].write == "last" for name in names)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

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
        if not any(path in self.layers for path in states):
            return None
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        if hidden.requires_grad and not self._base_trains():
            # Gradient checkpointing makes the embeddings require a gradient, but nothing in the base trains.
            hidden = hidden.detach()
        return (self._written(hidden, states), *rest), kwargs

    def _written(self, hidden: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        if self.row_adapters is None:
            for adapter in self._names():
                hidden = self._added(hidden, adapter, states, None)
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
            hidden = self._added(hidden, adapter, states, rows)
        return hidden

    def _added(
        self, hidden: Tensor, adapter: str, states: Mapping[str, Tensor], rows: Tensor | None
    ) -> Tensor:
        """The residual stream with the gated reads of one adapter; `rows` as for `add_reads`."""
        memory = self._gate_memory(adapter)
        places = None
        if memory is not None and self.call is not None and self.call.ids is not None:
            if torch.compiler.is_exporting():
                raise ValueError(
                    "model: holds facts of learn, whose names are looked up on the host, so it cannot be "
                    "exported; export a memory that finetune taught, or use torch.compile"
                )
            shape = hidden.shape[:2]
            middle = [states.get(f"{_WATCHED}{path}") for path in self.key_layers.get(adapter, ())]
            late = next(states[path] for path in reversed(list(self.memories(adapter))))
            places = places_of(
                memory,
                self.call,
                late.reshape(*shape, -1),
                torch.cat([x.reshape(*shape, -1) for x in middle], -1) if middle else None,  # type: ignore[union-attr]
                rows,
            )
            if self._recorded is not None:
                self._recorded[adapter] = places
        return add_reads(hidden, self.memories(adapter), states, rows, places)

    def _base_trains(self) -> bool:
        return any(
            p.requires_grad for name, p in self.model.named_parameters() if "sparse_memory_" not in name
        )


class _Keep:
    """A hook that gives the tail the input of a watched module. A copy of the model has it too."""

    def __init__(self, tail: Tail, path: str) -> None:
        self.tail, self.path = tail, path

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.tail.needs(self.path):
            self.tail.keep(self.path, first_input(args, kwargs))


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a module's call, by whichever name the model gives it."""
    return args[0] if args else next(iter(kwargs.values()))


@torch.no_grad()
def _places_of(
    memory: ProductKeyMemory, call: CallContext, late: Tensor, middle: Tensor | None, rows: Tensor | None
) -> Tensor:
    """`given_at` for the new tokens of a call, [batch, new]; -1 in rows that do not use this memory.

    What is found is noted in the call, for the passes that continue it. Of several memories that have an
    answer for one token, the first gives it.
    """
    scope = memory.scope
    assert scope is not None
    with torch.autocast(late.device.type, enabled=False):
        places = given_at(scope.facts, scope.space, call.context(), late, middle)
    if rows is not None:
        places = places.masked_fill(~rows[:, None], -1)
    places = places.masked_fill(call.taken(), -1)
    call.note(noted(scope.facts, places))
    return places


places_of: Any = torch.compiler.disable(
    _places_of,
    reason="the names of taught facts are looked up on the host; compile without fullgraph=True",
)


def adapters_of(row: str | tuple[str, ...]) -> tuple[str, ...]:
    """The adapters whose reads are added in a row of a batch."""
    return (row,) if isinstance(row, str) else row


def tail_of(model: nn.Module) -> Tail | None:
    """The tail of a model. None if no memory has `write="last"`."""
    for module in model.modules():
        tail: Any = vars(module).get(TAIL)
        if tail is not None:
            return tail
    return None


TAIL = "_sparse_memory_tail"
# before the paths of watched modules, which may be read layers too
_WATCHED = "key:"


TENSORS = ("values", "query", "query_bias", "keys", "key_bias", "scale", "gate_in", "gate_out")
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
            scope_shapes=config.scope_shapes.get(self.path),
        )
        freeze(memory, config.trainable)
        self.sparse_memory_layers[adapter_name] = memory
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.base_layer(*args, **kwargs)
        x = first_input(args, kwargs)
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

    def __getattr__(self, name: str) -> Any:
        # a block may read what belongs to the module that this layer stands for
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

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
    for name in TENSORS:
        tensor = getattr(memory, name)
        if tensor is None:
            continue
        delattr(memory, name)
        if name in _TRAINED.get(trainable, TENSORS):
            setattr(memory, name, nn.Parameter(tensor.detach()))
        else:
            memory.register_buffer(name, tensor.detach())
