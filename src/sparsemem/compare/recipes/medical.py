"""Medical: the paper's question (learn a domain without forgetting) at a size that runs on any machine.

Training data: diagnoses and their ICD-10 chapters, see `chapters`. LoRA and full finetuning get the same
number of steps; sparse memory takes more, cheaper steps (`memory_steps`).
Learnt: accuracy over four chapters by the likelihood of their names, on categories outside the training data.
Lost: questions about capitals by greedy decoding, perplexity on prose, drift from the base model.
"""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...atomic import write_atomically
from ...choices import MEMORY_METHODS
from ..compare import BASE, PARTIAL, Recipe
from .arms import ARMS, Arm, arm_options, grafted
from .questions import capital_items, require
from .rivals import GATED, RIVALS, gated_settings, rival_settings, rival_start, teach_gated_lora
from .runs import (
    UNTRAINED,
    background,
    costs,
    keep_metrics,
    precision_setting,
    read_prose,
    refuse_data_dir,
    spread,
    stages,
    tokens,
    told,
)

OWN = "smf-own"
LONG = {"lora-long": "lora", "full-long": "full"}
USUAL = (BASE, "smf", "lora", "full")
METHODS = (BASE, "smf", "smf-open", OWN, *ARMS, "lora", "full", *LONG, GATED, *RIVALS)


@dataclass(frozen=True)
class ArmSettings:
    """Of the paper's arms; stage 1 is the dense retrofit. The rate was chosen on a split of the training
    records: the retrofit shrinks what an additive memory adds (dev/LOG.md, section 27)."""

    lr: float = 10.0
    top_t: int = 512
    stage1_steps: int = 100
    stage1_batch_size: int = 8
    stage1_tokens: int = 50_000
    stage1_piece_tokens: int = 128


@dataclass(frozen=True)
class MedicalSettings:
    """All settings of the recipe."""

    model: str = "smollm2"
    # "float32", "bfloat16", or "auto": the faster one on this machine
    precision: str = "auto"
    num_train: int = 2400
    num_test: int = 400
    # test on categories taken out of the training records, to choose settings
    choosing: bool = False
    max_steps: int = 150
    # on cached states and with a decaying rate: three passes over the records
    memory_steps: int = 900
    batch_size: int = 8
    lr: Mapping[str, float] = field(
        default_factory=lambda: {"smf": 0.4, "smf-open": 0.4, OWN: 0.4, "lora": 2e-4, "full": 5e-5}
    )
    arms: ArmSettings = ArmSettings()
    max_new_tokens: int = 12
    prose_tokens: int = 3000
    background_tokens: int = 2048
    piece_tokens: int = 256


def num_steps(settings: MedicalSettings, method: str) -> int:
    return settings.memory_steps if method in (*MEMORY_METHODS, *LONG) else settings.max_steps


def method_settings(settings: MedicalSettings, method: str) -> dict[str, Any]:
    """The settings that decide this method's result; changing one method keeps the others' runs valid."""
    kept = asdict(settings)
    del kept["model"], kept["precision"], kept["memory_steps"]
    if not settings.choosing:
        del kept["choosing"]
    rates, arms = kept.pop("lr"), kept.pop("arms")
    kept["max_steps"] = num_steps(settings, method)
    if method == BASE:
        return kept
    if method == GATED:
        return kept | gated_settings()
    if method in RIVALS:
        return kept | rival_settings(method)
    if method in ARMS:
        return kept | {"arm": asdict(ARMS[method]), **arms}
    return kept | {"lr": rates[LONG.get(method, method)]}


