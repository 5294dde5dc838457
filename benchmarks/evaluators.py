"""What one pass per context saves in multiple choice, against one forward pass per question and option.

    python benchmarks/evaluators.py ../shared/data/medmcqa_dev.jsonl docs/results/evaluators.json

SmolLM2 in float32 reads MedMCQA questions in the paper's form, both ways in turn in one process; the medians'
ratio counts. The naive way computes the logits that it needs and no others, too.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch

from sparsemem.compare import environment
from sparsemem.files import write_json
from sparsemem.items import read_items
from sparsemem.likelihood import log_probs
from sparsemem.models import load_base
from sparsemem.tasks import medmcqa_tokens

NUM_ITEMS, NUM_RUNS = 48, 2


@torch.inference_mode()
def naive(model, contexts, continuations):
    found = []
    for context, several in zip(contexts, continuations, strict=True):
        scores = []
        for one in several:
            ids = torch.tensor([context + one])
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(one) + 1).logits[0, :-1]
            scores.append(logits.log_softmax(-1)[range(len(one)), one])
        found.append(scores)
    return found


def ours(model, contexts, continuations):
    return log_probs(model, contexts, continuations, exact=True)


def measure(data: str) -> dict[str, float | int]:
    model, tokenizer = load_base("smollm2")
    items = read_items("medmcqa", data, limit=NUM_ITEMS)
    contexts, continuations = zip(*(medmcqa_tokens(item, tokenizer) for item in items), strict=True)
    ways = {"naive": naive, "ours": ours}
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
    slow, fast = median(seconds["naive"]), median(seconds["ours"])
    return {
        "items": len(items),
        "context_tokens": sum(map(len, contexts)),
        "continuation_tokens": sum(len(one) for several in continuations for one in several),
        "items_per_second_naive": len(items) / slow,
        "items_per_second": len(items) / fast,
        "ratio": slow / fast,
        "largest_difference": max(gaps),
        "runs": NUM_RUNS,
    }


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), {**measure(sys.argv[1]), **environment()})
