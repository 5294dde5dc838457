"""The PEFT method: a memory beside a module, the tuner that puts it there, and its registration.

What PEFT 0.21 needs to be told that it does not know by itself:
- peft.PeftType is a closed enum; a str-enum member of ours in the tables of `peft.mapping` takes its place;
- it switches on every parameter of an active adapter, so what is frozen by design (keys, query) is a buffer;
- an MLP has no `weight` to read device and dtype from, and it never sees the attention mask.
"""

import inspect
from contextlib import contextmanager
from typing import Any

from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from .blocks import default_targets, hidden_size, is_linear, widths
from .config import TRAINABLE, SparseMemoryConfig, SparseMemoryType
from .memory import ProductKeyMemory

_TENSORS = ("values", "query", "query_bias", "keys", "key_bias", "scale", "gate_in", "gate_out")
_TRAINED = {"values": ("values",), "values+scale": ("values", "scale")}


class SparseMemoryLayer(nn.Module, BaseTunerLayer):
    """A module with a product-key memory per adapter beside it (or, in replacement mode, instead of it)."""

    adapter_layer_names = ("sparse_memory_layers",)

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.sparse_memory_layers = nn.ModuleDict({})
        self.merged_adapters = []

    def update_layer(self, adapter_name: str, config: SparseMemoryConfig) -> None:
        memory = ProductKeyMemory(
            self.in_features,
            self.out_features,
            num_keys=config.num_keys,
            num_heads=config.num_heads,
            top_k=config.top_k,
            key_dim=config.key_dim,
            query_norm=config.query_norm,
            mode=config.mode,
            value_gate=config.value_gate,
            scale_init=config.scale_init,
            init_weights=config.init_weights,
            max_centres=config.max_centres,
        )
        _freeze(memory, config.trainable)
        self.sparse_memory_layers[adapter_name] = memory
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return result
        x = args[0] if args else next(iter(kwargs.values()))
        # A mixture of experts may return its router's scores beside the output.
        output, *rest = result if isinstance(result, tuple) else (result,)
        for memory in self.active_memories():
            output = memory(x, output)
        return (output, *rest) if isinstance(result, tuple) else output

    def active_memories(self) -> list[ProductKeyMemory]:
        names = [name for name in self.active_adapters if name in self.sparse_memory_layers]
        return [self.sparse_memory_layers[name] for name in names]  # type: ignore[misc]

    def _get_base_layer_device_and_dtype(self, base_layer):
        parameter = next(base_layer.parameters(), None)
        return (None, None) if parameter is None else (parameter.device, parameter.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(_CANNOT_MERGE)

    def unmerge(self) -> None:
        raise ValueError(_CANNOT_MERGE)


class SparseMemoryLinear(SparseMemoryLayer):
    """Beside a linear map. PEFT knows by the word in the class name that "all-linear" includes it."""


_CANNOT_MERGE = (
    "a sparse memory cannot be merged into the base weights: it is a lookup table, not a change of a matrix; "
    "keep the adapter beside the base model, or call unload() to get the base model back"
)


class SparseMemoryModel(BaseTuner):
    """Puts memory layers into a model and keeps the attention mask within their reach."""

    prefix = "sparse_memory_"
    tuner_layer_cls = SparseMemoryLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(
                default_targets(self.model, peft_config.layers_to_transform, peft_config.layers_pattern)
            )
        return peft_config

    def _create_and_replace(
        self, peft_config: Any, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if isinstance(target, SparseMemoryLayer):
            target.update_layer(adapter_name, peft_config)
            return
        kind = SparseMemoryLinear if is_linear(target) else SparseMemoryLayer
        layer = kind(target, *widths(target, current_key, hidden_size(self.model)))
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self):
        raise ValueError(_CANNOT_MERGE)

    def _post_injection_hook(self, model: nn.Module, config, adapter_name: str) -> None:
        if "_sparse_memory_mask_hook" not in vars(model):
            hook = model.register_forward_pre_hook(_hand_out_mask, with_kwargs=True)
            vars(model)["_sparse_memory_mask_hook"] = hook

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        # PEFT would drop the names without a word and let the active adapter read the whole batch.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']}: one batch cannot mix sparse memories; "
                "call set_adapter and pass one batch per adapter"
            )
        yield

    def unload(self) -> nn.Module:
        model = super().unload()
        hook = vars(model).pop("_sparse_memory_mask_hook", None)
        if hook is not None:
            hook.remove()
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


def set_trainable(model: nn.Module, trainable: str) -> None:
    """Choose anew what of the active adapter's memory trains: `SparseMemoryConfig.trainable`.

    Between the paper's stages: a retrofit trains all of the memory, finetuning its value rows alone.

    Args:
        trainable: "values", "values+scale" or "memory".

    Raises:
        ValueError: another word, or a model without sparse memory.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable={trainable!r} must be one of {', '.join(map(repr, TRAINABLE))}")
    for memory in memory_layers(model).values():
        _freeze(memory, trainable)
    model.peft_config[model.active_adapter].trainable = trainable  # type: ignore[index,union-attr]


def _freeze(memory: ProductKeyMemory, trainable: str) -> None:
    """Parameters are what trains, buffers the rest: PEFT switches on every parameter of an adapter."""
    for name in _TENSORS:
        tensor = getattr(memory, name)
        if tensor is None:
            continue
        delattr(memory, name)
        if name in _TRAINED.get(trainable, _TENSORS):
            setattr(memory, name, nn.Parameter(tensor.detach()))
        else:
            memory.register_buffer(name, tensor.detach())


def _hand_out_mask(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before each call of the model: give every memory layer the call's 2-D attention mask, or none."""
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
            module.token_mask = mask


def _register() -> None:
    kind: Any = SparseMemoryType.SPARSE_MEMORY
    taken = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if taken is not None and taken is not SparseMemoryConfig:
        raise ImportError(
            f"the PEFT method name {kind.value!r} is already taken by {taken.__module__}.{taken.__name__}; "
            "uninstall the other package, or import only one of the two"
        )
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = SparseMemoryConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = SparseMemoryModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = SparseMemoryModel.prefix


_register()
