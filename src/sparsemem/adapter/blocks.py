"""Find the decoder blocks, their MLPs and the widths of a causal LM.

The search uses the structure of the model, not the names of its modules, so it works for many architectures.
"""

import inspect
import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

# Depths of the default layers, as shares of all layers. They are late: there, the hidden states of taught
# subjects differ from those of subjects that the base model knows.
DEFAULT_DEPTHS = (0.8, 0.9, 0.97)


def default_targets(
    model: nn.Module, layers: list[int] | int | None = None, pattern: list[str] | str | None = None
) -> list[str]:
    """Module paths of the MLPs of the given decoder blocks.

    The blocks are the longest list of modules in the model. If `pattern` is given, only lists whose names end
    with a pattern are searched. The MLP of a block is its first child that contains at least two linear maps
    and whose forward takes no attention mask. If a block has no such child (OPT), its last linear map is
    used.

    Args:
        model: a causal LM.
        layers: block indices, from 0. None: three late blocks (DEFAULT_DEPTHS).
        pattern: names of the list of blocks, as `layers_pattern` of LoRA.

    Raises:
        ValueError: no MLP was found, or a layer index is too large.
    """
    blocks_name, blocks = _decoder_blocks(model, [pattern] if isinstance(pattern, str) else pattern)
    if layers is None:
        depths = (round(depth * (len(blocks) - 1)) for depth in DEFAULT_DEPTHS) if len(blocks) else ()
        chosen = sorted({_always_run(blocks, depth) for depth in depths})
    else:
        chosen = [layers] if isinstance(layers, int) else layers
        wrong = [index for index in chosen if index >= len(blocks)]
        if wrong and len(blocks):
            raise ValueError(
                f"layers_to_transform={layers}: no layer {wrong[0]}, allowed are 0 to {len(blocks) - 1}; "
                "remove the indices that are too large"
            )
    parts = [_read_part(blocks[index]) for index in chosen] if len(blocks) else []
    if not parts or None in parts:
        raise ValueError(
            f"target_modules=None: no MLP was found in the decoder blocks of {type(model).__name__}. "
            "Please specify `target_modules`, for example target_modules=['mlp']"
        )
    return [f"{blocks_name}.{index}.{part}" for index, part in zip(chosen, parts, strict=True)]


def state_modules(model: nn.Module, depths: Iterable[float]) -> list[str]:
    """Module paths whose inputs are the states at some depths, from first to last, the same kind as
    `default_targets` gives.

    Args:
        model: a causal LM.
        depths: shares of the number of blocks; shares that fall on one block give one module.

    Raises:
        ValueError: as for `default_targets`.
    """
    blocks = _decoder_blocks(model, None)[1]
    chosen = (min(len(blocks) - 1, round(depth * len(blocks))) for depth in depths)
    return default_targets(model, sorted({_always_run(blocks, index) for index in chosen}))


def _always_run(blocks: nn.ModuleList, index: int) -> int:
    """This block, or the one before it that texts without images run through too (Llama 3.2 Vision)."""
    kinds = [type(block).__name__ for block in blocks]
    return next(place for place in range(index, -1, -1) if "CrossAttention" not in kinds[place])


def blocks_path(model: nn.Module) -> str:
    """Module path of the list of decoder blocks."""
    return _decoder_blocks(model, None)[0]


def num_blocks(model: nn.Module) -> int:
    """How many decoder blocks the model has."""
    return len(_decoder_blocks(model, None)[1])


# Towers of other inputs than text, in the paths of modules.
_OTHER_SENSES = re.compile("vision|visual|image|audio")


def _decoder_blocks(model: nn.Module, patterns: list[str] | None) -> tuple[str, nn.ModuleList]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lists = {n: m for n, m in lists.items() if not _OTHER_SENSES.search(n)} or lists
    # A list inside a block (experts) is not the list of blocks.
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    # If the model has several parts (vision and text), use the blocks of the text decoder.
    inside = set(getattr(model, "get_decoder", lambda: model)().modules())
    outer = {n: m for n, m in outer.items() if m in inside} or outer
    if patterns:
        outer = {
            n: m for n, m in outer.items() if any(f".{n}".endswith(f".{pattern}") for pattern in patterns)
        }
    return max(outer.items(), key=lambda item: len(item[1]), default=("", nn.ModuleList()))


def _read_part(block: nn.Module) -> str | None:
    """Name of the child of a block whose input is read: its MLP, or else its last linear map, or else the
    last child that holds one (a mixer, attention)."""
    linear = mixer = None
    for name, child in block.named_children():
        child = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        words = " ".join(inspect.signature(child.forward).parameters)
        num_maps = len(_linears(child)) + len(_experts(child))
        if num_maps >= 2 and "mask" not in words and "past_key" not in words:
            return name
        if is_linear(child):
            linear = name
        elif num_maps:
            mixer = name
    return linear or mixer


