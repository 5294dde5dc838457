"""The methods: what each one trains, and with which optimizer.

| method     | trains                                                | lr   | optimizer                    |
| ---------- | ----------------------------------------------------- | ---- | ---------------------------- |
| "smf"      | selected rows of a memory, within the data's scope    | 0.4  | RowAdamW, a moment per table |
| "smf-open" | the same without a scope, as in the paper             | 0.4  | RowAdamW, a moment per table |
| "lora"     | r 16, alpha 32, dropout 0.05, all linear projections  | 2e-4 | AdamW without weight decay   |
| "peft"     | the PEFT adapter that the model carries               | none | AdamW without weight decay   |
| "full"     | every parameter                                       | 5e-5 | AdamW without weight decay   |
| "dense"    | all of a memory: the paper's retrofit, stage 1        | 5e-4 | AdamW without weight decay   |

Reference: 2605.03229 for LoRA, full finetuning and the dense retrofit; the rates of sparse memory are ours.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter.blocks import num_blocks
from ..adapter.config import SparseMemoryConfig
from ..adapter.memories import memory_layers, set_trainable
from ..background.background import Background
from ..background.calibration import calibrate
from ..background.scoping import TAUGHT_SIZE, check_background, set_scope, set_scope_of
from ..optim.release import ReleaseAdamW
from ..optim.rows import REST_LR, RowAdamW
from ..optim.selection import Rule, check_selection
from ..patches.patch import RowPatch
from ..processes import num_processes, object_of_first, of_first
from .cached import StateRows, TailHead

LEARNING_RATES = {"smf": 0.4, "smf-open": 0.4, "lora": 2e-4, "peft": None, "full": 5e-5, "dense": 5e-4}
METHODS = ("smf", "smf-open", "lora", "peft", "full")
MEMORY_METHODS = ("smf", "smf-open")
# Defaults: a step may change TOP_T of a table's NUM_KEYS ** 2 rows; a head reads TOP_K rows per token.
TOP_T, NUM_KEYS, TOP_K = 1024, 64, 64

MAX_GRAD_NORM = 1.0

Batches = Sequence[Mapping[str, Tensor]]


class Prepared(NamedTuple):
    """A model that is ready to train, and its optimizer.

    Attributes:
        before: `RowPatch.snapshot` before training; None without sparse memory.
        states: the head and the states that a tail memory trains on; None if it trains on the whole model.
    """

    model: PreTrainedModel | PeftModel
    optimizer: torch.optim.Optimizer
    before: dict[str, Tensor] | None
    states: tuple[TailHead, StateRows] | None = None


def check_method(method: str) -> None:
    """Raises:
    ValueError: an unknown method.
    """
    if method not in LEARNING_RATES:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(LEARNING_RATES)}")


def memory_config(**chosen: Any) -> SparseMemoryConfig:
    """The config of the memory that `finetune` adds to a base model, with the given changes.

    Args:
        chosen: fields of SparseMemoryConfig; a value of None means the default.
    """
    given = {key: value for key, value in chosen.items() if value is not None}
    num_keys = given.get("num_keys", NUM_KEYS)
    given.setdefault("top_k", min(TOP_K, max(1, num_keys**2)))
    return SparseMemoryConfig(task_type="CAUSAL_LM", **given)


def retrofit_config(model: nn.Module, **chosen: Any) -> SparseMemoryConfig:
    """The config of the memory that the paper's dense retrofit trains, with the given changes.

    Args:
        model: the base model.
        chosen: fields of SparseMemoryConfig; a value of None means the default.

    Reference: 2605.03229, stage 1.
    """
    given = {key: value for key, value in chosen.items() if value is not None}
    if given.get("target_modules") is None and given.get("layers_to_transform") is None:
        given["layers_to_transform"] = paper_layers(model)
    return SparseMemoryConfig.paper(**{"trainable": "memory", **given})


def paper_layers(model: nn.Module) -> list[int]:
    """The blocks at the depths of the paper's memory layers, 6, 12 and 18 of 24."""
    depth = num_blocks(model)
    return sorted({depth // 4, depth // 2, 3 * depth // 4})


def lora_config() -> LoraConfig:
    """The paper's LoRA: r 16, alpha 32, dropout 0.05, all linear projections of the blocks."""
    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def prepare(
    model: PreTrainedModel | PeftModel,
    method: str,
    *,
    batches: Batches,
    background: Background | Batches | None = None,
    lr: float | None = None,
    rest_lr: float = REST_LR,
    top_t: int = TOP_T,
    rule: Rule = "grad",
    moments: str = "table",
    quirks: Sequence[str] = (),
    seed: int = 0,
    known: Callable[[Background], Batches] | None = None,
    states: Callable[[PeftModel], tuple[TailHead, StateRows] | None] | None = None,
) -> Prepared:
    """Add a method's parameters to the model, in place, and create the optimizer that trains them.

    A base model gets a new adapter. A model that has an adapter of the same method is trained further.

    Args:
        model: a causal language model, with or without an adapter.
        method: one of METHODS.
        batches: the training data with labels; "smf" sets its scope from them.
        background: for sparse memory: the Background that `calibrate` returned, or batches of general text.
        lr: learning rate; None: the method's own, LEARNING_RATES.
        rest_lr: for sparse memory: learning rate of what trains besides rows, see `RowAdamW`.
        top_t, rule: for sparse memory: which rows a step may change, see `select_rows`.
        moments: for sparse memory: second moments, see `RowAdamW`.
        quirks: for sparse memory: deviations of the authors' release, see `ReleaseAdamW`.
        seed: for calibration and for rule "random".
        known: returns batches of further known states for `set_scope`, given the background.
        states: returns the head and the states of the training data, given the model with its memory. None:
            the model is trained and the scope is set on the batches themselves.

    Raises:
        ValueError: an unknown method, a model with an adapter of another method, or a background that is
            missing or does not fit.
    """
    check_method(method)
    check_selection(top_t, rule)
    lr = LEARNING_RATES[method] if lr is None else lr
    if lr is None:
        raise ValueError(f"lr=None, and method {method!r} has no rate of its own; give one")
    if method not in MEMORY_METHODS:
        if quirks:
            raise ValueError(
                f"quirks={list(quirks)} are for sparse memory only and method is {method!r}; give none"
            )
        model = {"lora": _lora, "peft": _peft, "full": _full, "dense": _dense}[method](model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Prepared(model, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True), None)
    model, own = _with_memory(model, background, seed)
    general: Background | None = object_of_first(own)
    _take_memories_of_first(model)
    before = RowPatch.snapshot(model)
    held = None if states is None or quirks else states(model)
    if method == "smf":
        if general is None:
            raise ValueError(
                "method='smf' needs background=; give general text, from which the taught data is told apart"
            )
        check_background(memory_layers(model), general)
        also = [] if known is None else known(general)
        if held is None:
            set_scope(model, batches, general, extend=True, known=also)
        else:
            taught = held[1].supervised(held[0], TAUGHT_SIZE)
            set_scope_of(model, taught, general, extend=True, known=also)
        _take_memories_of_first(model)
    elif any(memory.has_scope for memory in memory_layers(model).values()):
        raise ValueError(
            "method='smf-open' trains without a scope and the model has one; call clear_scope(model)"
        )
    # With one second moment per table, rows keep the proportions of their gradients (dev/LOG.md, section 4).
    betas = (0.9, 0.95) if moments == "table" else (0.9, 0.999)
    options: dict[str, Any] = {"top_t": top_t, "rule": rule, "background": general, "moments": moments}
    options |= {"rest_lr": rest_lr, "betas": betas, "max_grad_norm": MAX_GRAD_NORM, "seed": seed}
    optimizer = (
        ReleaseAdamW(model, lr, quirks=quirks, **options) if quirks else RowAdamW(model, lr, **options)
    )
    return Prepared(model, optimizer, before, held)


def _with_memory(
    model: PreTrainedModel | PeftModel, background: Background | Batches | None, seed: int
) -> tuple[PeftModel, Background | None]:
    """The model with a calibrated memory, and its background; None if none was given."""
    if isinstance(model, PeftModel):
        _train_on(model, "smf", "SPARSE_MEMORY")
        if isinstance(background, Background | None):
            return model, background
        if any(memory.values.any() for memory in memory_layers(model).values()):
            raise ValueError(
                "background= is text and the memory is in use; give the Background that calibrate returned"
            )
        return model, calibrate(model, background, seed=seed)
    if background is None:
        raise ValueError(
            "background=None: a new memory is calibrated on general text; give records, texts or a JSONL file"
        )
    if isinstance(background, Background):
        raise ValueError(
            "background= is a Background but the model has no memory; give the model that was calibrated"
        )
    model = get_peft_model(model, memory_config())  # type: ignore[arg-type,assignment]
    return model, calibrate(model, background, seed=seed)  # type: ignore[return-value]


def _take_memories_of_first(model: PeftModel) -> None:
    """Copy the first process's memories to all processes; other machines may round differently."""
    if num_processes() == 1:
        return
    for memory in memory_layers(model).values():
        scope = memory.scope
        memory.scope = object_of_first(None if scope is None else scope.copy())
        for tensor in memory.state_dict(keep_vars=False).values():
            if tensor.numel():
                of_first(tensor)


def _lora(model: PreTrainedModel | PeftModel) -> PeftModel:
    if isinstance(model, PeftModel):
        return _train_on(model, "lora", PeftType.LORA.value)
    return get_peft_model(model, lora_config())  # type: ignore[return-value]


def _peft(model: PreTrainedModel | PeftModel) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise ValueError("method='peft' trains the model's adapter and it has none; add one: get_peft_model")
    found = model.active_peft_config.peft_type
    if getattr(found, "value", found) == "SPARSE_MEMORY":
        raise ValueError("method='peft' is for other adapters and this is a sparse memory; use method='smf'")
    model.set_requires_grad(model.active_adapter, requires_grad=True)
    return model


def _full(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    if isinstance(model, PeftModel):
        raise ValueError(
            "method='full' trains every parameter of a base model and this one has an adapter; give the base"
        )
    return model.requires_grad_(True)


def _dense(model: PreTrainedModel | PeftModel) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise ValueError(
            "method='dense' trains a memory and this model has none; add one with get_peft_model"
        )
    set_trainable(_train_on(model, "dense", "SPARSE_MEMORY"), "memory")
    for memory in memory_layers(model).values():
        # with the log of an earlier row optimizer, the table would get no gradient in `.grad`
        memory.log = None
    return model


def _train_on(model: PeftModel, method: str, kind: str) -> PeftModel:
    """The same model, with its active adapter made trainable."""
    found = model.active_peft_config.peft_type
    if getattr(found, "value", found) != kind:
        raise ValueError(
            f"method={method!r} cannot train on an adapter of type {found}; give the base model instead"
        )
    model.set_requires_grad(model.active_adapter, requires_grad=True)
    return model
