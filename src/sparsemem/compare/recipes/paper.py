"""Paper: the whole experiment of 2605.03229. MedMCQA is learnt; WikiText and TriviaQA should not get worse.

| arm                                     | memory                  | stage 1   | trains         | rule  |
| --------------------------------------- | ----------------------- | --------- | -------------- | ----- |
| replacement-kl, replacement-tfidf       | instead of three MLPs   | dense     | rows           | named |
| additive-kl, additive-tfidf             | beside three MLPs       | dense     | rows           | named |
| additive-scale-kl, additive-scale-tfidf | beside three MLPs       | dense     | rows and alpha | named |
| calibrated-kl, calibrated-tfidf         | beside three MLPs       | calibrate | rows           | named |
| smf                                     | `finetune`'s own, gated | calibrate | rows           | grad  |
| lora, full                              |                         |           |                |       |

The arms of the first three lines, base, lora and full are the paper's nine arms; the others are ours. Stage 1
runs once for additive and once for replacement, with seed 0; all seeds and rules share it.

Deviations from the paper: weights are float32, with bfloat16 autocast where that is fast. The background of
the calibrated arms has batches of eight examples, not one. Stage 1 holds out 5 % of its text. smf learns from
the answer after the prompt and not from all of the text, because its scope comes from supervised positions.
Further deviations are in the `settings` of a run.

Reference: 2605.03229, sections on both stages, baselines and evaluation.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..compare import BASE, Recipe
from .arms import ARMS, HUB, METHODS, SETTINGS, PaperSettings, method_settings, run
from .runs import precision_setting

_FILES = {
    "train": ("medmcqa*train*.jsonl", "MedMCQA's training items, {question, choices, answer} per line"),
    "medmcqa": ("medmcqa*test*.jsonl", "MedMCQA's items to test on, {question, choices, answer} per line"),
    "wikitext": ("wikitext*raw_test.txt", "WikiText's raw test split"),
    "triviaqa": ("triviaqa*.jsonl", "TriviaQA's questions, {question, answers} per line"),
    "general": ("oasst*.jsonl", "OpenAssistant's replies, {messages} per line"),
}
# expected seconds on two cores, to estimate the time left
_TEACHING, _ASKING = 6.0, {"medmcqa": 0.4, "wikitext": 0.1, "triviaqa": 0.4}


def recipe(
    *, model: str | None = None, data_dir: Path | None = None, settings: PaperSettings | None = None
) -> Recipe:
    """The paper's comparison as a recipe for `compare`.

    Raises:
        ValueError: `data_dir` lacks a file, or has two for one purpose.
    """
    chosen = settings or SETTINGS
    chosen = replace(chosen, model=model or chosen.model)
    files = None if data_dir is None else {name: _found(data_dir, name) for name in _FILES}
    names = dict(HUB) if files is None else {name: _named(paths) for name, paths in files.items()}
    return Recipe(
        name="paper",
        model=chosen.model,
        precision=precision_setting(chosen.precision),
        about=(
            "A language model was trained on MedMCQA's questions by the paper's methods (2605.03229) and "
            "some of ours. WikiText and TriviaQA measure what it forgot."
        ),
        methods=METHODS,
        settings=lambda method, _seed: method_settings(chosen, method, names),
        run=lambda method, seed, _base, stage, folder: run(chosen, files, method, seed, stage, folder),
        stages=lambda method: stages(chosen, files, method),
        learnt=("medmcqa",),
        lost=("wikitext", "triviaqa"),
        seeds=(1, 2, 3),
        plan=lambda method: plan(chosen, files, method),
    )


def stages(settings: PaperSettings, files: Mapping[str, list[Path]] | None, method: str) -> dict[str, float]:
    """Stages of one run with their expected seconds; stage 1 is part of stage `teach`."""
    teach = {} if method == BASE else {"teach": _TEACHING * _num_steps(settings, files)[1]}
    return {"load the model": 15, **teach, **{task: one * settings.limit for task, one in _ASKING.items()}}


def plan(settings: PaperSettings, files: Mapping[str, list[Path]] | None, method: str) -> dict[str, int]:
    """Numbers of items and of steps. Stage 1 is needed in addition for the first arm that uses it."""
    if method == BASE:
        return {"test_items": settings.limit}
    number, steps = _num_steps(settings, files)
    planned = {"test_items": settings.limit, "train_items": number, "steps": steps}
    if method in ARMS and ARMS[method].retrofit == "dense":
        planned["stage1_steps"] = _num_stage1_steps(settings, files)
    return planned


def _num_steps(settings: PaperSettings, files: Mapping[str, list[Path]] | None) -> tuple[int, int]:
    """The number of training items and of optimizer steps."""
    number = settings.train_items
    if files is not None:
        number = min(number, sum(map(_num_lines, files["train"])))
    per_epoch = math.ceil(number / (settings.batch_size * settings.accumulation))
    return number, settings.max_steps or settings.epochs * per_epoch


def _num_stage1_steps(settings: PaperSettings, files: Mapping[str, list[Path]] | None) -> int:
    from ...training.retrofit import HELD_OUT, OASST_MOST

    number = OASST_MOST if files is None else _num_lines(files["general"][0])
    kept = number - math.ceil(number / HELD_OUT)
    per_epoch = math.ceil(kept / (settings.stage1_batch_size * settings.stage1_accumulation))
    return settings.stage1_max_steps or settings.stage1_epochs * per_epoch


def _num_lines(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        return sum(1 for line in file if line.strip())


def _named(paths: list[Path]) -> str:
    """File names with the first digits of their digests: a changed file counts as a changed setting."""
    return ", ".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" for path in paths)


def _found(data_dir: Path, name: str) -> list[Path]:
    pattern, content = _FILES[name]
    paths = sorted(data_dir.glob(pattern))
    if not paths:
        raise ValueError(f"data_dir {str(data_dir)!r} has no file {pattern}; put {content} there")
    if len(paths) > 1 and name != "train":
        several = ", ".join(path.name for path in paths)
        raise ValueError(
            f"data_dir {str(data_dir)!r} has {several}; leave only one of them there, with {content}"
        )
    return paths
