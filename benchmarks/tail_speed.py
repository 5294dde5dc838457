"""Cost of training and using a tail memory, compared with LoRA and with the base model.

    OMP_NUM_THREADS=1 python benchmarks/tail_speed.py ADAPTER benchmarks/results/tail_speed.json

ADAPTER is a folder with an adapter that was trained on the demo's handbook. The model is SmolLM2 on one
thread with eager attention. The variants take turns in one process, and medians count, because the machine
may be busy (its load is recorded). A step is a batch of 8 handbook records under `finetune`'s autocast. "kept
logits" computes logits only at positions with loss, as `finetune` does; the other steps are those of a plain
Trainer. Memory is `finetune`'s peak_bytes for NUM_STEPS steps, with calibration, each method in its own
process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from sparsemem.atomic import write_json
from sparsemem.compare.recipes.questions import training_records
from sparsemem.data.general import prose
from sparsemem.data.models import load, load_base
from sparsemem.data.records import collate, encode, opening_ids, question_ids
from sparsemem.optim.rows import RowAdamW
from sparsemem.precision import autocast
from sparsemem.provenance import environment
from sparsemem.training.cached import collate_states, train_states
from sparsemem.training.finetune import finetune
from sparsemem.training.loading import RunData
from sparsemem.training.methods import lora_config, prepare
from sparsemem.training.options import CACHE_BYTES, MAX_GRAD_NORM, TOP_T, Options

BATCH_SIZE, LENGTH, NEW_TOKENS = 8, 64, 32
NUM_RUNS, NUM_STEPS = 7, 20


def in_turn(ways: dict[str, Callable[[int], Any]], num_runs: int = NUM_RUNS) -> dict[str, float]:
    """Median seconds of each function; it is called with the number of the run, and run 0 does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(num_runs + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(run)
            if run:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def base() -> tuple[Any, Any]:
    model, tokenizer = load_base("smollm2")
    model.set_attn_implementation("eager")
    return model, tokenizer


def with_lora(model: Any) -> Any:
    config = lora_config()
    # as in the demo: on a CPU, dropout would take a third of each step
    config.lora_dropout = 0.0
    return get_peft_model(model, config)


def step(model: Any, optimizer: Any, forward: Callable[[int], Any], run: int) -> None:
    with autocast(model):
        loss = forward(run)["loss"]
    loss.backward()
    if optimizer.__class__.__name__ == "AdamW":
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


def measure(adapter: str) -> dict[str, Any]:
    model, tokenizer = load(adapter)
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    model.set_requires_grad("default", True)
    pad = tokenizer.pad_token_id
    examples = encode(training_records(), tokenizer)[: BATCH_SIZE * (NUM_RUNS + 1)]
    with tempfile.TemporaryDirectory() as folder:
        held = train_states(model, examples, pad, CACHE_BYTES, Path(folder))
        assert held is not None
        head, rows = held
        # as `prepare` makes it, with a very small learning rate
        row_adamw = RowAdamW(
            model,
            1e-6,
            betas=(0.9, 0.95),
            moments="table",
            rule="grad",
            top_t=TOP_T,
            max_grad_norm=MAX_GRAD_NORM,
        )
        lora = prepare(with_lora(base()[0]), RunData(tokenizer, []), Options("lora"), Path(folder))

        def several(run: int) -> range:
            return range(BATCH_SIZE * run, BATCH_SIZE * (run + 1))

        def on_states(run: int) -> Any:
            batch = collate_states([rows[index] for index in several(run)])
            return head(batch["states"], batch["shift_labels"])

        def plain(trained: Any, run: int) -> Any:
            return trained(**collate([examples[index] for index in several(run)], pad))

        def kept(trained: Any, run: int) -> Any:
            batch = collate([examples[index] for index in several(run)], pad)
            labels = batch["labels"][:, 1:]
            which = (labels != -100).any(dim=0).nonzero().squeeze(1)
            return trained(**batch, logits_to_keep=which, shift_labels=labels[:, which].contiguous())

        ways = {
            "smf_cached": partial(step, model.train(), row_adamw, on_states),
            "smf_not_cached": partial(step, model, row_adamw, partial(plain, model)),
            "smf_not_cached_kept_logits": partial(step, model, row_adamw, partial(kept, model)),
            "lora": partial(step, lora.model.train(), lora.optimizer, partial(plain, lora.model)),
            "lora_kept_logits": partial(step, lora.model, lora.optimizer, partial(kept, lora.model)),
        }
        steps = in_turn(ways)
        positions = median(len(on_states(run)["logits"]) for run in range(1, NUM_RUNS + 1))
    del lora, ways
    untouched = base()[0]
    forward = forwards(untouched, model.eval(), tokenizer)
    return {
        "step_seconds": steps,
        "step_ratios": {
            "cached_to_lora": steps["smf_cached"] / steps["lora_kept_logits"],
            "cached_to_plain_lora": steps["smf_cached"] / steps["lora"],
            "not_cached_to_lora": steps["smf_not_cached"] / steps["lora"],
            "not_cached_to_lora_kept_logits": steps["smf_not_cached_kept_logits"] / steps["lora_kept_logits"],
        },
        "supervised_positions": positions,
        **forward,
    }


@torch.no_grad()
def forwards(untouched: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Time of forward passes and generation, base model and memory, on training questions and on prose."""
    taught = [token for example in encode(training_records(), tokenizer) for token in example["input_ids"]]
    general = tokenizer(prose()[1], add_special_tokens=False).input_ids
    num_tokens = BATCH_SIZE * LENGTH
    texts = {
        name: torch.tensor(ids[:num_tokens]).view(BATCH_SIZE, LENGTH)
        for name, ids in (("in_scope", taught), ("out_of_scope", general))
    }
    prompts = {
        "in_scope": question_ids(training_records()[0]["messages"][0]["content"], tokenizer),
        "out_of_scope": [*opening_ids(tokenizer), *general[:20]],
    }
    models = {"base": untouched, "memory": model}

    def read(name: str, text: str, fast: bool, _run: int) -> None:
        with autocast(untouched, None if fast else "float32"):
            models[name](input_ids=texts[text])

    def write(name: str, text: str, _run: int) -> None:
        ids = torch.tensor([prompts[text]])
        models[name].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )

    kinds = [(name, text) for text in texts for name in models]
    found = {
        "forward_seconds": in_turn({f"{n}_{t}": partial(read, n, t, False) for n, t in kinds}),
        "forward_autocast_seconds": in_turn({f"{n}_{t}": partial(read, n, t, True) for n, t in kinds}),
        "generate_seconds": in_turn({f"{n}_{t}": partial(write, n, t) for n, t in kinds}, 3),
    }
    ratios = {
        f"{key.removesuffix('_seconds')}_{text}": seconds[f"memory_{text}"] / seconds[f"base_{text}"]
        for key, seconds in found.items()
        for text in texts
    }
    rates = {name: NEW_TOKENS / seconds for name, seconds in found["generate_seconds"].items()}
    return {**found, "tokens_per_second": rates, "read_ratios": ratios}


def peak_bytes(method: str) -> int:
    """Growth of the process's memory while `finetune` trains by a method."""
    model, tokenizer = base()
    if method == "lora":
        model = with_lora(model)
    return finetune(model, training_records(), method, tokenizer=tokenizer, max_steps=NUM_STEPS).peak_bytes


def peak_in_process(method: str) -> int:
    done = subprocess.run(
        [sys.executable, __file__, "--peak", method], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--peak":
        sys.stdout.write(f"{peak_bytes(sys.argv[2])}\n")
    else:
        found = measure(sys.argv[1])
        if "--no-peaks" not in sys.argv:
            peaks = {method: peak_in_process(method) for method in ("smf", "lora")}
            found |= {"peak_bytes": peaks, "peak_ratio": peaks["smf"] / peaks["lora"]}
        settings = {"batch_size": BATCH_SIZE, "runs": NUM_RUNS, "steps_of_peak": NUM_STEPS}
        load_average = dict(zip(("1 min", "5 min", "15 min"), os.getloadavg(), strict=True))
        write_json(Path(sys.argv[2]), {**found, "load": load_average, **settings, **environment()})
