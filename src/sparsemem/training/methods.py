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

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter.blocks import num_blocks
from ..adapter.config import SparseMemoryConfig
from ..adapter.memories import check_bare, memory_layers, set_trainable
from ..background.background import Background
from ..background.calibration import calibrate
from ..background.scoping import TAUGHT_SIZE, check_background, set_scope, set_scope_of
from ..optim.release import ReleaseAdamW
from ..optim.rows import RowAdamW
from ..patches.patch import RowPatch
from ..processes import num_processes, object_of_first, of_first
from .cached import StateRows, TailHead, train_states
from .loading import Batches, RunData
from .options import MAX_GRAD_NORM, Options

# Size of a new memory's tables, and how many rows a head reads for each token.
NUM_KEYS, TOP_K = 64, 64

States = tuple[TailHead, StateRows]


class Prepared(NamedTuple):
    """A model that is ready to train, and its optimizer.

    Attributes:
        before: `RowPatch.snapshot` before training; None without sparse memory.
        states: the head and the states that a tail memory trains on; None if it trains on the whole model.
    """

    model: PreTrainedModel | PeftModel
    optimizer: torch.optim.Optimizer
    before: dict[str, Tensor] | None = None
    states: States | None = None


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


def prepare(model: PreTrainedModel | PeftModel, data: RunData, options: Options, folder: Path) -> Prepared:
    """Add a method's parameters to the model, in place, and create the optimizer that trains them.

    A base model gets a new adapter. A model that has an adapter of the same method is trained further.

    Args:
        model: a causal language model, with or without an adapter.
        folder: for states that need more than `options.cache_bytes`.

    Raises:
        ValueError: a model with an adapter of another method, or a background that is missing or does not
            fit.
    """
    if not options.has_memory:
        model = {"lora": _lora, "peft": _peft, "full": _full, "dense": _dense}[options.method](model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Prepared(model, torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0, fused=True))
    data = data.with_mentions(model, options.mentions if options.method == "smf" else 0)
    model, background = add_memory(model, data, options)
    before = RowPatch.snapshot(model)
    states = taught_states(model, data, options, folder)
    if options.method == "smf":
        scope_on(model, data, options, background, states)
    elif any(memory.has_scope for memory in memory_layers(model).values()):
        raise ValueError(
            "method='smf-open' trains without a scope and the model has one; call clear_scope(model)"
        )
    return Prepared(model, row_optimizer(model, options, background), before, states)


def add_memory(
    model: PreTrainedModel | PeftModel, data: RunData, options: Options
) -> tuple[PeftModel, Background | None]:
    """The model with a calibrated memory, and its background; None if none was given.

    Raises:
        ValueError: a model with another adapter, or a background that is missing or does not fit.
    """
    given = data.general
    if isinstance(model, PeftModel):
        _train_on(model, options.method, "SPARSE_MEMORY")
        if given and not isinstance(given, Background) and _in_use(model):
            raise ValueError(
                "background= is text and the memory is in use; give the Background that calibrate returned"
            )
        if options.trainable is not None:
            set_trainable(model, options.trainable)
    elif given is None:
        raise ValueError(
            "background=None: a new memory is calibrated on general text; give records, texts or a JSONL file"
        )
    elif isinstance(given, Background):
        raise ValueError(
            "background= is a Background but the model has no memory; give the model that was calibrated"
        )
    else:
        check_bare(model)
        model = get_peft_model(model, memory_config(trainable=options.trainable))  # type: ignore[assignment]
    if not isinstance(given, Background | None):
        given = calibrate(model, data.general_batches(), seed=options.seed)
    background: Background | None = object_of_first(given)
    _take_memories_of_first(model)
    return model, background


def taught_states(model: PeftModel, data: RunData, options: Options, folder: Path) -> States | None:
    """The head and the states of what is taught; None if the whole model trains."""
    if options.quirks:
        return None
    return train_states(model, data.examples, data.pad, options.cache_bytes, folder)


def scope_on(
    model: PeftModel, data: RunData, options: Options, background: Background | None, states: States | None
) -> None:
    """Set the memory's scope on what is taught, or extend it; what is known keeps out of it.

    Raises:
        ValueError: a background that is missing or does not fit.
    """
    if background is None:
        raise ValueError(
            "method='smf' needs background=; give general text, from which the taught data is told apart"
        )
    check_background(memory_layers(model), background)
    known: Batches = data.known_batches(background)
    if states is None:
        set_scope(model, data.batches(options.batch_size), background, extend=True, known=known)
    else:
        head, rows = states
        set_scope_of(model, rows.supervised(head, TAUGHT_SIZE), background, extend=True, known=known)
    _take_memories_of_first(model)


def row_optimizer(model: PeftModel, options: Options, background: Background | None) -> RowAdamW:
    """The optimizer of the memory's rows.

    With one second moment per table, rows keep the proportions of their gradients (dev/LOG.md, section 4).
    """
    given: dict[str, Any] = {"background": background, "max_grad_norm": MAX_GRAD_NORM}
    given |= {key: getattr(options, key) for key in ("top_t", "rule", "moments", "rest_lr", "seed")}
    given["betas"] = (0.9, 0.95) if options.moments == "table" else (0.9, 0.999)
    if options.quirks:
        return ReleaseAdamW(model, options.rate, quirks=options.quirks, **given)
    return RowAdamW(model, options.rate, **given)


def _in_use(model: PeftModel) -> bool:
    return any(memory.values.any() for memory in memory_layers(model).values())


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
    check_bare(model)
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
    check_bare(model)
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
