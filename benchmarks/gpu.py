"""Tests, speed and quality on one GPU, within a limit of time. One command, which continues where it stopped.

    python benchmarks/gpu.py gpu.json [--minutes 8] [--parts tests,steps,...] [--data-dir DATA]
    python benchmarks/gpu.py small.json --device cpu --size small     # all of it, small, on any machine

Parts run in order of worth; each writes its figures to the file as soon as it has them, and a part that the
file has is skipped. What did not fit is named at the end. Times are from CUDA events (on a CPU from the
clock), medians after two rounds that do not count; of generation one. Weights are random, bfloat16, made on
the device. Beside each time stands the least that moving its bytes takes, at the rate of a large copy
measured first: a token reads all weights once, a step of LoRA twice, one of the memory once and the head
once more, one of full finetuning twice, and weights, gradients and both moments once more, of which three
are written.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from sparsemem import Background, RowAdamW, memory_layers
from sparsemem.atomic import write_json
from sparsemem.background.background import LayerBackground
from sparsemem.background.question_key import key_layers
from sparsemem.layer.facts import Facts
from sparsemem.layer.scope import KNOWN_WEIGHT, fact_scope
from sparsemem.layer.space import Space
from sparsemem.provenance import environment
from sparsemem.stream.stream import stream_config
from sparsemem.training.cached import TailHead
from sparsemem.training.methods import lora_config, memory_config

PROJECT = Path(__file__).parents[1]
TESTS = ("tests/test_devices.py", "tests/laws/test_laws.py", "tests/adapter/test_tail.py")
SEED, KEY_WIDTH, TOKENS_A_FACT = 0, 48, 3
# 32 tokens take a second or more, mostly the host's
GENERATIONS = 1


def _shape(kind: Any, d: int, inner: int, layers: int, heads: int, kv: int, words: int, tied: bool) -> Any:
    return kind(
        hidden_size=d, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=words, tie_word_embeddings=tied, max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


SHAPES = {
    "SmolLM2-135M": _shape(LlamaConfig, 576, 1536, 30, 9, 3, 49152, True),
    "Qwen2.5-0.5B": _shape(Qwen2Config, 896, 4864, 24, 14, 2, 151936, True),
    "Llama-3.2-1B": _shape(LlamaConfig, 2048, 8192, 16, 32, 8, 128256, True),
    "Qwen2.5-7B": _shape(Qwen2Config, 3584, 18944, 28, 28, 4, 152064, False),
}
SIZES = {
    "full": {"shapes": SHAPES, "batch": 16, "length": 256, "rounds": 5, "facts": (0, 100, 100_000),
             "batches": (1, 32), "prompt": 64, "new": 32, "copy": 2**31},
    "small": {"shapes": {"tiny": _shape(LlamaConfig, 64, 96, 4, 4, 2, 512, True)}, "batch": 4,
              "length": 32, "rounds": 2, "facts": (0, 100, 2000), "batches": (1, 4), "prompt": 16, "new": 4,
              "copy": 2**24},
}  # fmt: skip
# a share of a text's tokens has a loss
SUPERVISED = 4


class Bench:
    """One run: the device, the sizes, and the clock."""

    def __init__(self, device: str, size: str, minutes: float, data: Path | None) -> None:
        self.device, self.size, self.small = torch.device(device), SIZES[size], size == "small"
        self.data, self.end = data, time.monotonic() + 60 * minutes
        self.cuda = self.device.type == "cuda"

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def seconds(self, way: Callable[[], Any], rounds: int | None = None) -> float:
        """Median seconds of a call, after two that do not count."""
        found = []
        for number in range((rounds or self.size["rounds"]) + 2):
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                way()
                end.record()
                end.synchronize()
                taken = begin.elapsed_time(end) / 1000
            else:
                start = time.perf_counter()
                way()
                taken = time.perf_counter() - start
            if number >= 2:
                found.append(taken)
        return median(found)

    def step(self, way: Callable[[], Any], num_bytes: float) -> dict[str, float]:
        """Seconds and peak memory of a step, and the least time that its bytes take."""
        gc.collect()
        before = 0
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = self.seconds(way)
        peak = {"peak_bytes": torch.cuda.max_memory_allocated() - before} if self.cuda else {}
        bound = num_bytes / self.copy_rate()
        return {"seconds": seconds, "bound_seconds": bound, "to_bound": seconds / bound, **peak}

    def copy_rate(self) -> float:
        """Bytes read and written a second by a large copy on the device."""
        if not hasattr(self, "_rate"):
            one = torch.ones(self.size["copy"] // 4, device=self.device)
            other = torch.empty_like(one)
            self._rate = 2 * one.nbytes / self.seconds(lambda: other.copy_(one))
        return self._rate

    def model(self, shape: str) -> Any:
        torch.manual_seed(SEED)
        with torch.device(self.device):
            made = AutoModelForCausalLM.from_config(self.size["shapes"][shape], dtype=torch.bfloat16)
        return made.eval()


def num_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if "sparse_memory_" not in name)


def tests(bench: Bench, *chosen: str) -> dict[str, Any]:
    """Tests, in several processes."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "--tb=short",
        "-n",
        "8",
        *chosen,
    ]
    return run(bench, command)


