"""The tail: what several late layers read, added once to the residual stream behind the last block.

    x_l = the base's input of module l, for each read layer l
    g   = relevance gate of the deepest read layer, one number a token
    h'  = h_last + g * sum_l scale_l * read_l(x_l), then final norm and head as in the base

The read layers pass their module's output on as it is, and the norm gets a new tensor. So every hidden state
up to the last block's output and every KV cache tensor stay the base's to the bit (law 11), and nothing that
trains lies below the last residual.

Reference: ours (no paper).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layer.memory import ProductKeyMemory

if TYPE_CHECKING:
    from .layer import SparseMemoryLayer

BASE_ROW = "__base__"


class Tail:
    """The read layers of one model and the states that they saw in the running forward pass.

    Attributes:
        layers: by module path, in the order of the model.
        row_adapters: the adapter of each row of the running batch, or a tuple of several whose reads add up;
            None: the active adapters for every row.
    """

    def __init__(self, model: nn.Module, norm: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, SparseMemoryLayer] = {}
        self.row_adapters: Sequence[str | tuple[str, ...]] | None = None
        self._states: dict[str, Tensor] = {}
        self._hook = norm.register_forward_pre_hook(self._write, with_kwargs=True)

    def see(self, layer: "SparseMemoryLayer", x: Tensor) -> None:
        """Keep the state that a read layer saw until the norm is reached, if the running batch reads it.

        A state that an aborted pass has left behind is replaced, or dropped.
        """
        if not layer.disable_adapters and self._reads(layer):
            self._states[layer.path] = x.detach()
        else:
            self._states.pop(layer.path, None)

    def _reads(self, layer: "SparseMemoryLayer") -> bool:
        """Whether the running batch reads a memory of this layer for the tail."""
        rows = layer.active_adapters if self.row_adapters is None else self.row_adapters
        names = {name for row in rows for name in adapters_of(row)}
        held: Any = layer.sparse_memory_layers
        return any(name in held and held[name].write == "last" for name in names)

    def remove(self) -> None:
        self._hook.remove()

    def memories(self, adapter: str) -> dict[str, ProductKeyMemory]:
        """An adapter's memories that write last, by module path."""
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
            # Gradient checkpointing makes the embeddings require a gradient that nothing below would use.
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
            raise ValueError(f"adapter_names: has {len(names)} names for {len(hidden)} rows; give one a row")
        # Beam search and several returned sequences repeat each row.
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
    """The adapters that speak in a row of a batch."""
    return (row,) if isinstance(row, str) else row


def add_reads(
    hidden: Tensor,
    memories: Mapping[str, ProductKeyMemory],
    states: Mapping[str, Tensor],
    rows: Tensor | None = None,
) -> Tensor:
    """The residual stream with the gated sum of one adapter's reads added.

    Args:
        hidden: [batch, seq, d], the last block's output; not changed.
        memories: by module path, the deepest last.
        states: by module path, [..., d_in], what the read layers saw.
        rows: [batch] bool, the rows that the adapter speaks in; None: all.

    Returns:
        [batch, seq, d]; `hidden` itself where no token is in scope and no gradient is wanted.
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
    """hidden + g * sum_l scale_l * read_l(x_l), reads at the tokens alone where g > 0.

    A read counts where the loss reaches it, so padding and positions without a label never do.

    Args:
        hidden: [tokens, d]; not changed.
        memories: by module path; states: by module path, [tokens, d_in].
        g: [tokens] float32; None: 1 everywhere.
    """
    if g is None:
        y = _sum_of_reads(memories, states)
        return hidden + y.to(hidden.dtype)
    inside = g.nonzero().squeeze(1)
    # In training the rows stay in the graph, or a backward pass out of scope would find none.
    if len(inside) == 0 and not torch.is_grad_enabled():
        return hidden
    y = _sum_of_reads(memories, {path: x[inside] for path, x in states.items()})
    return hidden.index_add(0, inside, (g[inside, None] * y).to(hidden.dtype))


def _sum_of_reads(memories: Mapping[str, ProductKeyMemory], states: Mapping[str, Tensor]) -> Tensor:
    """[tokens, d] float32."""
    reads = [memory.read(states[path]) for path, memory in memories.items()]
    return torch.stack(reads).sum(0) if len(reads) > 1 else reads[0]


def tail_of(model: nn.Module) -> Tail | None:
    """The tail of a model with memories that write last."""
    for module in model.modules():
        tail: Any = vars(module).get(TAIL)
        if tail is not None:
            return tail
    return None


TAIL = "_sparse_memory_tail"
