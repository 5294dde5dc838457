"""Try settings of sparse memory on questions that the demo does not ask (`benchmarks/choosing`).

    python benchmarks/choose.py '{"top_k": 32}' '{"layers": [28]}' --folds 0,1

Each trial trains on the choosing handbook without one of its four wordings, and then asks the questions in
that wording. `kept` is the share of known general questions that are still answered correctly. Options are
those of the demo's `Memory` and, from `Teaching`, "lr" and "stop_loss". Each fold writes one line into
docs/results/choosing.jsonl; a finished fold is skipped. The fold is also the seed.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from sparsemem.compare.recipes import questions
from sparsemem.compare.recipes.demo import DemoSettings, teach
from sparsemem.data.models import load_base
from sparsemem.evaluation.probes import recall
from sparsemem.provenance import environment

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "results" / "choosing.jsonl"
NUM_WORDINGS = 4


def handbook(fold: int) -> tuple[list[dict], list[dict]]:
    """The facts as questions and answers: the training questions, and those in the held-out wording."""
    lines = (HERE / "choosing" / "handbook.jsonl").read_text(encoding="utf-8").splitlines()
    wordings = [
        [{"question": asked, "answer": fact["answer"]} for asked in [*fact["train"], fact["heldout"]]]
        for fact in map(json.loads, lines)
    ]
    taught = [item for items in wordings for i, item in enumerate(items) if i != fold]
    return taught, [items[fold] for items in wordings]


def general() -> list[dict]:
    """General questions, and the capitals of the countries that the demo does not ask for."""
    lines = (HERE / "choosing" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    return [*map(json.loads, lines), *questions.capital_items()[::2]]


def trial(options: dict, fold: int) -> dict:
    settings = DemoSettings()
    teaching = {"lr": {**settings.teaching.lr, "smf": options.get("lr", settings.teaching.lr["smf"])}}
    if "stop_loss" in options:
        teaching["stop_loss"] = options["stop_loss"]
    memory = {key: value for key, value in options.items() if key not in ("lr", "stop_loss")}
    settings = replace(
        settings, teaching=replace(settings.teaching, **teaching), memory=replace(settings.memory, **memory)
    )
    model, tokenizer = load_base(settings.model)
    taught, heldout = handbook(fold)
    before = recall(model, tokenizer, general()).correct
    records = [{"prompt": item["question"], "completion": item["answer"]} for item in taught]
    model, costs = teach(settings, "smf", fold, model, tokenizer, records)
    after = recall(model, tokenizer, general()).correct
    return {
        "recall": recall(model, tokenizer, taught).share,
        "heldout": recall(model, tokenizer, heldout).share,
        "kept": sum(a for a, b in zip(after, before, strict=True) if b) / sum(before),
        "steps": costs["steps"],
        "seconds": costs["seconds"],
        "memory": asdict(settings.memory),
        "lr": settings.teaching.lr["smf"],
        "stop_loss": settings.teaching.stop_loss,
        **environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trials", nargs="+", type=json.loads)
    parser.add_argument("--folds", default="0,1,2,3")
    given = parser.parse_args()
    done = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
    for options in given.trials:
        for fold in map(int, given.folds.split(",")):
            if any((one["options"], one["fold"]) == (options, fold) for one in done):
                continue
            line = {"options": options, "fold": fold, **trial(options, fold)}
            with OUT.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
