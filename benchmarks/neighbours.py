"""Contexts and neighbours of 20 facts of the demo's handbook, taught by `finetune`, by LoRA or by `Stream`.

    python benchmarks/neighbours.py docs/results/neighbours/smf.json smf

Every second fact is taught in its three training wordings; 20 of these 60 questions are asked in each context
and 20 questions of each kind of neighbour, greedily, SmolLM2, the faster precision.
"""

import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsemem.atomic import write_json
from sparsemem.compare.recipes.demo import SETTINGS, teach
from sparsemem.compare.recipes.questions import handbook
from sparsemem.data.models import load_base
from sparsemem.evaluation.probes import contexts, neighbours, recall
from sparsemem.precision import precision_of
from sparsemem.provenance import environment
from sparsemem.stream.stream import Stream

NUM_ASKED, NUM_TOKENS, SEED = 20, 16, 0


def taught(method: str, folder: str) -> tuple[Any, Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """The taught model, its tokenizer, the records, and the questions in the wording that was not taught."""
    facts = handbook()[::2]
    records = [
        {"prompt": question, "completion": fact["answer"]} for fact in facts for question in fact["train"]
    ]
    items = [{"question": fact["heldout"], "answer": fact["answer"]} for fact in facts]
    model, tokenizer = load_base(SETTINGS.model)
    if method != "stream":
        return teach(SETTINGS, method, SEED, model, tokenizer, records)[0], tokenizer, records, items
    stream = Stream(model, Path(folder) / "stream", tokenizer=tokenizer, seed=SEED)
    for number, fact in enumerate(facts):
        stream.teach(fact["subject"], records[3 * number : 3 * number + 3])
    return stream.model, tokenizer, records, items


def measure(method: str) -> dict[str, Any]:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, records, items = taught(method, folder)
        seconds = time.perf_counter() - began
        asked = [{"question": one["prompt"], "answer": one["completion"]} for one in records]
        found: dict[str, Any] = {"method": method, "seed": SEED, "facts": len(items), "seconds": seconds}
        found["recall"] = recall(model, tokenizer, asked, max_new_tokens=NUM_TOKENS).share
        found["reworded"] = recall(model, tokenizer, items, max_new_tokens=NUM_TOKENS).share
        for ask in (contexts, neighbours):
            probe = ask(model, tokenizer, records, limit=NUM_ASKED, max_new_tokens=NUM_TOKENS)
            found[ask.__name__] = {
                "all": asdict(probe.all),
                "parts": {name: asdict(part) for name, part in probe.parts.items()},
                "answers": [
                    {"kind": one.kind, "asked": one.turns[-1]["content"], "base": base, "answer": text}
                    for one, text, base in zip(probe.asked, probe.texts, probe.base, strict=True)
                ],
            }
        return {**found, "precision": precision_of(model)}


if __name__ == "__main__":
    command = f"python benchmarks/neighbours.py {' '.join(sys.argv[1:])}"
    write_json(Path(sys.argv[1]), {**measure(sys.argv[2]), "command": command, **environment()})
