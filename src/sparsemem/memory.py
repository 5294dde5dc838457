"""One memory layer: query -> product keys -> value rows -> value gate -> scale -> relevance gate.

Parameters are flat on the module (PEFT names an adapter's tensors `layer.adapter.tensor`, one level deep).
Everything but the value rows is computed in float32 whatever the model's precision, autocast included:
addresses and gates must not depend on the precision that the rest of the model happens to run in.

Reference: Lample 2019 (1907.05242) for the read, Berges 2024 (2412.09764) for `value_gate="silu"`; the
additive form mlp(x) + scale * y is the paper's (2605.03229); keys from data and the relevance gate are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .product_keys import sub_key_scores, top_k_slots
from .relevance import Scope
from .values import ReadLog, read_rows

_SCOPE_TENSORS = tuple(f"scope_{key}" for key in ("mean", "whitener", "known", "centres", "lo", "hi"))


class ProductKeyMemory(nn.Module):
    """Product-key memory from d_in to d_out.

    Attributes:
        values: the value table [num_slots, d_out].
        query [num_heads * key_dim, d_in], query_bias, keys [num_heads, 2, num_keys, key_dim / 2], key_bias:
            the addressing of a state.
        scale: the scalar alpha.
        log: where the reads of backward passes go, set by the row optimizers; None: dense gradients.
        token_mask: [batch, seq] bool of the running forward pass, set by the tuner; None: every token counts.
    """

    scope_mean: Tensor
    scope_whitener: Tensor
    scope_known: Tensor
    scope_num_known: Tensor
    scope_centres: Tensor
    scope_lo: Tensor
    scope_hi: Tensor
    scope_size: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        num_keys: int = 32,
        num_heads: int = 16,
        top_k: int = 8,
        key_dim: int = 64,
        query_norm: bool = True,
        mode: str = "additive",
        value_gate: str = "none",
        scale_init: float = 1.0,
        init_weights: bool | str = True,
        max_centres: int = 1024,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.mode = d_in, d_out, mode
        self.num_keys, self.num_heads, self.top_k, self.key_dim = num_keys, num_heads, top_k, key_dim
        self.query_norm, self.scale_init, self.init_weights = query_norm, scale_init, init_weights
        self.values = nn.Parameter(torch.empty(num_keys**2, d_out))
        self.query = nn.Parameter(torch.empty(num_heads * key_dim, d_in))
        self.query_bias = nn.Parameter(torch.empty(num_heads * key_dim))
        self.keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, key_dim // 2))
        self.key_bias = nn.Parameter(torch.empty(num_heads, 2, num_keys))
        # One element, not none: FSDP takes no scalars.
        self.scale = nn.Parameter(torch.empty(1))
        self.gate_in = self.gate_out = None
        if value_gate == "silu":
            self.gate_in = nn.Parameter(torch.empty(d_out, d_in))
            self.gate_out = nn.Parameter(torch.empty(d_out, d_out))
        self.register_buffer("scope_mean", torch.zeros(d_in))
        self.register_buffer("scope_whitener", torch.zeros(d_in, d_in))
        self.register_buffer("scope_known", torch.zeros(max_centres, d_in))
        self.register_buffer("scope_num_known", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scope_centres", torch.zeros(max_centres, d_in))
        self.register_buffer("scope_lo", torch.zeros(max_centres))
        self.register_buffer("scope_hi", torch.zeros(max_centres))
        # How many rows of scope_centres are in use; 0: no scope.
        self.register_buffer("scope_size", torch.zeros((), dtype=torch.int64))
        self.log: ReadLog | None = None
        self.token_mask: Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every initialisation in one place.

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
        return bool(self.scope_size > 0)

    def queries(self, x: Tensor) -> Tensor:
        """[tokens, num_heads, 2, key_dim / 2] of states [tokens, d_in]."""
        with torch.autocast(x.device.type, enabled=False):
            q = F.linear(x.float(), self.query.float(), self.query_bias.float())
        q = q.view(len(x), self.num_heads, 2, self.key_dim // 2)
        return F.normalize(q, dim=-1) if self.query_norm else q

    def address(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slots, weights [tokens, num_heads * top_k] of states [tokens, d_in]; a head's weights sum to 1."""
        with torch.autocast(x.device.type, enabled=False):
            scores = sub_key_scores(self.queries(x), self.keys.float(), self.key_bias.float())
            slots, top = top_k_slots(scores, self.top_k)
            return slots.flatten(1), top.softmax(-1).flatten(1)

    @property
    def scope(self) -> Scope | None:
        """Views of the scope's buffers; None: no scope, the gate is open everywhere."""
        n, m = int(self.scope_size), int(self.scope_num_known)
        if n == 0:
            return None
        space = self.scope_mean, self.scope_whitener, self.scope_known[:m]
        return Scope(*space, self.scope_centres[:n], self.scope_lo[:n], self.scope_hi[:n])

    @scope.setter
    @torch.no_grad()
    def scope(self, scope: Scope | None) -> None:
        new = (
            None
            if scope is None
            else {key: getattr(scope, key.removeprefix("scope_")).clone() for key in _SCOPE_TENSORS}
        )
        for key in _SCOPE_TENSORS:
            buffer = getattr(self, key).zero_()
            if new is not None:
                buffer[: len(new[key])] = new[key]
        self.scope_size.fill_(0 if scope is None else len(scope.centres))
        self.scope_num_known.fill_(0 if scope is None else len(scope.known))

    def relevance(self, x: Tensor) -> Tensor:
        """g [tokens] float32 of states [tokens, d_in]: all ones without a scope."""
        scope = self.scope
        if scope is None:
            return x.new_ones(len(x), dtype=torch.float32)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return scope.gate(x.detach())

    def read(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """scale * y [tokens, d_out] float32 of states [tokens, d_in]; `counted` as in `values.read_rows`."""
        slots, weights = self.address(x)
        with torch.autocast(x.device.type, enabled=False):
            y = read_rows(self.values, slots, weights, self.log, counted)
            if self.gate_in is not None and self.gate_out is not None:
                y = F.linear(y * F.silu(F.linear(x.float(), self.gate_in.float())), self.gate_out.float())
            return self.scale.float() * y

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """The layer's output, in the shape and dtype of `base`.

        Args:
            x: [..., d_in], the input of the module that the memory stands beside.
            base: [..., d_out], that module's output.

        A token out of scope reads nothing: its output is `base`'s to the bit, and its slots are not counted.
        """
        flat, out = x.reshape(-1, self.d_in), base.reshape(-1, self.d_out)
        counted = self._counted(x)
        if not self.has_scope:
            y = self.read(flat, counted).to(base.dtype)
            return (y if self.mode == "replacement" else out + y).view_as(base)
        g = self.relevance(flat)
        inside = g.nonzero().squeeze(1)
        # In training the rows stay in the graph, or a backward pass out of scope would find none.
        if len(inside) == 0 and not torch.is_grad_enabled():
            return base
        y = self.read(flat[inside], None if counted is None else counted[inside])
        if self.mode == "replacement":
            y = y - out[inside].float()
        return out.index_add(0, inside, (g[inside, None] * y).to(base.dtype)).view_as(base)

    def _counted(self, x: Tensor) -> Tensor | None:
        mask, tokens = self.token_mask, x[..., 0].numel()
        if self.log is None or mask is None or tokens % len(mask):
            return None
        # With a KV cache the mask is longer than the call; OPT flattens batch and sequence before its MLP.
        seq = tokens // len(mask)
        return mask[:, -seq:].reshape(-1) if mask.shape[1] >= seq else None

    def _apply(self, fn, recurse=True):
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        # A cast of the model must not move the scope or a frozen address: buffers follow devices, not dtypes.
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