def teach(
    settings: MedicalSettings,
    method: str,
    seed: int,
    model: Any,
    tokenizer: Any,
    records: list[dict[str, Any]],
    folder: Path,
) -> tuple[Any, dict[str, Any]]:
    """Train the method's model on the records; returns it and the costs. An interrupted training continues.

    Args:
        model: the base model; an arm loads its grafted one instead.
        folder: of the run, in the comparison's folder, where arms share their dense retrofit.
    """
    from peft import get_peft_model

    from ...training.finetune import finetune
    from ...training.methods import memory_config

    general = []
    if method in (*MEMORY_METHODS, OWN, GATED, *RIVALS):
        general = background(seed, tokenizer, settings.background_tokens, settings.piece_tokens)
    data: list[dict[str, Any]] = records
    options: dict[str, Any] = {"lr": settings.lr.get(LONG.get(method, method))}
    known_as = {OWN: "smf", **LONG}.get(method, method)
    if method in ARMS:
        model, options = _arm(settings, ARMS[method], tokenizer, folder.parents[1])
        known_as = "smf-open"
    if method == GATED:
        options = {"background": general, "batch_size": settings.batch_size, "seed": seed}
        return teach_gated_lora(model, records, tokenizer=tokenizer, **options)
    if method in RIVALS:
        options = {"lr": RIVALS[method].lr}
        model, data, known_as = rival_start(method, model, records, general, tokenizer, seed)
    if method == OWN:
        model = get_peft_model(model, memory_config(write="own"))
    if method in (*MEMORY_METHODS, OWN):
        options["background"] = general
    done = finetune(
        model,
        data,
        known_as,
        tokenizer=tokenizer,
        max_steps=num_steps(settings, method),
        batch_size=settings.batch_size,
        seed=seed,
        output_dir=folder / PARTIAL,
        resume=True,
        **options,
    )
    keep_metrics(folder)
    return done.model, costs(done, settings.batch_size)


def _arm(settings: MedicalSettings, arm: Arm, tokenizer: Any, out: Path) -> tuple[Any, dict[str, Any]]:
    """The grafted model of one of the paper's arms, and `finetune`'s options for it."""
    from ...data.general import prose
    from ...data.models import load

    chosen = settings.arms
    ids = tokens(tokenizer, prose()[0], chosen.stage1_tokens)
    pieces = map(tokenizer.decode, ids.split(chosen.stage1_piece_tokens))
    source = out / "stage1" / "prose.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"text": piece}) + "\n" for piece in pieces)
    write_atomically(source, lambda path: path.write_text(text, encoding="utf-8"))
    stage1 = {"lr": 5e-4, "max_steps": chosen.stage1_steps, "batch_size": chosen.stage1_batch_size}
    start = grafted(settings.model, str(source), arm, out, 2 * chosen.stage1_piece_tokens, stage1)
    model = load(str(start))[0]
    return model, arm_options(model, arm, start) | {
        "lr": chosen.lr,
        "rest_lr": chosen.lr,
        "top_t": chosen.top_t,
    }


_TITLES_PER_CATEGORY = 2
_SPLIT_SEED = 0


