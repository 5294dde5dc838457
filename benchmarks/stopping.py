"""When "smf" has learnt: recall along one run on the choosing handbook, and with fewer or shorter rows.

    python benchmarks/stopping.py FOLD [one] >> docs/results/stopping.jsonl

Teaches the first 20 facts of `benchmarks/choosing` in three of their four wordings (`one`: in the first
alone), and asks them as taught and in wording FOLD, after some steps of a run of 200.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sparsemem import finetune, memory_layers
from sparsemem.data.models import load_base
from sparsemem.evaluation.probes import recall

AT = (8, 16, 24, 32, 40, 56, 72, 96, 128, 160, 200)
SHARES = (0.5, 0.25, 0.1)


HERE = Path(__file__).parent / "choosing"


def questions(fold: int, one: bool) -> tuple[list[dict], list[dict]]:
    lines = (HERE / "handbook.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [
        [{"question": asked, "answer": fact["answer"]} for asked in [*fact["train"], fact["heldout"]]]
        for fact in map(json.loads, lines[:20])
    ]
    taught = [item for items in facts for i, item in enumerate(items) if (i == 0 if one else i != fold)]
    return taught, [items[fold] for items in facts]


class Shots(TrainerCallback):
    """Copies of the value rows after the steps in AT."""

    def __init__(self) -> None:
        self.rows: dict[int, list[torch.Tensor]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in AT:
            layers = memory_layers(kwargs["model"]).values()
            self.rows[state.global_step] = [memory.values.detach().clone() for memory in layers]


def largest(rows: torch.Tensor, share: float) -> torch.Tensor:
    """The rows that are longest; the others are zero."""
    norms = rows.norm(dim=1)
    kept = norms.topk(int((norms > 0).sum() * share)).indices
    return torch.zeros_like(rows).index_copy_(0, kept, rows[kept])


def main(fold: int, one: bool) -> None:
    taught, held = questions(fold, one)
    model, tokenizer = load_base("smollm2")
    general = [json.loads(line) for line in (HERE / "general.jsonl").read_text("utf-8").splitlines()]
    known = recall(model, tokenizer, general).correct
    records = [{"prompt": item["question"], "completion": item["answer"]} for item in taught]
    shots = Shots()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"tokenizer": tokenizer, "seed": fold, "callbacks": [shots]}
        done = finetune(model, records, max_steps=200, output_dir=folder, **options)
        log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    epoch = -(-len(records) // 8)

    def show(name: str, tables: list[torch.Tensor], **more: Any) -> None:
        for memory, rows in zip(memory_layers(done.model).values(), tables, strict=True):
            memory.values.data.copy_(rows)
        after = recall(done.model, tokenizer, general).correct
        line = {"name": name, "fold": fold, "one": one, **more}
        line |= {"taught": recall(done.model, tokenizer, taught).share}
        line |= {"held": recall(done.model, tokenizer, held).share}
        line |= {"kept": sum(a for a, b in zip(after, known, strict=True) if b) / sum(known)}
        line |= {"rows": [int(rows.any(1).sum()) for rows in tables]}
        sys.stdout.write(f"{json.dumps(line)}\n")

    for step, tables in shots.rows.items():
        show(str(step), tables, loss=sum(losses[max(0, step - epoch) : step]) / min(epoch, step))
    show("200 bf16", [rows.bfloat16().float() for rows in tables])
    for share in SHARES:
        show(f"200 top {share}", [largest(rows, share) for rows in tables])


if __name__ == "__main__":
    main(int(sys.argv[1]), len(sys.argv) > 2)
