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
from transformers.pytorch_utils import Conv1D

from .config import SparseMemoryConfig, SparseMemoryType
from .memory import ProductKeyMemory

# Depths of the default layers: late, where hidden states tell taught subjects from known ones.
DEFAULT_DEPTHS = (0.8, 0.9, 0.97)

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
        for name, parameter in list(memory.named_parameters()):
            if name not in _TRAINED.get(config.trainable, (name,)):
                delattr(memory, name)
                memory.register_buffer(name, parameter.detach())
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
        kind = SparseMemoryLinear if _is_linear(target) else SparseMemoryLayer
        layer = kind(target, *_widths(target, current_key, _hidden_size(self.model)))
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


def default_targets(
    model: nn.Module, layers: list[int] | int | None = None, pattern: list[str] | str | None = None
) -> list[str]:
    """Paths of the decoder blocks' MLPs in the given layers; None: three late ones (DEFAULT_DEPTHS).

    Found by structure, not by name: the longest list of blocks (of those that `pattern` names), and in each
    block the child that holds at least two maps and whose forward knows no attention mask. A block without
    such a child (OPT) offers its last linear map.

    Raises:
        ValueError: no such blocks, or a layer index out of range.
    """
    blocks_name, blocks = _decoder_blocks(model, [pattern] if isinstance(pattern, str) else pattern)
    mlps = [_mlp_name(block) for block in blocks]
    if not mlps or None in mlps:
        raise ValueError(
            f"target_modules=None: no MLP was found in the decoder blocks of {type(model).__name__}. "
            "Please specify `target_modules`, for example target_modules=['mlp']"
        )
    if layers is None:
        chosen = sorted({round(depth * (len(mlps) - 1)) for depth in DEFAULT_DEPTHS})
    else:
        chosen = [layers] if isinstance(layers, int) else layers
        wrong = [index for index in chosen if index >= len(mlps)]
        if wrong:
            raise ValueError(
                f"layers_to_transform={layers}: no layer {wrong[0]}, allowed are 0 to {len(mlps) - 1}"
            )
    return [f"{blocks_name}.{index}.{mlps[index]}" for index in chosen]


def _decoder_blocks(model: nn.Module, patterns: list[str] | None) -> tuple[str, nn.ModuleList]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Lists within a block (experts) are not the list of blocks.
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    # In a model of several towers, the text decoder's blocks are meant.
    inside = set(getattr(model, "get_decoder", lambda: model)().modules())
    outer = {n: m for n, m in outer.items() if m in inside} or outer
    if patterns:
        outer = {
            n: m for n, m in outer.items() if any(f".{n}".endswith(f".{pattern}") for pattern in patterns)
        }
    return max(outer.items(), key=lambda item: len(item[1]), default=("", nn.ModuleList()))


def _mlp_name(block: nn.Module) -> str | None:
    linear = None
    for name, child in block.named_children():
        child = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        words = " ".join(inspect.signature(child.forward).parameters)
        if (
            len(_linears(child)) + len(_experts(child)) >= 2
            and "mask" not in words
            and "past_key" not in words
        ):
            return name
        if _is_linear(child):
            linear = name
    return linear


def _widths(module: nn.Module, name: str, hidden_size: int | None) -> tuple[int, int]:
    """(d_in, d_out): of a linear map, else of the first and the last linear map inside."""
    linears = _linears(module)
    if len(_experts(module)) >= 2 and hidden_size:
        return hidden_size, hidden_size
    if not linears:
        raise ValueError(
            f"target_modules: {name} ({type(module).__name__}) holds no linear map, its widths are unknown; "
            "target an MLP or an nn.Linear"
        )
    first, last = (
        (m.weight.shape if isinstance(m, Conv1D) else (m.in_features, m.out_features))
        for m in (linears[0], linears[-1])
    )
    return int(first[0]), int(last[1])


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def _linears(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if _is_linear(m)]


def _experts(module: nn.Module) -> list[nn.Parameter]:
    """The weights [experts, ...] of a mixture of experts, which has one such parameter per map."""
    return [p for p in module.parameters() if p.dim() == 3]


def _hidden_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    return getattr(text, "hidden_size", None)


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