def chapter_items(num_train: int, num_test: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training items and test items: `question`, `choices` (four chapters), `answer` (index) and `code`.

    The items are the same on every machine with the same version of the data package.

    Raises:
        ValueError: there are not enough titles, or simple_icd_10_cm is not installed.
    """
    icd = require("simple_icd_10_cm")
    rng = random.Random(_SPLIT_SEED)
    # the last chapter, for special purposes, has only a few codes
    chapters = [code for code in icd.get_all_codes(True) if icd.is_chapter(code)][:-1]
    names = {code: re.sub(r" \([A-Z0-9]+-[A-Z0-9]+\)$", "", icd.get_description(code)) for code in chapters}
    by_category: dict[str, list[str]] = {}
    for code in icd.get_all_codes(True):
        if icd.is_leaf(code) and icd.get_ancestors(code)[-1] in names:
            by_category.setdefault(code[:3], []).append(code)
    categories = sorted(by_category)
    rng.shuffle(categories)
    drawn = []
    for category in categories:
        codes = by_category[category]
        drawn.append(rng.sample(codes, min(_TITLES_PER_CATEGORY, len(codes))))
    num_codes = sum(map(len, drawn))
    if num_train + num_test > num_codes:
        raise ValueError(
            f"num_train={num_train} and num_test={num_test} together are more than the "
            f"{num_codes} titles; lower one of them"
        )
    test: list[str] = []
    while len(test) < num_test:
        test += drawn.pop()
    train = [code for codes in drawn for code in codes]
    rng.shuffle(train)

    def item(code: str) -> dict[str, Any]:
        right = names[icd.get_ancestors(code)[-1]]
        choices = [right, *rng.sample([name for name in names.values() if name != right], 3)]
        rng.shuffle(choices)
        question = f'Which chapter of ICD-10 does the diagnosis "{icd.get_description(code)}" belong to?'
        return {"question": question, "choices": choices, "answer": choices.index(right), "code": code}

    return [item(code) for code in train[:num_train]], [item(code) for code in test[:num_test]]


def held_out_categories(
    items: list[dict[str, Any]], num_test: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split training items into items to learn and about `num_test` items of other categories."""
    held_out: set[str] = set()
    for item in items:
        if sum(one["code"][:3] in held_out for one in items) >= num_test:
            break
        held_out.add(item["code"][:3])
    learnt = [item for item in items if item["code"][:3] not in held_out]
    return learnt, [item for item in items if item["code"][:3] in held_out]


SETTINGS = MedicalSettings()
_ABOUT = (
    "A language model was trained to name the ICD-10 chapter of a diagnosis, with {max_steps} batches of "
    "{batch_size} ({memory_steps} for sparse memory, whose steps use cached states). Then it had to choose "
    "the right chapter among four for {num_test} diagnoses of categories outside the training data, and was "
    "asked for the capitals of real countries. Its perplexity on general prose was measured too."
)
# expected seconds on two cores, to estimate the time left
_PROBES = {"ask for chapters": 50, "ask for capitals": 12, "read prose": 25}
_TEACHING_SECONDS = {"smf": 160, "smf-open": 200, "lora": 360, "full": 330}


def recipe(
    *, model: str | None = None, data_dir: Path | None = None, settings: MedicalSettings | None = None
) -> Recipe:
    """The medical comparison as a recipe for `compare`, by default on SmolLM2-135M-Instruct.

    Raises:
        ValueError: a `data_dir` is given; the recipe has its own data.
    """
    refuse_data_dir("medical", data_dir)
    chosen = settings or SETTINGS
    chosen = replace(chosen, model=model or chosen.model)
    return Recipe(
        name="medical",
        model=chosen.model,
        precision=precision_setting(chosen.precision),
        about=_ABOUT.format(**asdict(chosen)),
        methods=USUAL,
        others=tuple(method for method in METHODS if method not in USUAL),
        order=METHODS,
        settings=lambda method, _seed: method_settings(chosen, method),
        run=lambda method, seed, _base, stage, folder: run(chosen, method, seed, stage, folder),
        stages=lambda method: stages(method, _PROBES, _TEACHING_SECONDS),
        learnt=("chapters",),
        lost=("perplexity", "capitals", "drift"),
        seeds=(0, 1, 2),
        plan=lambda method: {
            "data": f"{chosen.num_train} diagnoses, {chosen.num_test} to test",
            "steps": 0 if method == BASE else num_steps(chosen, method),
        },
    )


def run(
    settings: MedicalSettings,
    method: str,
    seed: int | None,
    stage: Callable[[str], None],
    folder: Path,
) -> dict[str, Any]:
    """Train the model (not for the base) and evaluate it; continues an interrupted training."""
    from ...data.models import load_base
    from ...evaluation.probes import multiple_choice, recall
    from ...precision import precision_of

    stage("load the model")
    model, tokenizer = load_base(settings.model)
    taught, asked = chapter_items(settings.num_train, settings.num_test)
    if settings.choosing:
        taught, asked = held_out_categories(taught, settings.num_test)
    cost = UNTRAINED
    if method != BASE:
        stage("teach")
        records = [_record(item) for item in taught]
        model, cost = teach(settings, method, seed or 0, model, tokenizer, records, folder)
    stage("ask for chapters")
    chapters = multiple_choice(model, tokenizer, asked, tokens=_tokens)
    stage("ask for capitals")
    questions = capital_items()
    answers = recall(model, tokenizer, questions, max_new_tokens=settings.max_new_tokens)
    stage("read prose")
    prose = read_prose(model, tokenizer, settings.model, method, settings.prose_tokens, settings.piece_tokens)
    shares = {"chapters": chapters.share, "chapters_sum": chapters.share_by_sum, "capitals": answers.share}
    shown = told(questions, answers)
    return {
        "row": {**shares, **prose, **cost, "precision": precision_of(model)},
        "items": {"chapters": chapters.correct, "capitals": answers.correct},
        "examples": spread(shown),
        "answers": shown,
    }


def _record(item: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": item["question"], "completion": item["choices"][item["answer"]]}


def _tokens(item: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Token ids of the question alone, and of each chapter's name; the prompt does not list the choices."""
    from ...data.records import choice_text, prompt_ids

    names = [choice_text(name, tokenizer) for name in item["choices"]]
    ids = [tokenizer(name, add_special_tokens=False).input_ids for name in names]
    return prompt_ids(item["question"], tokenizer), ids
