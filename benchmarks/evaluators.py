"""Multiple choice with one pass per context, compared with one forward pass per question and option.

    python benchmarks/evaluators.py ../shared/data/medmcqa_dev.jsonl docs/results/evaluators.json

SmolLM2 in float32 reads MedMCQA questions in the paper's form. The variants take turns in one process; the
result is the ratio of their median times. "naive" is the usual call of the model; "lean" is the same without
the logits that are not used.
"""

import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sparsemem.atomic import write_json
from sparsemem.data.models import load_base
from sparsemem.evaluation.items import read_items
from sparsemem.evaluation.likelihood import log_probs
from sparsemem.evaluation.tasks import medmcqa_tokens
from sparsemem.provenance import environment

NUM_ITEMS, NUM_RUNS = 48, 3


@torch.inference_mode()
def naive(model, contexts, continuations, *, lean=False):
    found = []
    for context, several in zip(contexts, continuations, strict=True):
        scores = []
        for one in several:
            kept = {"logits_to_keep": len(one) + 1} if lean else {}
            logits = model(input_ids=torch.tensor([context + one]), **kept).logits[0, -len(one) - 1 : -1]
            scores.append(logits.log_softmax(-1)[range(len(one)), one])
        found.append(scores)
    return found


def ours(model, contexts, continuations):
    return log_probs(model, contexts, continuations, precision="float32")


def measure(data: str) -> dict[str, Any]:
    model, tokenizer = load_base("smollm2")
    items = read_items("medmcqa", data, limit=NUM_ITEMS)
    contexts, continuations = zip(*(medmcqa_tokens(item, tokenizer) for item in items), strict=True)
    ways = {"naive": naive, "lean": partial(naive, lean=True), "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for run in range(NUM_RUNS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way(model, contexts, continuations)
            if run:
                seconds[name].append(time.perf_counter() - start)
    gaps = [
        float((a - b).abs().max())
        for pair in zip(found["naive"], found["ours"], strict=True)
        for a, b in zip(*pair, strict=True)
    ]
    rates = {name: len(items) / median(times) for name, times in seconds.items()}
    return {
        "items": len(items),
        "context_tokens": sum(map(len, contexts)),
        "continuation_tokens": sum(len(one) for several in continuations for one in several),
        "items_per_second": rates,
        "ratio": rates["ours"] / rates["naive"],
        "ratio_to_lean": rates["ours"] / rates["lean"],
        "largest_difference": max(gaps),
        "runs": NUM_RUNS,
    }


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), {**measure(sys.argv[1]), **environment()})