def run(bench: Bench, command: list[str]) -> dict[str, Any]:
    """Run a command until it ends or the time does; the ends of what it wrote."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, timeout=max(bench.left, 1)
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        code, (out, err) = None, (_text(stopped.stdout), _text(stopped.stderr))
    told = {"command": " ".join(["python", *command[1:]]), "exit_code": code}
    told |= {"seconds": time.monotonic() - start, "output": out[-1500:], "errors": err[-1500:]}
    if code is None:
        raise Unfinished(told)
    return told


class Unfinished(Exception):
    """The time ended within a part; holds what there is."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__("the time ended")
        self.found = found


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def steps(bench: Bench, shape: str) -> dict[str, Any]:
    """A training step of each method."""
    rows, length, words = bench.size["batch"], bench.size["length"], bench.size["shapes"][shape].vocab_size
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1, words, (rows, length), generator=generator).to(bench.device)
    labels = ids.clone()
    labels[:, : length - length // SUPERVISED] = -100
    kept = torch.arange(length - length // SUPERVISED - 1, length - 1, device=bench.device)
    batch = {"input_ids": ids, "logits_to_keep": kept, "shift_labels": labels[:, kept + 1].contiguous()}
    base = bench.model(shape)
    weights, head_bytes = num_bytes(base), base.get_output_embeddings().weight.nbytes
    found: dict[str, Any] = {}

    def whole(model: Any, optimizer: Any) -> Callable[[], None]:
        return _step(optimizer, lambda: model(**batch, labels=labels).loss)

    for write in ("last", "own"):
        model = get_peft_model(base, memory_config(write=write)).train()
        name = "smf" if write == "last" else "own"
        optimizer = row_optimizer(model)
        # a write within the blocks needs a backward pass through those behind it
        moved = weights + (head_bytes if write == "last" else weights)
        _measure(bench, found, name, whole(model, optimizer), moved)
        if write == "last":
            head = TailHead(model, 0)
            width = head.width + sum(memory.d_in for memory in head.layers.values())
            states = torch.randn(labels[:, 1:].ne(-100).sum(), width, device=bench.device)
            targets = labels[:, 1:][labels[:, 1:] != -100]
            cached = _step(optimizer, lambda head=head, s=states, t=targets: head(s, t)["loss"])
            _measure(bench, found, "smf cached", cached, 2 * head_bytes + states.nbytes)
        optimizer.release()
        base = model.unload()
    model = get_peft_model(base, lora_config()).train()
    _measure(bench, found, "lora", whole(model, adamw(model)), 2 * weights)
    base = model.unload().requires_grad_(True).train()
    _measure(bench, found, "full", whole(base, adamw(base)), 2 * weights + 7 * weights)
    return {"methods": found, "weight_bytes": weights, "batch": rows, "length": length}


def _measure(bench: Bench, found: dict[str, Any], name: str, way: Callable[[], Any], moved: float) -> None:
    if bench.left <= 0:
        raise Unfinished({"methods": found})
    try:
        found[name] = bench.step(way, moved)
    except torch.OutOfMemoryError:
        found[name] = {"out_of_memory": True}


def _step(optimizer: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def row_optimizer(model: nn.Module) -> RowAdamW:
    layers = {}
    for name, memory in memory_layers(model).items():
        ones = torch.ones(memory.num_slots, dtype=torch.int64)
        layers[name] = LayerBackground(ones, ones, 10)
    return RowAdamW(model, 1e-3, rule="kl", background=Background(layers), max_grad_norm=1.0)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)


def tokens(bench: Bench, shape: str) -> dict[str, Any]:
    """Tokens a second of greedy generation with a KV cache, by number of facts and batch; the base beside."""
    base = bench.model(shape)
    weights, found = num_bytes(base), {}
    new, words = bench.size["new"], base.config.vocab_size
    model = get_peft_model(base, stream_config(base)).eval()
    (memory,) = memory_layers(model).values()
    kinds: list[int | str] = ["base", *bench.size["facts"]]
    for kind in kinds:
        number = 0 if kind == "base" else int(kind)
        memory.scope = fact_scope(*random_facts(bench, model, number)) if number else None
        for rows in bench.size["batches"]:
            if bench.left <= 0:
                raise Unfinished({"tokens_per_second": found})
            generator = torch.Generator().manual_seed(SEED)
            ids = torch.randint(1, words, (rows, bench.size["prompt"]), generator=generator)
            if number:
                # a name that is taught, so that facts are looked up and compared
                ids[:, 4:6] = memory.scope.facts.names[0, 1:].cpu()
            inputs = {"input_ids": ids.to(bench.device)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

            def way(inputs: Any = inputs, off: bool = kind == "base") -> None:
                asked = base if off else model
                asked.generate(**inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new)

            if kind == "base":
                with model.disable_adapter():
                    seconds = bench.seconds(way, GENERATIONS)
            else:
                seconds = bench.seconds(way, GENERATIONS)
            bound = rows * bench.copy_rate() / weights
            rate = rows * new / seconds
            found[f"{kind}, batch {rows}"] = {
                "tokens_per_second": rate, "bound": bound, "of_bound": rate / bound
            }  # fmt: skip
    return {"tokens_per_second": found, "prompt": bench.size["prompt"], "new": new}


def random_facts(bench: Bench, model: Any, number: int) -> tuple[Space, Facts]:
    """A space and facts of random states, each with a name of two tokens."""
    config, device = model.config, bench.device
    width = config.hidden_size * len(key_layers(model.get_base_model()))
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    unit = nn.functional.normalize
    whole = torch.arange(config.vocab_size, device=device)
    known = unit(normal(64, config.hidden_size), dim=-1)
    space = Space(
        mean=normal(config.hidden_size), whitener=torch.eye(config.hidden_size, device=device), known=known,
        known_weight=torch.tensor([KNOWN_WEIGHT], device=device), key_mean=normal(width),
        key_projection=normal(width, KEY_WIDTH), classes=whole, edges=torch.zeros_like(whole), turn=whole[:0],
    )  # fmt: skip
    ids = torch.arange(1, number + 1, device=device)
    named = torch.randint(1, config.vocab_size, (number, 2), device=device, generator=generator)
    size = number * TOKENS_A_FACT
    facts = Facts(
        fact_ids=ids,
        fact_keys=unit(normal(number, KEY_WIDTH), dim=-1),
        fact_states=unit(normal(number, config.hidden_size), dim=-1),
        fact_least=torch.tensor([0.45, -2.0], device=device).repeat(number, 1),
        fact_openings=torch.full((number, 2), -1, device=device),
        fact_sizes=torch.full((number,), TOKENS_A_FACT, device=device),
        names=torch.cat([ids[:, None], named], 1),
        answers=torch.randint(1, config.vocab_size, (size,), device=device, generator=generator),
        rows=normal(size, config.hidden_size),
    )
    return space, facts


def quality(bench: Bench, recipe: str, *options: str) -> dict[str, Any]:
    """A comparison on SmolLM2, in a folder that a later call continues."""
    return run(bench, [sys.executable, "-m", "sparsemem", *recipe.split(), *options])


def parts_of(bench: Bench, out: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """The parts by name, in order of worth."""
    shapes, folder = list(bench.size["shapes"]), out.with_suffix("")
    mark = "gpu" if bench.cuda else "not slow and not gpu"
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": lambda: tests(bench, "-m", mark, *TESTS),
    }
    for shape in shapes:
        found[f"steps {shape}"] = lambda shape=shape: steps(bench, shape)
        found[f"tokens {shape}"] = lambda shape=shape: tokens(bench, shape)
    if bench.small:
        # its runs would take an hour on a CPU
        found["medical, planned"] = lambda: quality(bench, "compare medical", "--dry-run")
        return found
    found["demo"] = lambda: quality(bench, "demo", "--out", str(folder / "demo"))
    arms = ("--methods", "base,additive-kl,lora,full", "--seeds", "0", "--out", str(folder / "medical"))
    found["medical"] = lambda: quality(bench, "compare medical", *arms)
    if bench.data is not None:
        options = ("--data-dir", str(bench.data), "--methods", "base,smf", "--seeds", "0")
        found["lifelong"] = lambda: quality(
            bench, "compare lifelong", *options, "--out", str(folder / "lifelong")
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="full", choices=SIZES)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", help="comma-separated beginnings of names; default: all")
    parser.add_argument("--data-dir", type=Path, help="folder with zsre.jsonl, for lifelong")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; give --device cpu --size small")
    bench = Bench(options.device, options.size, options.minutes, options.data_dir)
    found = json.loads(options.out.read_text()) if options.out.exists() else {"parts": {}}
    card = torch.cuda.get_device_name() if bench.cuda else "cpu"
    wanted = tuple((options.parts or "").split(","))
    missed = []
    for name, part in parts_of(bench, options.out.resolve()).items():
        if not name.startswith(wanted) or found["parts"].get(name, {}).get("finished"):
            continue
        if bench.left <= 0:
            missed.append(name)
            continue
        start, finished = time.monotonic(), True
        try:
            result = part()
            finished = result.get("exit_code", 0) == 0
        except Unfinished as stopped:
            result, finished = stopped.found, False
            missed.append(name)
        gc.collect()
        told = {"finished": finished, "part_seconds": time.monotonic() - start, **result}
        found["parts"][name] = {**told, "device": card, "seed": SEED}
        found |= {"command": f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}", **environment()}
        found["copy_bytes_per_second"] = bench.copy_rate()
        write_json(options.out, found)
        sys.stdout.write(f"{name}: {summary(result)}\n")
        sys.stdout.flush()
    sys.stdout.write(f"not finished: {', '.join(missed) or 'nothing'}; {bench.left:.0f} s left\n")


def summary(result: dict[str, Any]) -> str:
    """A part in a line or a few."""
    if "output" in result:
        return f"exit {result['exit_code']} in {result['seconds']:.0f} s\n{result['output'][-1500:]}"
    rows = result.get("methods") or result.get("tokens_per_second") or {}
    short = {n: {k: round(float(v), 5) for k, v in row.items()} for n, row in rows.items()}
    return json.dumps(short, indent=1)


if __name__ == "__main__":
    main()
