"""Cost of a sparse memory: layer, optimizer, whole steps and generation, against other methods.

    make bench
    OMP_NUM_THREADS=1 python benchmarks/speed.py docs/results/speed.json [--rows step,layer] [--against FILE]

Each row is a group of variants that take turns in one process. Its figures are median seconds of CPU time of
the whole process, so that other work on the machine distorts them little, and ratios of these medians. A row
that the file already has is skipped; `--rows` measures the named rows again. `--against` also prints the
ratio of every median to that in an older file. The model has the shape of SmolLM2-135M and random weights;
the memory has the shape of issue 23 (`SHAPE`). Rule "kl", no scope: the gate is open everywhere.

`product-key-memory` is compared if it can be imported; it is not installed by `make setup`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import variants
from speed_report import compare, table

from sparsemem.atomic import write_json
from sparsemem.layer.memory import ProductKeyMemory
from sparsemem.layer.values import ReadLog
from sparsemem.provenance import environment

BATCH, LENGTH, NEW_TOKENS = 16, 64, 16
TOKENS = BATCH * LENGTH
# slots of a table: 4,096 to 1,048,576
GROWTH = (64, 128, 256, 512, 1024)
NARROW = 192

Ways = dict[str, Callable[[], Any]]


def in_turn(ways: Ways, num_runs: int) -> dict[str, float]:
    """Median CPU seconds of each function; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(num_runs + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if run:
                seconds[name].append(time.process_time() - start)
    return {name: median(times) for name, times in seconds.items()}


def layer() -> dict[str, Any]:
    """One layer, 1,024 tokens: forward; forward and backward, without and with a gradient for its input."""
    memory = ProductKeyMemory(variants.WIDTH, variants.WIDTH, **variants.SHAPE, init_weights=False)
    memory.requires_grad_(False).values.requires_grad_(True)
    memory.log = ReadLog()
    other, mlp, x = variants.other_layer(), variants.mlp(), torch.randn(BATCH, LENGTH, variants.WIDTH)
    base, grad = torch.zeros_like(x), torch.randn_like(x)

    def both(x: torch.Tensor) -> None:
        memory.log = ReadLog()
        memory(x, base).backward(grad)

    ways: Ways = {
        "forward": torch.no_grad()(lambda: memory(x, base)),
        "forward_backward": lambda: both(x),
        "forward_backward_input": lambda: both(x.clone().requires_grad_()),
        "mlp_forward": torch.no_grad()(lambda: mlp(x)),
    }
    if other is not None:
        ways["product_key_memory_forward"] = torch.no_grad()(lambda: other(x))
        ways["product_key_memory_forward_backward"] = lambda: other(x).backward(grad)
    seconds = in_turn(ways, 9)
    bound = variants.bound(memory, TOKENS)
    pairs = {"forward_to_mlp": ("forward", "mlp_forward")}
    if other is not None:
        pairs["forward_to_product_key_memory"] = ("forward", "product_key_memory_forward")
        pairs["forward_backward_to_product_key_memory"] = (
            "forward_backward_input",
            "product_key_memory_forward_backward",
        )
    ratios = {"forward_to_bound": seconds["forward"] / bound["seconds"]}
    return {"seconds": seconds, "bound": bound, "ratios": ratios | _ratios(seconds, pairs)}


def step() -> dict[str, Any]:
    """Whole training steps; logits only where a token has a label (a quarter), as `finetune` does."""
    with tempfile.TemporaryDirectory() as folder:
        ways: Ways = {}
        for name in ("base_forward", "own", "last", "last_cached", "lora", "full", "dense_mask"):
            ways[name] = variants.STEPS[name](BATCH, LENGTH, Path(folder))
        seconds = in_turn(ways, 3)
    pairs = {f"{name}_to_lora": (name, "lora") for name in ("own", "last", "last_cached", "full")}
    return {
        "seconds": seconds,
        "ratios": _ratios(seconds, {**pairs, "own_to_dense_mask": ("own", "dense_mask")}),
    }


def dense_mask() -> dict[str, Any]:
    """One layer's forward, backward and optimizer step at 262,144 slots, against the dense-mask twin."""
    ways = {name: variants.layer_step(name, 512, TOKENS, variants.WIDTH) for name in ("own", "dense_mask")}
    seconds = in_turn(ways, 3)
    return {"seconds": seconds, "ratios": _ratios(seconds, {"own_to_dense_mask": ("own", "dense_mask")})}


def optimizer() -> dict[str, Any]:
    """The row optimizer's step alone, against dense AdamW on the table, by number of slots."""
    seconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for num_keys, d in ((128, NARROW), (1024, NARROW), (1024, variants.WIDTH)):
        ways, reread = variants.optimizers(num_keys, TOKENS, d)
        slots = f"{num_keys**2}_d{d}"
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(4):
            for name, way in ways.items():
                reread()
                start = time.process_time()
                way()
                times[name].append(time.process_time() - start)
        seconds |= {f"{name}_{slots}": median(several[1:]) for name, several in times.items()}
        ratios[f"rows_to_dense_{slots}"] = seconds[f"rows_{slots}"] / seconds[f"dense_{slots}"]
    return {"seconds": seconds, "ratios": ratios, "top_t": variants.TOP_T}


def growth() -> dict[str, Any]:
    """One layer's forward, backward and optimizer step, and a model's whole step, by number of slots."""
    ways = {str(n**2): variants.layer_step("own", n, TOKENS, NARROW) for n in GROWTH}
    seconds = in_turn(ways, 5)
    ways = {f"whole_step_{n**2}": variants.own_step(BATCH, LENGTH, n) for n in (GROWTH[0], GROWTH[-1])}
    seconds |= in_turn(ways, 5)
    first, last = GROWTH[0] ** 2, GROWTH[-1] ** 2
    pairs = {f"{kind}{last}_to_{first}": (f"{kind}{last}", f"{kind}{first}") for kind in ("", "whole_step_")}
    return {"seconds": seconds, "ratios": _ratios(seconds, pairs), "d": NARROW}


def calibration() -> dict[str, Any]:
    """Calibration on 16 batches of 16 x 64 tokens, against the base's forward passes over them."""
    seconds = in_turn(variants.calibrations(16, BATCH, LENGTH), 1)
    return {
        "seconds": seconds,
        "ratios": _ratios(seconds, {"to_base_forward": ("calibrate", "base_forward")}),
    }


def peak_memory() -> dict[str, Any]:
    """Largest resident memory of a process of its own that makes two steps; bytes of a table in memory."""
    gigabytes = {}
    for name in variants.STEPS:
        done = subprocess.run([sys.executable, __file__, "--peak", name], check=True, stdout=subprocess.PIPE)
        gigabytes[name] = int(done.stdout) / 2**30
    ratios = {f"{name}_to_lora": gigabytes[name] / gigabytes["lora"] for name in gigabytes if name != "lora"}
    big = variants.big_table(8, 896)
    ratios["resident_to_written_rows_1048576_d896"] = big["resident"] / big["written"]
    return {"seconds": {}, "ratios": ratios, "gigabytes": gigabytes, "big_table_bytes": big}


def peak(name: str) -> int:
    """Bytes of the largest resident memory of this process after two steps."""
    with tempfile.TemporaryDirectory() as folder:
        step = variants.STEPS[name](BATCH, LENGTH, Path(folder))
        for _ in range(2):
            step()
    # not ru_maxrss, which starts at the size of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def reading() -> dict[str, Any]:
    """Forward passes and greedy generation with a memory whose rows are not zero, against the base."""
    models = {"base": variants.base(), "own": variants.written("own"), "last": variants.written("last")}
    ids = torch.randint(0, variants.VOCABULARY, (BATCH, LENGTH))
    seconds, ratios, speed = {}, {}, {}
    ways = {name: variants.reader(model, ids) for name, model in models.items()}
    seconds |= {f"forward_{name}": s for name, s in in_turn(ways, 3).items()}
    for rows in (1, 16):
        ways = {name: variants.writer(model, ids[:rows, :16], NEW_TOKENS) for name, model in models.items()}
        found = in_turn(ways, 3)
        seconds |= {f"generate_{rows}_{name}": s for name, s in found.items()}
        speed |= {f"tokens_per_second_{rows}_{name}": rows * NEW_TOKENS / s for name, s in found.items()}
    for name in ("own", "last"):
        ratios[f"forward_{name}_to_base"] = seconds[f"forward_{name}"] / seconds["forward_base"]
        for rows in (1, 16):
            pair = (seconds[f"generate_{rows}_base"], seconds[f"generate_{rows}_{name}"])
            ratios[f"tokens_per_second_{rows}_{name}_to_base"] = pair[0] / pair[1]
    return {"seconds": seconds, "ratios": ratios, "speed": speed}


def _ratios(seconds: dict[str, float], pairs: dict[str, tuple[str, str]]) -> dict[str, float]:
    return {name: seconds[one] / seconds[other] for name, (one, other) in pairs.items()}


ROWS = {
    one.__name__: one
    for one in (layer, step, dense_mask, optimizer, growth, reading, calibration, peak_memory)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--peak", choices=variants.STEPS, help="print the peak memory of this step alone")
    parser.add_argument("--rows", help=f"comma-separated, measured again: {','.join(ROWS)}")
    parser.add_argument("--against", type=Path, help="an older file to compare with")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.peak:
        sys.stdout.write(str(peak(options.peak)))
        return
    if options.out is None:
        parser.error("out: give the file to write")
    unknown = [name for name in (options.rows or "").split(",") if name and name not in ROWS]
    if unknown:
        parser.error(f"--rows {unknown[0]}: unknown; allowed are {', '.join(ROWS)}")
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    chosen = options.rows.split(",") if options.rows else [name for name in ROWS if name not in found]
    for name in chosen:
        torch.manual_seed(0)
        row = ROWS[name]()
        found[name] = {**row, "load": os.getloadavg()[0], **environment()}
        write_json(options.out, found)
        sys.stdout.write(f"{name} {json.dumps(row['ratios'])}\n")
        sys.stdout.flush()
    options.out.with_suffix(".md").write_text(
        table(found, {name: row.__doc__ or "" for name, row in ROWS.items()})
    )
    if options.against is not None:
        sys.stdout.write(compare(found, json.loads(options.against.read_text())))


if __name__ == "__main__":
    main()
