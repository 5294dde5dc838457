"""The PEFT method: a memory beside a module, the tuner that puts it there, and its registration.

What PEFT 0.21 needs to be told that it does not know by itself:
- peft.PeftType is a closed enum; a str-enum member of ours in the tables of `peft.mapping` works in its place;
- a memory layer has parameters that are frozen by design (keys and query), which PEFT would switch on again;
- an MLP has no `weight` to read device and dtype from, and it never sees the attention mask.
"""

import inspect
from typing import Any

import torch
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import SparseMemoryConfig, SparseMemoryType
from .memory import ProductKeyMemory

# Depths of the default layers: late, where hidden states tell taught subjects from known ones.
DEFAULT_DEPTHS = (0.8, 0.9, 0.97)

_TRAINED = {"values": {"values"}, "values+scale": {"values", "scale"}}


class SparseMemoryLayer(nn.Module, BaseTunerLayer):
    """A module with a product-key memory per adapter beside it (or, in replacement mode, instead of it)."""

    adapter_layer_names = ("sparse_memory_layers",)

    def __init__(self, base_layer: nn.Module, d_in: int, d_out: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.d_in, self.d_out = d_in, d_out
        self.sparse_memory_layers = nn.ModuleDict({})
        self._trained: dict[str, set[str] | None] = {}
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, adapter_name: str, config: SparseMemoryConfig) -> None:
        self.sparse_memory_layers[adapter_name] = ProductKeyMemory(
            self.d_in,
            self.d_out,
            num_keys=config.num_keys,
            num_heads=config.num_heads,
            top_k=config.top_k,
            key_dim=config.key_dim,
            mode=config.mode,
            value_gate=config.value_gate,
            scale_init=config.scale_init,
            init_weights=config.init_weights,
            max_centres=config.max_centres,
        )
        self._trained[adapter_name] = _TRAINED.get(config.trainable)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for memory in self.active_memories():
            result = memory(x, result)
        return result

    def active_memories(self) -> list[ProductKeyMemory]:
        names = [name for name in self.active_adapters if name in self.sparse_memory_layers]
        return [self.sparse_memory_layers[name] for name in names]  # type: ignore[misc]

    def _freeze_non_trainable_peft_weights(self, adapter_names=None) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in self.sparse_memory_layers if names is None else names:
            trained = self._trained.get(name)
            if trained is None:
                continue
            for parameter_name, parameter in self.sparse_memory_layers[name].named_parameters():
                if parameter_name not in trained:
                    parameter.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._trained.pop(adapter_name, None)

    def _get_base_layer_device_and_dtype(self, base_layer):
        parameter = next(base_layer.parameters(), None)
        return (None, None) if parameter is None else (parameter.device, parameter.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(_CANNOT_MERGE)

    def unmerge(self) -> None:
        raise ValueError(_CANNOT_MERGE)


_CANNOT_MERGE = (
    "a sparse memory cannot be merged into the base weights: it is a lookup table, not a change of a matrix; "
    "keep the adapter beside the base model, or call unload() to get the base model back"
)


class SparseMemoryModel(BaseTuner):
    """Puts memory layers into a model and keeps the attention mask within their reach."""

    prefix = "sparse_memory_"
    tuner_layer_cls = SparseMemoryLayer

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(self.model, peft_config.layers_to_transform)
        return peft_config

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if isinstance(target, SparseMemoryLayer):
            target.update_layer(adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                # A further adapter is added inactive, as in PEFT: its weights wait without gradients.
                target.sparse_memory_layers[adapter_name].requires_grad_(False)
            return
        d_in, d_out = _widths(target, current_key)
        layer = SparseMemoryLayer(target, d_in, d_out)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self):
        raise ValueError(_CANNOT_MERGE)

    def _post_injection_hook(self, model: nn.Module, config, adapter_name: str) -> None:
        if not hasattr(model, "_sparse_memory_mask_hook"):
            hook = model.register_forward_pre_hook(_hand_out_mask, with_kwargs=True)
            model._sparse_memory_mask_hook = hook  # type: ignore[assignment]

    def unload(self) -> nn.Module:
        model = super().unload()
        model._sparse_memory_mask_hook.remove()  # type: ignore[union-attr,operator]
        del model._sparse_memory_mask_hook
        return model


def memory_layers(model: nn.Module) -> dict[str, ProductKeyMemory]:
    """The active adapter's memory layers by the base model's module path, in the order of the model.

    Raises:
        ValueError: the model has no sparse memory.
    """
    found = {
        name.removeprefix("base_model.model."): memory
        for name, module in model.named_modules()
        if isinstance(module, SparseMemoryLayer)
        for memory in module.active_memories()[:1]
    }
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no active sparse memory; add one with "
            "get_peft_model(model, SparseMemoryConfig())"
        )
    return found


