"""Tokens per second of ten requests at once: the server's running batch, and transformers' generate.

    python benchmarks/serving.py [MODEL] [--out FILE]

Each round does the same ten prompts three ways, in turn: through the engine of `sparsemem serve`, each
request with memories of its own; by `generate` in one batch; and by `generate` one after the other, as a
server without batching would. Rows are random, so that reads cost what they cost.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
from peft import get_peft_model

from sparsemem import SparseMemoryConfig, load_base, memory_layers
from sparsemem.adapter.layers import BASE_ROW
from sparsemem.data.generation import pad_left
from sparsemem.data.records import question_ids
from sparsemem.precision import autocast, precision_of
from sparsemem.provenance import environment
from sparsemem.serving.decoding import Row, Sampling
from sparsemem.serving.engine import AnswerText, Engine, Request
from sparsemem.serving.memories import add_memory

THINGS = ["a harbour", "a lamp", "a verb", "rain", "iron", "a fox", "tea", "music", "a map", "snow"]
QUESTIONS = [f"What is {one}?" for one in THINGS]
NAMES: list[tuple[str, ...]] = [(), ("a",), ("b",), ("a", "b"), ("a",)] * 2
NUM_TOKENS, ROUNDS = 32, 3


def by_engine(model, tokenizer, prompts) -> float:
    engine = Engine(model, tokenizer)
    # every answer has the same length
    engine._ends = set()
    done = threading.Semaphore(0)
    requests = [
        Request(
            Row(list(prompt), names, Sampling(temperature=0)),
            NUM_TOKENS,
            AnswerText(tokenizer),
            lambda piece: done.release() if piece.finish else None,
        )
        for prompt, names in zip(prompts, NAMES, strict=True)
    ]
    began = time.perf_counter()
    engine.submit(*requests)
    engine.start()
    for _ in requests:
        done.acquire()
    seconds = time.perf_counter() - began
    engine.stop()
    return seconds


@torch.inference_mode()
def by_generate(model, prompts, at_once: int) -> float:
    began = time.perf_counter()
    for start in range(0, len(prompts), at_once):
        ids, mask = pad_left(prompts[start : start + at_once], model)
        names = [one or BASE_ROW for one in NAMES[start : start + at_once]]
        with autocast(model):
            model.generate(
                input_ids=ids, attention_mask=mask, adapter_names=names, do_sample=False,
                max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, pad_token_id=0,
            )  # fmt: skip
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    asked = parser.parse_args()
    base, tokenizer = load_base(asked.model)
    torch.manual_seed(0)
    model = get_peft_model(base, SparseMemoryConfig(task_type="CAUSAL_LM"))
    for name in ("a", "b"):
        add_memory(model, name, like="default")
        for memory in memory_layers(model).values():
            memory.values.data.normal_(std=0.01)
    model.requires_grad_(False).eval()
    prompts = [question_ids(question, tokenizer) for question in QUESTIONS]
    seconds: dict[str, list[float]] = {"engine": [], "generate, one batch": [], "generate, one by one": []}
    for _ in range(ROUNDS):
        seconds["engine"].append(by_engine(model, tokenizer, prompts))
        seconds["generate, one batch"].append(by_generate(model, prompts, len(prompts)))
        seconds["generate, one by one"].append(by_generate(model, prompts, 1))
    total = len(prompts) * NUM_TOKENS
    result = {
        "command": f"python benchmarks/serving.py {asked.model}",
        "requests": len(prompts),
        "tokens": total,
        "precision": precision_of(model),
        "tokens_per_second": {
            name: round(total / statistics.median(held), 1) for name, held in seconds.items()
        },
        "engine_over": {
            name: round(statistics.median(b / a for a, b in zip(seconds["engine"], held, strict=True)), 2)
            for name, held in seconds.items()
            if name != "engine"
        },
        "seconds": {name: [round(one, 3) for one in held] for name, held in seconds.items()},
        **environment(),
    }
    asked.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{result['tokens_per_second']} {result['engine_over']}\n")


if __name__ == "__main__":
    main()
