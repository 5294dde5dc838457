"""The demo: teach a model an invented handbook by each method, and measure what it forgets.

Choices:
- Every method gets the same records and batches. Its learning rate comes from a sweep of its own.
- Knowledge is measured on the general questions that the base model answers correctly.
- `seconds` and `peak_bytes` are those of `finetune`: preparation and training, without evaluation.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ...choices import LEARN, MEMORY_METHODS
from ...data.known import PROBE_FORMS, mention_texts, prose_texts
from ..compare import BASE, Recipe
from .questions import general_items, handbook, recall_items, training_records
from .rivals import GATED, RIVALS, gated_settings, rival_settings, rival_start, teach_gated_lora
from .runs import (
    UNTRAINED,
    background,
    costs,
    precision_setting,
    read_prose,
    refuse_data_dir,
    spread,
    stages,
    told,
)

USUAL = (BASE, LEARN, "lora", "full")
METHODS = (BASE, LEARN, "smf", "smf-open", "lora", "full", GATED, *RIVALS)


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
    """The evaluation: tokens of prose, length of answers, and numbers of questions.

    Attributes:
        asked: questions in each context, and of each kind of neighbour.
    """

    prose_tokens: int = 2048
    max_new_tokens: int = 12
    mention_subjects: int = 16
    mention_forms: int = 2
    mention_tokens: int = 24
    asked: int = 20


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
        if method == LEARN:
            del kept["teaching"]
        elif method == GATED:
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
    from ...training.finetune import finetune

    if method == LEARN:
        return _learnt(model, tokenizer, records, seed)
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


def _learnt(
    model: Any, tokenizer: Any, records: list[dict[str, Any]], seed: int
) -> tuple[Any, dict[str, Any]]:
    """Teach each fact of the records as a task of its own."""
    from ...stream.stream import Stream
    from ...training.trainer import peak_memory

    with tempfile.TemporaryDirectory() as folder, peak_memory(model) as memory:
        began = time.perf_counter()
        stream = Stream(model, Path(folder) / "stream", tokenizer=tokenizer, seed=seed)
        left = iter(records)
        for number, fact in enumerate(handbook()):
            stream.teach(str(number), list(islice(left, len(fact["train"]))))
        taught = stream.model
        cost = {"seconds": time.perf_counter() - began, "samples": len(records)}
    return taught, {**UNTRAINED, **cost, "peak_bytes": memory.peak_bytes}


def _with_memory(memory: Memory, model: Any) -> Any:
    from peft import get_peft_model

    from ...training.methods import memory_config

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

    from ...training.methods import lora_config

    config = lora_config()
    config.lora_dropout = dropout
    return get_peft_model(model, config)


def mention_subjects_of(probing: Probing) -> list[str]:
    return spread([fact["subject"] for fact in handbook()], probing.mention_subjects)


def asked_mentions(probing: Probing) -> list[str]:
    forms = PROBE_FORMS[: probing.mention_forms]
    subjects = mention_subjects_of(probing)
    return [*prose_texts(subjects), *(text for subject in subjects for text in mention_texts(subject, forms))]


SETTINGS = DemoSettings()
_ABOUT = (
    "A language model was taught an invented handbook: 40 facts (capitals, people, dates, remedies and "
    "others), each in three wordings. Then each model was asked for the facts in the same wordings and in "
    "new ones, and was asked general questions of the same form and other questions about the taught "
    "subjects. Its perplexity on general prose was measured too."
)
# expected seconds on two cores, to estimate the time left
_PROBES = {
    "ask taught questions": 9,
    "ask general questions": 8,
    "ask other questions": 5,
    "ask in contexts, and neighbours": 60,
    "read prose": 18,
}
_TEACHING_SECONDS = {LEARN: 90, "smf": 80, "smf-open": 100, "lora": 150, "full": 170}


def recipe(
    *, model: str | None = None, data_dir: Path | None = None, settings: DemoSettings | None = None
) -> Recipe:
    """The demo as a recipe for `compare`, by default on SmolLM2-135M-Instruct.

    Raises:
        ValueError: a `data_dir` is given; the demo has its own data.
    """
    refuse_data_dir("the demo", data_dir)
    chosen = settings or SETTINGS
    chosen = replace(chosen, model=model or chosen.model)
    return Recipe(
        name="demo",
        model=chosen.model,
        precision=precision_setting(chosen.precision),
        about=_ABOUT,
        methods=USUAL,
        others=tuple(method for method in METHODS if method not in USUAL),
        settings=lambda method, _seed: method_settings(chosen, method),
        run=lambda method, seed, base, stage, _folder: run(chosen, method, seed, base, stage),
        stages=lambda method: stages(method, _PROBES, _TEACHING_SECONDS),
        order=METHODS,
    )


def run(
    settings: DemoSettings,
    method: str,
    seed: int | None,
    base: dict[str, Any] | None,
    stage: Callable[[str], None],
) -> dict[str, Any]:
    """Train the model by one method (the base model is not trained) and evaluate it."""
    from ...data.models import load_base
    from ...evaluation.probes import recall
    from ...precision import precision_of

    stage("load the model")
    model, tokenizer = load_base(settings.model)
    # on a CPU and with such short chats, training is a sixth faster than with sdpa
    model.set_attn_implementation("eager")
    cost = UNTRAINED
    if method != BASE:
        stage("teach")
        model, cost = teach(settings, method, seed or 0, model, tokenizer, training_records())

    stage("ask taught questions")
    asked = {"train": recall_items("train"), "heldout": recall_items("heldout"), "general": general_items()}
    answers = {
        name: recall(model, tokenizer, asked[name], max_new_tokens=settings.probing.max_new_tokens)
        for name in ("train", "heldout")
    }
    stage("ask general questions")
    answers["general"] = recall(
        model, tokenizer, asked["general"], max_new_tokens=settings.probing.max_new_tokens
    )
    known = answers["general"].correct if base is None else base["known"]

    stage("ask other questions")
    figures, untouched = ask_mentions(settings.probing, model, tokenizer, base)

    stage("ask in contexts, and neighbours")
    embedded, told_embedded = ask_neighbours(settings.probing, model, tokenizer, base)

    stage("read prose")
    pieces = settings.probing.prose_tokens, settings.memory.prose_piece_tokens
    row = {
        "recall_train": answers["train"].share,
        "recall_heldout": answers["heldout"].share,
        "knowledge": _share(
            right for right, was in zip(answers["general"].correct, known, strict=True) if was
        ),
        "knowledge_total": answers["general"].share,
        "num_known": sum(known),
        **figures,
        **embedded,
        **read_prose(model, tokenizer, settings.model, method, *pieces),
        **cost,
        "precision": precision_of(model),
    }
    shown = {name: told(asked[name], given) for name, given in answers.items()}
    return {
        "row": row,
        "known": known,
        "mentions": untouched,
        "embedded": told_embedded,
        "examples": examples(shown, known),
        "answers": shown,
    }


def ask_mentions(
    probing: Probing, model: Any, tokenizer: Any, base: dict[str, Any] | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """The row's numbers for texts that mention taught subjects, and the base's answers for other runs."""
    from ...evaluation.mentions import BaseMentions, base_mentions, mentions

    asked = {
        "subjects": mention_subjects_of(probing),
        "forms": PROBE_FORMS[: probing.mention_forms],
        "max_new_tokens": probing.mention_tokens,
    }
    if base is None:
        untouched = base_mentions(model, tokenizer, **asked)
        changed, perplexity, prose = 0.0, untouched.perplexity, untouched.prose_perplexity
    else:
        untouched = BaseMentions(**base["mentions"])
        found = mentions(model, tokenizer, base=untouched, **asked)
        changed, perplexity, prose = found.changed, found.perplexity, found.prose_perplexity
    figures = {
        "mentions_changed": changed,
        "mentions_perplexity": perplexity,
        "mentions_prose_perplexity": prose,
    }
    return figures, asdict(untouched)


def ask_neighbours(
    probing: Probing, model: Any, tokenizer: Any, base: dict[str, Any] | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """The row's numbers for taught questions in contexts and for their neighbours; all answers and parts."""
    from ...evaluation.neighbours import contexts, neighbours

    found = {}
    for ask in (contexts, neighbours):
        before = None if base is None else base["embedded"][ask.__name__]["answers"]
        options: dict[str, Any] = {"limit": probing.asked, "max_new_tokens": probing.mention_tokens}
        found[ask.__name__] = ask(model, tokenizer, training_records(), base=before, **options)
    embedded, near = found["contexts"], found["neighbours"]
    figures = {
        "contexts": embedded.metrics["right"],
        "worst_context": embedded.metrics["worst_right"],
        "neighbours_taught": near.all.taught,
        "neighbours_changed": near.all.changed,
    }
    return figures, {
        name: {"parts": {kind: asdict(one) for kind, one in probe.parts.items()}, "answers": probe.texts}
        for name, probe in found.items()
    }


def examples(shown: dict[str, list[dict[str, Any]]], known: list[bool]) -> list[dict[str, Any]]:
    """Example questions: reworded taught ones and general ones that the base model knows, in turn."""
    general = [answer for answer, was in zip(shown["general"], known, strict=True) if was]
    pairs = zip(spread(shown["heldout"]), spread(general or shown["general"]), strict=True)
    return [answer for pair in pairs for answer in pair]


def _share(right: Iterable[bool]) -> float:
    values = list(right)
    return sum(values) / len(values) if values else 0.0