def default_targets(model: nn.Module, layers: list[int] | int | None) -> list[str]:
    """Paths of the decoder blocks' MLPs in the given layers; None: three late ones (DEFAULT_DEPTHS).

    Found by structure, not by name: the longest list of blocks, and in each block the child that holds at least two
    linear maps and whose forward knows no attention mask. A block without such a child (OPT) offers its last linear map.

    Raises:
        ValueError: no such blocks, or a layer index out of range.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks_name, blocks = max(lists, key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    mlps = [_mlp_name(block) for block in blocks]
    if not mlps or None in mlps:
        raise ValueError(
            f"target_modules=None: no MLP was found in the decoder blocks of {type(model).__name__}; "
            "name the modules that shall get a memory, for example target_modules=['mlp']"
        )
    if layers is None:
        chosen = sorted({round(depth * (len(mlps) - 1)) for depth in DEFAULT_DEPTHS})
    else:
        chosen = [layers] if isinstance(layers, int) else list(layers)
        wrong = [index for index in chosen if not 0 <= index < len(mlps)]
        if wrong:
            raise ValueError(f"layers_to_transform={layers}: layer {wrong[0]} does not exist, allowed are 0 to {len(mlps) - 1}")
    return [f"{blocks_name}.{index}.{mlps[index]}" for index in chosen]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _mlp_name(block: nn.Module) -> str | None:
    linear = None
    for name, child in block.named_children():
        child = child.base_layer if isinstance(child, SparseMemoryLayer) else child
        if sum(_is_linear(module) for module in child.modules()) >= 2:
            words = " ".join(inspect.signature(child.forward).parameters)
            if "mask" not in words and "past_key" not in words:
                return name
        if _is_linear(child):
            linear = name
    return linear


def _widths(module: nn.Module, name: str) -> tuple[int, int]:
    """(d_in, d_out): of a linear map, else of the first and the last linear map inside."""
    linears = [m for m in module.modules() if _is_linear(m)]
    if not linears:
        raise ValueError(
            f"target_modules: {name} ({type(module).__name__}) holds no linear map, so its widths are unknown; "
            "target an MLP or an nn.Linear"
        )
    first, last = (
        (m.weight.shape if isinstance(m, Conv1D) else (m.in_features, m.out_features)) for m in (linears[0], linears[-1])
    )
    return int(first[0]), int(last[1])


def _hand_out_mask(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before each call of the model: give every memory layer the call's 2-D attention mask, or none."""
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1 and list(inspect.signature(model.forward).parameters)[1] == "attention_mask":
        mask = args[1]
    mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    for module in model.modules():
        if isinstance(module, ProductKeyMemory):
            module.token_mask = mask


def _register() -> None:
    kind: Any = SparseMemoryType.SPARSE_MEMORY
    taken = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if taken is not None and taken is not SparseMemoryConfig:
        raise ImportError(
            f"the PEFT method name {kind.value!r} is already taken by {taken.__module__}.{taken.__qualname__}; "
            "uninstall the other package, or import only one of the two"
        )
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = SparseMemoryConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = SparseMemoryModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = SparseMemoryModel.prefix


_register()
