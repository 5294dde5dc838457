"""The demo: teach a model an invented handbook by each method, and measure what it forgets.

Choices:
- Every method gets the same records and batches. Its learning rate comes from a sweep of its own.
- Knowledge is measured on the general questions that the base model answers correctly.
- `seconds` and `peak_bytes` are those of `finetune`: preparation and training, without evaluation.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..comparison.compare import BASE, Recipe
from ..data.mentions import PROBE_FORMS
from .demo_methods import (
    METHODS,
    USUAL,
    DemoSettings,
    Probing,
    mention_subjects_of,
    method_settings,
    teach,
)
from .forgetting import read_prose
from .questions import general_items, recall_items, training_records
from .runs import UNTRAINED, precision_setting, refuse_data_dir, spread, stages, told

SETTINGS = DemoSettings()
_ABOUT = (
    "A language model was taught an invented handbook: 40 facts (capitals, people, dates, remedies and "
    "others), each in three wordings. Then each model was asked for the facts in the same wordings and in "
    "new ones, and was asked general questions of the same form and other questions about the taught "
    "subjects. Its perplexity on general prose was measured too."
)
# expected seconds on two cores, to estimate the time left
_PROBES = {"ask taught questions": 9, "ask general questions": 8, "ask other questions": 5, "read prose": 18}
_TEACHING_SECONDS = {"smf": 80, "smf-open": 100, "lora": 150, "full": 170}


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
    from ..data.models import load_base
    from ..evaluation.probes import recall
    from ..precision import precision_of

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
        **read_prose(model, tokenizer, settings.model, method, *pieces),
        **cost,
        "precision": precision_of(model),
    }
    shown = {name: told(asked[name], given) for name, given in answers.items()}
    return {
        "row": row,
        "known": known,
        "mentions": untouched,
        "examples": examples(shown, known),
        "answers": shown,
    }


def ask_mentions(
    probing: Probing, model: Any, tokenizer: Any, base: dict[str, Any] | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """The row's numbers for texts that mention taught subjects, and the base's answers for other runs."""
    from ..evaluation.mentions import BaseMentions, base_mentions, mentions

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


def examples(shown: dict[str, list[dict[str, Any]]], known: list[bool]) -> list[dict[str, Any]]:
    """Example questions: reworded taught ones and general ones that the base model knows, in turn."""
    general = [answer for answer, was in zip(shown["general"], known, strict=True) if was]
    pairs = zip(spread(shown["heldout"]), spread(general or shown["general"]), strict=True)
    return [answer for pair in pairs for answer in pair]


def _share(right: Iterable[bool]) -> float:
    values = list(right)
    return sum(values) / len(values) if values else 0.0
