"""Run a model on batches and collect the hidden states that its memory layers read."""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..adapter.context import keeps_few
from ..adapter.layers import SparseMemoryLayer, first_input
from ..adapter.memories import memory_layers
from ..layer.memory import ProductKeyMemory
from ..precision import autocast, precise, takes


def layer_inputs(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    memory: bool = False,
    further: Mapping[str, nn.Module] | None = None,
):
    """Yield for each batch: (batch, {layer name: inputs [tokens, d_in] at unpadded positions}).

    The model runs in bfloat16 autocast if that is faster. Code that uses the states does not run in autocast.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids and, if there is padding, attention_mask.
        memory: False: the memory is switched off, so the inputs are those of the base model.
        further: other modules by name, whose inputs are returned too.

    Raises:
        ValueError: `batches` is empty, a batch has no input_ids, or a layer does not get one state a token.
    """
    seen: dict[str, list[Tensor]] = {}
    layers = memory_layers(model)
    modules: dict[str, nn.Module] = {name: _module_of(model, memory) for name, memory in layers.items()}
    modules |= further or {}
    handles = [
        module.register_forward_pre_hook(
            lambda _m, args, kw, name=name: seen[name].append(first_input(args, kw)),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    least = {
        key: value for key, value in {**few_logits(model), "use_cache": False}.items() if takes(model, key)
    }
    empty = True
    try:
        ours = [module for module in modules.values() if isinstance(module, SparseMemoryLayer)]
        off = nullcontext() if memory else memory_off(ours)
        with torch.no_grad(), precise(model), off, evaluating(model):
            for batch in batches:
                if not isinstance(batch, Mapping) or "input_ids" not in batch:
                    raise ValueError(
                        f"batches: contains a {type(batch).__name__}; each must be a dict with 'input_ids'"
                    )
                empty = False
                seen |= {name: [] for name in modules}
                device = next(model.parameters()).device
                ids = batch["input_ids"].to(device)
                mask = batch.get("attention_mask")
                mask = torch.ones_like(ids) if mask is None else mask.to(device)
                places = {}
                if takes(model, "position_ids") and not mask[:, 0].all():
                    # as in generation: with padding on the left, the first real token has position 0
                    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
                with autocast(model):
                    model(input_ids=ids, attention_mask=mask, **least, **places)
                # a norm without weights may run at the beginning too (NanoChat)
                runs = {n: seen[n] if n in layers else seen[n][-1:] for n in modules}
                yield batch, {n: _by_token(n, runs[n], mask)[mask.bool()] for n in modules}
    finally:
        for handle in handles:
            handle.remove()
    if empty:
        raise ValueError("batches: is empty; pass at least one batch")


def _by_token(name: str, seen: list[Tensor], mask: Tensor) -> Tensor:
    """States [batch, seq, d_in] of one pass; `mask` is [batch, seq]."""
    number = sum(states.numel() // states.shape[-1] for states in seen)
    if number != mask.numel():
        raise ValueError(
            f"model: {name} gets {number} states for {mask.numel()} tokens, and a sparse memory needs one "
            "state of each token; give another model"
        )
    return seen[-1].reshape(*mask.shape, -1)


def few_logits(model: nn.Module) -> dict[str, int]:
    """What to pass to a model whose states are read: its logits are not used, and in a small model they are a
    fifth of the work."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {"logits_to_keep": 1} if takes(model, "logits_to_keep") and not keeps_few(base) else {}


def supervised(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Which unpadded positions of a batch predict a label.

    Returns:
        Three masks, each [tokens] bool over the unpadded positions: positions whose next token is a label;
        those of them that are not labels themselves (answer starts); and the others in rows that have an
        answer start. A row in which all tokens are labels has no answer start.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    predicts, labelled = torch.zeros_like(mask), labels != -100
    predicts[:, :-1] = labelled[:, 1:]
    starts = predicts & ~labelled
    within = predicts & labelled & starts.any(1, keepdim=True)
    return predicts[mask], starts[mask], within[mask]


@contextmanager
def memory_off(layers: Iterable[SparseMemoryLayer]):
    """Within, the given layers return their base module's output. `requires_grad` is not changed."""
    before = [(layer, layer._disable_adapters) for layer in layers]
    try:
        for layer, _ in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in before:
            layer._disable_adapters = disabled


@contextmanager
def evaluating(model: nn.Module):
    """Within, the model is in evaluation mode. Afterwards each module has its former mode again."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _module_of(model: nn.Module, memory: ProductKeyMemory) -> SparseMemoryLayer:
    return next(
        m for m in model.modules() if isinstance(m, SparseMemoryLayer) and memory in m.active_memories()
    )
