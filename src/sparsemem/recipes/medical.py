"""Medical: the paper's question (learn a domain without forgetting) at a size that runs on any machine.

Training data: diagnoses and their ICD-10 chapters, see `chapters`. LoRA and full finetuning get the same
number of steps; sparse memory takes more, cheaper steps (`memory_steps`).
Learnt: accuracy over four chapters by the likelihood of their names, on categories outside the training data.
Lost: questions about capitals by greedy decoding, perplexity on prose, drift from the base model.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..comparison.compare import BASE, Recipe
from .chapters import chapter_items, held_out_categories
from .forgetting import read_prose
from .medical_methods import METHODS, USUAL, MedicalSettings, method_settings, num_steps, teach
from .questions import capital_items
from .runs import UNTRAINED, precision_setting, refuse_data_dir, spread, stages, told

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
    from ..data.models import load_base
    from ..evaluation.probes import multiple_choice, recall
    from ..precision import precision_of

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
    from ..data.records import choice_text, prompt_ids

    names = [choice_text(name, tokenizer) for name in item["choices"]]
    ids = [tokenizer(name, add_special_tokens=False).input_ids for name in names]
    return prompt_ids(item["question"], tokenizer), ids
