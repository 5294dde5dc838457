"""What a tail adds to the residual stream: the gated sum of its memories' reads and of taught rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layer.memory import ProductKeyMemory, has_fixed_shapes


def add_reads(
    hidden: Tensor,
    memories: Mapping[str, ProductKeyMemory],
    states: Mapping[str, Tensor],
    rows: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Add the gated sum of one adapter's reads to the residual stream.

    Args:
        hidden: [batch, seq, d], the output of the last block. Not changed.
        memories: by module path, the deepest last.
        states: by module path, the inputs [..., d_in] of the read layers.
        rows: [batch] bool, the rows that use this adapter. None: all rows.
        places: [batch, seq] int64, which token of a taught answer is given, -1 for none. None: none anywhere.

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
    taught = None
    if places is not None and gate_memory.scope is not None:
        places = places.reshape(-1)
        g = torch.where(places >= 0, 1.0, g)
        taught = (gate_memory.scope.facts.rows, places)
    gate = None if rows is None and not gate_memory.has_scope else g
    return gated_sum(out, memories, flat, gate, taught).view_as(hidden)


def gated_sum(
    hidden: Tensor,
    memories: Mapping[str, ProductKeyMemory],
    states: Mapping[str, Tensor],
    g: Tensor | None,
    taught: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """hidden + g * (r + sum_l scale_l * read_l(x_l)). Only tokens with g > 0 read.

    A read is counted only if the loss depends on it. So padding and positions without a label are not
    counted.

    Args:
        hidden: [tokens, d]. Not changed.
        memories: by module path.
        states: by module path, [tokens, d_in].
        g: [tokens] float32. None: 1 everywhere.
        taught: the rows [num_tokens, d] of taught answers, and the row of each token, [tokens] int64, -1 for
            none. None: no rows.

    Returns:
        [tokens, d]
    """
    if g is None:
        y = _sum_of_reads(memories, states)
        return hidden + y.to(hidden.dtype)
    inside = slice(None) if has_fixed_shapes(hidden) else g.nonzero().squeeze(1)
    # In training, keep the rows in the graph. Without them, backward() fails if no token is in scope.
    if isinstance(inside, Tensor) and len(inside) == 0 and not torch.is_grad_enabled():
        return hidden
    y = _sum_of_reads(memories, {path: x[inside] for path, x in states.items()})
    if taught is not None and len(taught[0]):
        rows, places = taught[0], taught[1][inside]
        y = y + rows[places.clamp_min(0)] * (places >= 0)[:, None]
    y = (g[inside, None] * y).to(hidden.dtype)
    if isinstance(inside, Tensor):
        return hidden.index_add(0, inside, y)
    return torch.where(g[:, None] > 0, hidden + y, hidden)


def _sum_of_reads(memories: Mapping[str, ProductKeyMemory], states: Mapping[str, Tensor]) -> Tensor:
    """The sum of all memories' reads, [tokens, d] float32."""
    reads = [memory.read(states[path]) for path, memory in memories.items()]
    return torch.stack(reads).sum(0) if len(reads) > 1 else reads[0]
