"""The tokens of the current call of a model, and of the calls before it, for the gate of facts.

A forward pass with a KV cache sees only the new tokens. So the tokens before them, and which taught answers
were given there, are kept in one more layer of the cache: token ids + 1 as keys [batch, 1, seq, 1], notes as
values [batch, 1, seq, 2], both int64. The library's own code then repeats, selects, reorders and crops them
together with the keys and values of the blocks (law 15). Padding, and tokens that are not known, are 0.
"""

import inspect
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from ..layer.facts import Context

logger = logging.getLogger(__name__)


class CallContext:
    """The tokens of one call, and what is noted about them.

    Attributes:
        ids: [batch, new] int64 of the call, -1 at padding; None: the call has none (inputs_embeds).
        cache: the KV cache that the call continues, or None.
    """

    def __init__(self, ids: Tensor | None, mask: Tensor | None, cache: Cache | None) -> None:
        if ids is not None and mask is not None:
            ids = ids.masked_fill(mask[:, -ids.shape[1] :] == 0, -1)
        self.ids, self.cache = ids, cache
        # the blocks add the call's own tokens to the cache before the tail asks
        self._past = _length(cache)
        self._given: Tensor | None = None

    def context(self) -> Context:
        """All tokens up to the end of the call."""
        assert self.ids is not None
        past = self._past
        before, given = _kept(self.cache, past) if self.cache is not None and past else (None, None)
        if before is None or given is None:
            if past:
                _warn_once("the tokens before this call are not known")
            before, given = (
                self.ids.new_full((len(self.ids), past), -1),
                self.ids.new_zeros(len(self.ids), past, 2),
            )
        return Context(torch.cat([before, self.ids], 1), given)

    def taken(self) -> Tensor:
        """[batch, new] bool, the tokens at which an answer of another memory is given."""
        assert self.ids is not None
        return (
            torch.zeros_like(self.ids, dtype=torch.bool) if self._given is None else self._given[..., 0] != 0
        )

    def note(self, given: Tensor) -> None:
        """Note the facts [batch, new, 2] whose answers are given, for the calls that continue this one."""
        self._given = given if self._given is None else torch.where(given != 0, given, self._given)

    def keep(self, cache: Any) -> None:
        """Add the call's tokens and notes to the cache, in a layer of its own."""
        if self._given is None or self.ids is None or not isinstance(cache, Cache):
            return
        keys = (self.ids + 1)[:, None, :, None]
        values = self._given[:, None]
        layer = context_layer(cache)
        if layer is None:
            layer = _new_layer(cache)
            cache.layers.append(layer)
            if self._past:
                keys, values = (functional.pad(one, (0, 0, self._past, 0)) for one in (keys, values))
        layer.update(keys, values)


def _length(cache: Cache | None) -> int:
    """How many tokens a cache holds. States of linear attention do not say it; then the kept tokens do."""
    layers = [] if cache is None else cache.layers
    counted = any(isinstance(layer, CacheLayerMixin) for layer in layers)
    return int(cache.get_seq_length()) if cache is not None and counted else 0


def context_layer(cache: Cache) -> Any:
    """The layer of a cache that holds tokens, or None."""
    for layer in reversed(cache.layers):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dtype == torch.int64:
            return layer
    return None


def _kept(cache: Cache, past: int) -> tuple[Tensor | None, Tensor | None]:
    layer = context_layer(cache)
    if layer is None or int(layer.get_seq_length()) != past:
        return None, None
    return layer.keys[:, 0, :past, 0] - 1, layer.values[:, 0, :past]


def _new_layer(cache: Cache) -> Any:
    if isinstance(cache, StaticCache):
        return StaticLayer(max_cache_len=cache.layers[0].get_max_length())
    return DynamicLayer()


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        logger.warning("%s, so taught facts whose subject was named there are not used", text)


class ContextHooks:
    """Hooks on the model that give its tail the tokens of each call."""

    def __init__(self, model: nn.Module, tail: Any) -> None:
        self.tail = tail
        self._names = list(inspect.signature(model.forward).parameters)
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.tail.call = None
        if not self.tail.has_facts():
            return None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if ids is None:
            _warn_once("the call has embeddings in place of token ids")
        held = [given[name] for name in _CACHES if given.get(name) is not None]
        cache = _own_cache(held)
        if held and cache is None:
            _warn_once(
                f"the tokens before this call are not known, since {type(model).__name__} has a cache "
                "of its own kind (generate with use_cache=False)"
            )
        self.tail.call = CallContext(ids, mask, cache)
        # notes are made of all tokens
        if keeps_few(model) and isinstance(kwargs.get("logits_to_keep"), int):
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        call, self.tail.call = self.tail.call, None
        if call is None or output is None:
            return
        if call.cache is None:
            held = output if isinstance(output, tuple) else [getattr(output, name, None) for name in _CACHES]
            call.keep(_own_cache(held))
        else:
            call.keep(call.cache)


def _own_cache(held: Iterable[Any]) -> Cache | None:
    """The first cache; of a pair for decoder and encoder the decoder's."""
    found = next((one for one in held if isinstance(one, Cache)), None)
    return getattr(found, "self_attention_cache", found)


# the names under which models take and return what they remember
_CACHES = ("past_key_values", "cache_params", "state", "mems")


def keeps_few(model: nn.Module) -> bool:
    """Whether late blocks run on the positions alone whose logits are kept (Gemma 4)."""
    config: Any = getattr(model, "config", None)
    return bool(config and getattr(config.get_text_config(), "num_kv_shared_layers", 0))
