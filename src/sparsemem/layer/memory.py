"""One memory layer: query -> product keys -> value rows -> value gate -> scale -> relevance gate.

Parameters are flat on the module (PEFT names an adapter's tensors `layer.adapter.tensor`, one level deep).
Everything except the value rows is computed in float32, even if the model or autocast uses another precision.
So slots and gates do not depend on the precision of the rest of the model.

Reference: Lample 2019 (1907.05242) for the read, Berges 2024 (2412.09764) for `value_gate="silu"`; the
additive form mlp(x) + scale * y is from the paper (2605.03229). Keys from data and the relevance gate are
ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .product_keys import best_pairs, best_sub_keys
from .scope import SCOPE_TENSORS, Scope, empty_tensor
from .tables import QuantizedRows, zero_table
from .values import ReadLog, read_rows


class ProductKeyMemory(nn.Module):
    """Product-key memory from d_in to d_out.

    Attributes:
        values: the value table [num_slots, d_out], or `QuantizedRows` after `quantize_rows`.
        query [num_heads * key_dim, d_in], query_bias, keys [num_heads, 2, num_keys, key_dim / 2], key_bias:
            the addressing, which maps a state to slots.
        scale: the scalar alpha.
        write: "last": the tail adds the read to the residual stream after the last block. "own": `forward`
            adds it to the output of the module that has this memory.
        log: where backward passes record the reads. The row optimizers set it. None: `values` gets a dense
            gradient.
        token_mask: [batch, seq] bool, the attention mask of the current forward pass. The tuner sets it.
            None: the reads of every token are counted.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        num_keys: int = 64,
        num_heads: int = 16,
        top_k: int = 64,
        key_dim: int = 64,
        write: str = "own",
        query_norm: bool = True,
        mode: str = "additive",
        value_gate: str = "none",
        scale_init: float = 1.0,
        init_weights: bool | str = True,
        scope_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.mode, self.write = d_in, d_out, mode, write
        self.num_keys, self.num_heads, self.top_k, self.key_dim = num_keys, num_heads, top_k, key_dim
        self.query_norm, self.scale_init, self.init_weights = query_norm, scale_init, init_weights
        self.values = nn.Parameter(zero_table(num_keys**2, d_out))
        self.query = nn.Parameter(torch.empty(num_heads * key_dim, d_in))
        self.query_bias = nn.Parameter(torch.empty(num_heads * key_dim))
        self.keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, key_dim // 2))
        self.key_bias = nn.Parameter(torch.empty(num_heads, 2, num_keys))
        # Shape [1], not a scalar: FSDP does not accept scalar parameters.
        self.scale = nn.Parameter(torch.empty(1))
        self.gate_in = self.gate_out = None
        if value_gate == "silu":
            self.gate_in = nn.Parameter(torch.empty(d_out, d_in))
            self.gate_out = nn.Parameter(torch.empty(d_out, d_out))
        for key in SCOPE_TENSORS:
            empty = empty_tensor(key)
            shape = (scope_shapes or {}).get(key, empty.shape)
            self.register_buffer(f"scope_{key}", empty.new_zeros(tuple(shape)))
        self._scope: Scope | None = None
        self.log: ReadLog | None = None
        self.token_mask: Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters.

        | init_weights | values           | scale      | keys                       | query, value gate |
        | ------------ | ---------------- | ---------- | -------------------------- | ----------------- |
        | True         | 0 (a no-op)      | scale_init | U(+-1/sqrt(key_dim))       | nn.Linear's       |
        | "paper"      | N(0, d_out^-1/2) | 0.01       | U(+-1/sqrt(key_dim))       | nn.Linear's       |
        | False        | N(0, 1)          | scale_init | N(0, 1)                    | nn.Linear's       |
        """
        nn.init.kaiming_uniform_(self.query, a=5**0.5)
        nn.init.zeros_(self.query_bias)
        nn.init.zeros_(self.key_bias)
        nn.init.uniform_(self.keys, -(self.key_dim**-0.5), self.key_dim**-0.5)
        # rows that are zero already are not written, because then they would take memory
        if self.values.is_meta or self.values.any():
            nn.init.zeros_(self.values)
        self.scale.fill_(0.01 if self.init_weights == "paper" else self.scale_init)
        if self.init_weights == "paper":
            nn.init.normal_(self.values, std=self.d_out**-0.5)
        elif not self.init_weights:
            nn.init.normal_(self.values)
            nn.init.normal_(self.keys)
        for weight in (self.gate_in, self.gate_out):
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=5**0.5)

    @property
    def num_slots(self) -> int:
        return self.num_keys**2

    @property
    def has_scope(self) -> bool:
        return self.has_facts or len(self.get_buffer("scope_centres")) > 0

    @property
    def has_facts(self) -> bool:
        return len(self.get_buffer("scope_fact_ids")) > 0

    def queries(self, x: Tensor) -> Tensor:
        """Queries [tokens, num_heads, 2, key_dim / 2] of states [tokens, d_in]."""
        with torch.autocast(x.device.type, enabled=False):
            q = F.linear(x.float(), self.query.float(), self.query_bias.float())
        q = q.view(x.shape[0], self.num_heads, 2, self.key_dim // 2)
        return F.normalize(q, dim=-1) if self.query_norm else q

    def address(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slots and weights, each [tokens, num_heads * top_k], that states [tokens, d_in] read.

        The weights of one head sum to 1.
        """
        with torch.autocast(x.device.type, enabled=False):
            addressing = (self.queries(x), self.keys.float(), self.key_bias.float())
            best = best_sub_keys(*addressing, min(self.top_k, self.num_keys))
            slots, top = best_pairs(*best, self.num_keys, self.top_k)
            return slots.flatten(1), top.softmax(-1).flatten(1)

    @property
    def scope(self) -> Scope | None:
        """The scope, sharing the memory's buffers. None: there is no scope, and the gate is 1 everywhere."""
        if not self.has_scope:
            return None
        held = {key: self.get_buffer(f"scope_{key}") for key in SCOPE_TENSORS}
        # a scope knows where to find its facts, which takes a while to make
        if self._scope is None or any(one is not held[key] for key, one in self._scope.tensors().items()):
            self._scope = Scope.from_tensors(held)
        return self._scope

    @scope.setter
    @torch.no_grad()
    def scope(self, scope: Scope | None) -> None:
        device, held = self.values.device, {} if scope is None else scope.tensors()
        self._scope = None
        for key in SCOPE_TENSORS:
            tensor = held.get(key, empty_tensor(key))
            setattr(self, f"scope_{key}", tensor.detach().to(device, copy=True))

    def _load_from_state_dict(self, state_dict, prefix, *args: Any) -> None:
        # The size of a scope is not fixed, so the buffers take the shapes of the loaded tensors.
        self._scope = None
        for key in (f"scope_{name}" for name in SCOPE_TENSORS):
            loaded = state_dict.get(prefix + key)
            if loaded is not None and loaded.shape != self.get_buffer(key).shape:
                setattr(self, key, self.get_buffer(key).new_zeros(loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def relevance(self, x: Tensor) -> Tensor:
        """Gate g [tokens] float32 of states [tokens, d_in], by the scope's centres; 1 without a scope."""
        scope = self.scope
        if scope is None:
            return x.new_ones(x.shape[0], dtype=torch.float32)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return scope.gate(x.detach())

    def read(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """scale * y [tokens, d_out] float32 of states [tokens, d_in].

        Args:
            x: [tokens, d_in].
            counted: as in `values.read_rows`. With `write="last"` it is not used: only tokens whose output
                gets a gradient are counted, because the others train no row.
        """
        slots, weights = self.address(x)
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(self.values, QuantizedRows):
                y = self.values.read(slots, weights)
            else:
                y = read_rows(self.values, slots, weights, self.log, counted, reached=self.write == "last")
            if self.gate_in is not None and self.gate_out is not None:
                y = F.linear(y * F.silu(F.linear(x.float(), self.gate_in.float())), self.gate_out.float())
            return self.scale.float() * y

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """The layer's output, in the shape and dtype of `base`.

        Args:
            x: [..., d_in], the input of the module that has this memory.
            base: [..., d_out], the output of that module.

        A token out of scope reads nothing. Its output is bit-identical to `base`, and its slots are not
        counted.
        """
        flat, out = x.reshape(-1, self.d_in), base.reshape(-1, self.d_out)
        counted = self.counted(x)
        if not self.has_scope:
            y = self.read(flat, counted).to(base.dtype)
            return (y if self.mode == "replacement" else out + y).view_as(base)
        g = self.relevance(flat)
        if has_fixed_shapes(flat):
            y = self.read(flat, counted)
            y = y - out.float() if self.mode == "replacement" else y
            return torch.where(g[:, None] > 0, out + (g[:, None] * y).to(base.dtype), out).view_as(base)
        inside = g.nonzero().squeeze(1)
        # In training, keep the rows in the graph. Without them, backward() fails if no token is in scope.
        if len(inside) == 0 and not torch.is_grad_enabled():
            return base
        y = self.read(flat[inside], None if counted is None else counted[inside])
        if self.mode == "replacement":
            y = y - out[inside].float()
        return out.index_add(0, inside, (g[inside, None] * y).to(base.dtype)).view_as(base)

    def counted(self, x: Tensor) -> Tensor | None:
        """Which tokens of x [..., d_in] count as reads: [tokens] bool. None: all of them."""
        mask, tokens = self.token_mask, x[..., 0].numel()
        if self.log is None or mask is None or not torch.is_grad_enabled() or tokens % len(mask):
            return None
        # With a KV cache the mask covers more tokens than x. OPT flattens batch and sequence before its MLP.
        seq = tokens // len(mask)
        return mask[:, -seq:].reshape(-1) if mask.shape[1] >= seq else None

    def _apply(self, fn, recurse=True):
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        # Casting the model must not change the scope or frozen keys, so buffers change device but not dtype.
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.d_in} -> {self.d_out}, num_slots={self.num_slots}, num_heads={self.num_heads}, "
            f"top_k={self.top_k}, key_dim={self.key_dim}, mode={self.mode}"
        )


def has_fixed_shapes(x: Tensor) -> bool:
    """Whether a graph of the current call is being made, by compilation or CUDA's capture: the number of
    tokens in scope would be unknown in it, so all tokens read."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
