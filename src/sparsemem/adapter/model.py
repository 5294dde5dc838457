"""The PEFT tuner: adds memories to a model and finds the active ones.

Differences from other PEFT 0.21 methods:
- PEFT makes every parameter of an active adapter trainable. So frozen tensors (keys, query) are buffers.
- An MLP has no `weight` that gives its device and dtype. They are taken from its first parameter.
- An MLP does not get the attention mask. Hooks on the model pass the mask to the memories.
"""

import inspect
import logging
import re
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..artifacts import ArtifactError, comparable_base, fits_base
from ..layer.memory import ProductKeyMemory
from ..layer.scope import SCOPE_TENSORS
from .blocks import (
    blocks_path,
    check_decoder,
    default_targets,
    final_norm,
    final_width,
    hidden_size,
    is_linear,
    widths,
)
from .config import SparseMemoryConfig
from .context import ContextHooks
from .layers import (
    BASE_ROW,
    CANNOT_MERGE,
    TAIL,
    TENSORS,
    SparseMemoryLayer,
    SparseMemoryLinear,
    Tail,
    adapters_of,
    tail_of,
)
from .memories import check_bare
from .saving import guard_owner

logger = logging.getLogger(__name__)


class SparseMemoryModel(BaseTuner):
    """Adds memory layers to a model and gives them the attention mask of each call."""

    prefix = "sparse_memory_"
    tuner_layer_cls = SparseMemoryLayer

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        guard_owner(self)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # transformers' own `add_adapter` makes a tuner for each adapter of one model
        if len(self.peft_config) == 1 and not getattr(model, "_hf_peft_config_loaded", False):
            check_bare(model)
        check_adapter_name(model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._connect(model, self.peft_config[adapter_name], adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        check_decoder(self.model)
        _check_base(self.model, peft_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = set(
                default_targets(self.model, peft_config.layers_to_transform, peft_config.layers_pattern)
            )
        if peft_config.write == "last" and final_norm(self.model) is None:
            logger.warning(
                "write='last': %s has no norm after a list of decoder blocks, so write='own' is used: "
                "each memory adds to the output of its own module",
                type(self.model).__name__,
            )
            peft_config.write = "own"
        return peft_config

    def _create_and_replace(
        self, peft_config: Any, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        layer: Any = target
        if not isinstance(target, SparseMemoryLayer):
            kind = SparseMemoryLinear if is_linear(target) else SparseMemoryLayer
            layer = kind(target, current_key, *widths(target, current_key, hidden_size(self.model)))
            self._replace_module(parent, target_name, layer, target)
        d_out = layer.out_features
        if peft_config.write == "last":
            d_out = final_width(self.model)
            if not current_key.startswith(f"{blocks_path(self.model)}."):
                raise ValueError(
                    f"target_modules: {current_key} does not lie in a decoder block, but write='last' needs "
                    "this; target modules in the blocks, or set write='own'"
                )
        layer.update_layer(adapter_name, peft_config, d_out)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self):
        raise ValueError(CANNOT_MERGE)

    def _connect(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # PEFT's hook after an injection is called for the first adapter alone
        if _MASK_HOOK not in vars(model):
            vars(model)[_MASK_HOOK] = MaskHooks(model)
            head = getattr(model, "get_output_embeddings", lambda: None)()
            if head is not None:
                vars(model)[_HEAD_HOOK] = head.register_forward_pre_hook(_in_one_piece)
        model.register_state_dict_pre_hook(partial(_note_scope_shapes, config, adapter_name))
        if config.write == "last":
            tail = vars(model).get(TAIL)
            if tail is None:
                _, norm = final_norm(model)  # type: ignore[misc]
                tail = vars(model)[TAIL] = Tail(model, norm)
                vars(model)[_CONTEXT_HOOKS] = ContextHooks(model, tail)
            tail.layers = {m.path: m for m in model.modules() if isinstance(m, SparseMemoryLayer)}
            for layer in tail.layers.values():
                layer.tail = tail
            tail.watch(adapter_name, config.key_layers or ())

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        tail = tail_of(self.model)
        self._check_row_adapters(names)
        assert tail is not None
        before = tail.row_adapters
        tail.row_adapters = names
        try:
            yield
        finally:
            tail.row_adapters = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT takes `adapter_names` out of the arguments of all models but MPT's
        with self._enable_peft_forward_hooks(adapter_names=kwargs.pop("adapter_names", None)):
            return super().forward(*args, **kwargs)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel must not send, by name in the PeftModel, which it wraps.

        These are the tables whose rows a row optimizer trains, since it sends the selected rows itself, and
        the frozen tensors of memories, which DDP would send in every forward pass.
        """
        memories = [module for module in self.modules() if isinstance(module, ProductKeyMemory)]
        ignored = {id(memory.values) for memory in memories if memory.log is not None}
        ignored |= {id(buffer) for memory in memories for buffer in memory.buffers()}
        named = [*self.named_parameters(), *self.named_buffers()]
        return [f"base_model.{name}" for name, tensor in named if id(tensor) in ignored]

    def _check_row_adapters(self, names: Any) -> None:
        held = [name for row in names for name in adapters_of(row)]
        unknown = [name for name in held if name != BASE_ROW and name not in self.peft_config]
        if unknown or not names:
            raise ValueError(
                f"adapter_names={names}: must give one of {sorted(self.peft_config)} or {BASE_ROW!r}, or a "
                "tuple of several, for each row of the batch"
            )
        own = [name for name in held if name != BASE_ROW and self.peft_config[name].write == "own"]  # type: ignore[union-attr]
        if own:
            raise ValueError(
                f"adapter_names={names}: one batch cannot mix memories that add to their own module's output "
                f"(write='own': {own[0]}); call set_adapter and pass one batch per adapter"
            )
        if self.training:
            raise ValueError(
                f"adapter_names={names}: a batch that mixes adapters cannot train; call model.eval() first"
            )

    def unload(self) -> nn.Module:
        model = super().unload()
        for name in (_MASK_HOOK, _HEAD_HOOK, _CONTEXT_HOOKS, TAIL):
            held = vars(model).pop(name, None)
            if held is not None:
                held.remove()
        return model


_NAME = re.compile(r"[A-Za-z0-9_-]+")
# PEFT tells adapters apart by the parts of tensor names, so no adapter may have the name of another part.
_PARTS = {"base_model", "model", "base_layer", "sparse_memory_layers", *TENSORS}


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Raises:
    ValueError: an adapter name that cannot be told from other parts of tensor names.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"adapter name {name!r}: has other characters than letters, digits, '_' and '-'; "
            f"rename it, for example {re.sub(r'[^A-Za-z0-9_-]+', '-', name).strip('-') or 'facts'!r}"
        )
    parts = {part for path, _ in model.named_modules() for part in path.split(".")}
    own = {
        held for m in model.modules() if isinstance(m, SparseMemoryLayer) for held in m.sparse_memory_layers
    }
    if name in (parts - own) | _PARTS or name.startswith("scope_") or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter name {name!r}: is the name of a part of the model or its tensors, so the adapter could "
            f"not be saved; rename it, for example 'my-{name}'"
        )


def _check_base(model: nn.Module, config: SparseMemoryConfig) -> None:
    """Check that a saved adapter's memory is added to the base that it was made for.

    Only a config that was loaded has digests. They are removed here: they do not hold for what is trained
    from now on.

    Raises:
        ArtifactError: the base is another one.
    """
    loaded, config.digests = config.digests, {}
    if not loaded or config.base_fingerprint is None:
        return
    if not comparable_base(model):
        logger.warning(
            "the base model is quantised, float16 or not in memory, so it is not checked that the adapter "
            "was made for it"
        )
    elif not fits_base(model, config.base_fingerprint):
        raise ArtifactError(
            f"the adapter does not fit the base model ({type(model).__name__}), it was made for another; "
            "give the base model that it was trained on (after resize_token_embeddings a saved copy of it, "
            "since the embeddings of added tokens are random)"
        )


def _note_scope_shapes(config: SparseMemoryConfig, adapter: str, model: nn.Module, *_: Any) -> None:
    """Before a state dict is made, write the shapes of the scopes to the config, which is saved with it.

    A new memory built from this config has buffers of the right shapes. Loaders that compare shapes need
    this, for example the one in transformers.
    """
    layers = [
        m for m in model.modules() if isinstance(m, SparseMemoryLayer) and adapter in m.sparse_memory_layers
    ]
    held: dict[str, Any] = {layer.path: layer.sparse_memory_layers[adapter] for layer in layers}
    config.scope_shapes = {
        path: {key: list(memory.get_buffer(f"scope_{key}").shape) for key in SCOPE_TENSORS}
        for path, memory in held.items()
        if memory.has_scope
    }


def _in_one_piece(head: nn.Module, states: tuple) -> tuple:
    """Before the head: the last states of several rows, of which transformers cuts out a view, lie together.

    Else torch 2.13 multiplies a head that does not train with each row apart, which takes 200 times as long
    on a CPU in bfloat16.
    """
    return tuple(one.contiguous() if isinstance(one, Tensor) else one for one in states)


_MASK_HOOK = "_sparse_memory_mask_hook"
_HEAD_HOOK = "_sparse_memory_head_hook"
_CONTEXT_HOOKS = "_sparse_memory_context_hooks"


def take_back_mask(model: nn.Module, *_: Any) -> None:
    """After each call: remove the mask, so that a later call of only a part of the model does not use it."""
    if not torch.is_grad_enabled():
        return
    modules = list(model.modules())
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in modules):
        # the backward pass may run the layers again, and their reads are counted then
        return
    for module in modules:
        if isinstance(module, ProductKeyMemory):
            module.token_mask = None


def hand_out_mask(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before each call with gradients: give every memory layer the call's 2-D attention mask, or None."""
    if not torch.is_grad_enabled():
        # nothing is counted, and in generation a search for the layers would cost as much as a read
        return
    mask = kwargs.get("attention_mask")
    if (
        mask is None
        and len(args) > 1
        and list(inspect.signature(model.forward).parameters)[1] == "attention_mask"
    ):
        mask = args[1]
    mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    for module in model.modules():
        if isinstance(module, ProductKeyMemory):
            # the layers of one model may be on several devices
            module.token_mask = None if mask is None else mask.to(module.values.device)


class MaskHooks:
    """Hooks on the model that give its memory layers the attention mask during each call."""

    def __init__(self, model: nn.Module) -> None:
        self._before = model.register_forward_pre_hook(hand_out_mask, with_kwargs=True)
        self._after = model.register_forward_hook(take_back_mask, always_call=True)

    def remove(self) -> None:
        self._before.remove()
        self._after.remove()