def widths(module: nn.Module, name: str, hidden_size: int | None) -> tuple[int, int]:
    """(d_in, d_out) of a module: d_in of the first and d_out of the last linear map in it.

    Raises:
        ValueError: the module contains no linear map.
    """
    linears = _linears(module)
    if len(_experts(module)) >= 2 and hidden_size:
        return hidden_size, hidden_size
    in_maps = {id(p) for linear in linears for p in linear.parameters()}
    if linears and hidden_size and any(p.dim() > 1 and id(p) not in in_maps for p in module.parameters()):
        # experts as matrices, or a state space: the first and the last linear map say little
        return hidden_size, hidden_size
    if not linears:
        raise ValueError(
            f"target_modules: {name} ({type(module).__name__}) holds no linear map, so its widths are "
            "unknown; target an MLP or an nn.Linear"
        )
    first, last = (
        (m.weight.shape if isinstance(m, Conv1D) else (m.in_features, m.out_features))
        for m in (linears[0], linears[-1])
    )
    return int(first[0]), int(last[1])


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map. A linear map that a PEFT adapter wraps counts too."""
    return isinstance(module, nn.Linear | Conv1D) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def _linears(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if is_linear(m)]


def _experts(module: nn.Module) -> list[nn.Parameter]:
    """The 3-D weights [experts, ...] of a mixture of experts. It has one such parameter per linear map."""
    return [p for p in module.parameters() if p.dim() == 3]


def hidden_size(model: nn.Module) -> int | None:
    """Width of the text decoder's hidden states. None if the model's config does not give it."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    return getattr(text, "hidden_size", None)


def final_norm(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of the norm after the last decoder block. None if there is none.

    It is the last norm next to the list of blocks, or else next to a module that contains it; one as wide as
    the hidden states, if there is one.
    """
    path, blocks = _decoder_blocks(model, None)
    width = hidden_size(model)
    while path and len(blocks):
        path, _, inner = path.rpartition(".")
        children = dict(model.get_submodule(path).named_children())
        names = [name for name in children if name not in _EMBEDDING_NORMS and _is_norm(children[name])]
        if children[inner] is not blocks:
            # further out, what stands before the blocks runs before them
            names = [name for name in names if list(children).index(name) > list(children).index(inner)]
        fitting = [name for name in names if _width(children[name]) in (None, width)]
        if names:
            name = (fitting or names)[-1]
            return f"{path}.{name}".lstrip("."), children[name]
    return None


def final_width(model: nn.Module) -> int:
    """Width of the last residual, which the final norm reads."""
    found = final_norm(model)
    width = (found and _width(found[1])) or hidden_size(model)
    assert width
    return width


# Norms of embeddings that stand beside the blocks in models without a final norm.
_EMBEDDING_NORMS = {"layernorm_embedding", "embeddings_layer_norm", "layer_norm_emb"}


def _is_norm(module: nn.Module) -> bool:
    """Whether all parameters are vectors of one width; a norm may have none, and is then known by name. It is
    called with the states alone."""
    if isinstance(module, nn.ModuleList):
        return False
    given = inspect.signature(module.forward).parameters.values()
    if sum(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in given) > 1:
        return False
    # PEFT's wrapper for modules_to_save contains the norm twice, so shapes are collected in a set.
    shapes = {tuple(vector.shape) for vector in module.parameters()}
    if not shapes:
        return "norm" in type(module).__name__.lower()
    return len(shapes) == 1 and len(shapes.pop()) == 1


def _width(norm: nn.Module) -> int | None:
    vector = next(norm.parameters(), None)
    return None if vector is None else len(vector)


def check_decoder(model: nn.Module) -> None:
    """Raises:
    ValueError: the model has an encoder, whose states a memory cannot tell from the decoder's; its positions
        depend on padding; or parts of it are not in memory.
    """
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: {kind} is an encoder-decoder model, and a sparse memory needs a model that is a decoder "
            "alone; give a causal language model"
        )
    counts = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    if counts and "position_ids" in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"model: {kind} was made as an encoder (RoBERTa), in which positions depend on padding; give a "
            "model that was made as a decoder"
        )
    # PEFT takes the hooks off before it loads an adapter, and the map stays
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    hooks = [vars(module).get("_hf_hook") for module in model.modules()]
    offloaded = any(getattr(hook, "offload", False) for hook in hooks)
    if offloaded or "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError(
            f"model: parts of {kind} are offloaded to the CPU or the disk, where a sparse memory cannot read "
            "them; load it in fewer bits (quantization_config) or on more devices, so that it is in memory"
        )
