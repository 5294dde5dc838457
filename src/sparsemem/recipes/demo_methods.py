"""The demo's settings, and how it trains each method.

| methods       | what                                                            |
| ------------- | --------------------------------------------------------------- |
| smf, smf-open | `finetune`'s memory, on cached states, with and without gate    |
| lora, full    | to a given loss, each at the rate that forgets least            |
| lora-gated    | low-rank maps behind the memory's gate, see `gated_lora`        |
| RIVALS        | see `rivals`                                                    |
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..comparison.compare import BASE
from ..data.mentions import PROBE_FORMS, mention_texts, prose_texts
from .forgetting import background
from .gated_lora import GATED, gated_settings, teach_gated_lora
from .questions import general_items, handbook, recall_items
from .rivals import RIVALS, rival_settings, rival_start
from .runs import MEMORY_METHODS, costs, spread

USUAL = (BASE, "smf", "lora", "full")
METHODS = (BASE, "smf", "smf-open", "lora", "full", GATED, *RIVALS)


@dataclass(frozen=True)
class Teaching:
    """How each method is trained.

    LoRA and full finetuning stop at a given loss; their learning rates are those that forget least at recall
    0.95. Sparse memory trains for a fixed number of steps on cached states, with a decaying rate.
    """

    stop_loss: float = 0.05
    max_epochs: int = 20
    batch_size: int = 8
    memory_steps: int = 200
    # of a rival whose loss holds more than the handbook's: as many as plain LoRA took
    rival_epochs: int = 8
    lr: Mapping[str, float] = field(
        default_factory=lambda: {"smf": 0.4, "smf-open": 0.4, "lora": 2e-4, "full": 2e-5}
    )


@dataclass(frozen=True)
class Memory:
    """The sparse memory and the prose in its background; `layers=None` means three late layers."""

    layers: tuple[int, ...] | None = None
    num_keys: int = 64
    num_heads: int = 16
    top_k: int = 64
    key_dim: int = 64
    top_t: int = 1024
    rule: str = "grad"
    prose_tokens: int = 2048
    prose_piece_tokens: int = 256


@dataclass(frozen=True)
class Probing:
    """The evaluation: tokens of prose, length of answers, and number of subjects in mention questions."""

    prose_tokens: int = 2048
    max_new_tokens: int = 12
    mention_subjects: int = 16
    mention_forms: int = 2
    mention_tokens: int = 24


@dataclass(frozen=True)
class DemoSettings:
    """All settings of the demo. A finished run is rejected if a setting that it depends on has changed."""

    model: str = "smollm2"
    # "float32", "bfloat16", or "auto": the faster one on this machine
    precision: str = "auto"
    teaching: Teaching = Teaching()
    # PEFT's default; on a CPU, the paper's dropout would take a third of each training step
    lora_dropout: float = 0.0
    memory: Memory = Memory()
    probing: Probing = Probing()


def method_settings(settings: DemoSettings, method: str) -> dict[str, Any]:
    """The settings that decide this method's result; changing one method keeps the others' runs valid."""
    kept: dict[str, Any] = {"probing": asdict(settings.probing)}
    if method != BASE:
        teaching = asdict(settings.teaching)
        rate, epochs = teaching.pop("lr"), teaching.pop("rival_epochs")
        kept["teaching"] = teaching
        if method == GATED:
            kept |= {**gated_settings(), "memory": asdict(settings.memory)}
        elif method in RIVALS:
            kept |= {**rival_settings(method), "general": asdict(settings.memory)["prose_tokens"]}
            kept["epochs"] = epochs
        else:
            kept["teaching"] = {**teaching, "lr": rate[method]}
    if method == "lora":
        kept["lora_dropout"] = settings.lora_dropout
    if method in MEMORY_METHODS:
        kept["memory"] = asdict(settings.memory)
    asked: list[Any] = [recall_items("train"), recall_items("heldout"), general_items()]
    asked.append(asked_mentions(settings.probing))
    return {**kept, "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}


def teach(
    settings: DemoSettings,
    method: str,
    seed: int,
    model: Any,
    tokenizer: Any,
    records: list[dict[str, Any]],
) -> tuple[Any, dict[str, Any]]:
    """Train the model on these records; returns the model and the costs of training."""
    from ..training.finetune import finetune

    teaching, memory = settings.teaching, settings.memory
    data, known_as = records, method
    general = []
    if method in (*MEMORY_METHODS, GATED, *RIVALS):
        general = background(seed, tokenizer, memory.prose_tokens, memory.prose_piece_tokens)
    options: dict[str, Any] = {"epochs": teaching.max_epochs, "stop_loss": teaching.stop_loss}
    if method == GATED:
        options = {"background": general, "batch_size": teaching.batch_size, "seed": seed}
        return teach_gated_lora(_with_memory(memory, model), records, tokenizer=tokenizer, **options)
    if method in RIVALS:
        rival = RIVALS[method]
        rate = rival.lr
        model, data, known_as = rival_start(method, model, records, general, tokenizer, seed)
        if rival.has_own_loss:
            options = {"epochs": teaching.rival_epochs}
    else:
        rate = teaching.lr[method]
    if method in MEMORY_METHODS:
        model = _with_memory(memory, model)
        options = {"background": general, "top_t": memory.top_t, "rule": memory.rule}
        options["max_steps"] = teaching.memory_steps
    elif method == "lora":
        model = _with_lora(settings.lora_dropout, model)
    batch_size = teaching.batch_size
    done = finetune(
        model, data, known_as, tokenizer=tokenizer, lr=rate, batch_size=batch_size, seed=seed, **options
    )
    return done.model, costs(done, batch_size)


def _with_memory(memory: Memory, model: Any) -> Any:
    from peft import get_peft_model

    from ..training.methods import memory_config

    config = memory_config(
        layers_to_transform=None if memory.layers is None else list(memory.layers),
        num_keys=memory.num_keys,
        num_heads=memory.num_heads,
        top_k=memory.top_k,
        key_dim=memory.key_dim,
    )
    return get_peft_model(model, config)


def _with_lora(dropout: float, model: Any) -> Any:
    from peft import get_peft_model

    from ..training.methods import lora_config

    config = lora_config()
    config.lora_dropout = dropout
    return get_peft_model(model, config)


def mention_subjects_of(probing: Probing) -> list[str]:
    return spread([fact["subject"] for fact in handbook()], probing.mention_subjects)


def asked_mentions(probing: Probing) -> list[str]:
    forms = PROBE_FORMS[: probing.mention_forms]
    subjects = mention_subjects_of(probing)
    return [*prose_texts(subjects), *(text for subject in subjects for text in mention_texts(subject, forms))]
