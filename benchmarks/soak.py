"""Break things on purpose and count what is lost: kills, resumes, damaged files, several processes.

    python benchmarks/soak.py docs/results/soak.json --size full     (make soak)
    python benchmarks/soak.py OUT.json --size small                  (make soak SIZE=small: a minute)

Tiny random models, so that a run takes milliseconds and the moments of the kills fall everywhere. What was
done is kept in OUT.json after each part; the same command at the same commit continues what is unfinished.
The table is written as OUT.md.

| part | what is done | what must hold |
| --- | --- | --- |
| save | an adapter is saved over another, killed by SIGKILL | it loads, and is the old or the new one |
| patch | a patch is saved over another, killed | the same |
| background | the same with a background | the same |
| learn | a task is taught and taken back in turn, killed | the folder opens, with the old or the new |
| train | runs with checkpoints are killed twice, then continued | the result of one run, bit for bit |
| mutants | damaged files are loaded | right content or ValueError within 2 s, and nothing else is done |
| processes | two gloo processes train | the rows are those of one process; bytes that a step sends |
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402

import mutants  # noqa: E402
from conftest import CHAT_TEMPLATE, make_tokenizer  # noqa: E402
from killing import killed, killed_while  # noqa: E402
from sparsemem import Background, RowPatch, SparseMemoryConfig, Stream, memory_layers  # noqa: E402
from sparsemem.atomic import read_json, write_atomically, write_json  # noqa: E402
from sparsemem.background.background import LayerBackground  # noqa: E402
from sparsemem.patches.patch import LayerPatch  # noqa: E402
from sparsemem.provenance import environment  # noqa: E402
from sparsemem.stream.folder import verify  # noqa: E402
from sparsemem.training.finetune import finetune  # noqa: E402
from test_hostile import BACKGROUND, make_folder  # noqa: E402
from test_processes import most_bytes, plain, run, several_processes  # noqa: E402
from tiny import SMALL, scope_of, tiny_model  # noqa: E402

logger = logging.getLogger("soak")

# here, so that it is done in the processes that are killed too
torch.set_num_threads(1)
logging.getLogger("sparsemem").setLevel(logging.ERROR)
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore")

# How often each part is done: kills, runs that are killed twice, mutants, and runs of two processes.
SIZES = {
    "full": {"save": 150, "patch": 60, "background": 60, "learn": 130, "train": 50, "mutants": 10_000,
             "processes": 2},
    "small": {"save": 20, "patch": 10, "background": 10, "learn": 20, "train": 8, "mutants": 1100,
              "processes": 0},
}  # fmt: skip
LANDS = ["Velmora", "Karvessa", "Tolgaria", "Dunmarsh", "Quenlia"]
FACTS = [{"prompt": f"Capital of {land}?", "completion": land[::-1]} for land in LANDS * 2]
GENERAL = [f"{n} plain words, the square is {n * n}." for n in range(24)]
METHODS = {
    "smf, cached": ("smf", {"mentions": 0, "lr": 0.3}),
    "smf, not cached": ("smf", {"mentions": 0, "lr": 0.3, "cache_bytes": 0}),
    "lora": ("lora", {"lr": 1e-2}),
    "full": ("full", {"lr": 1e-2}),
}


def taught(value: float, centres: int) -> Any:
    model: Any = get_peft_model(tiny_model(), SparseMemoryConfig(**SMALL))
    for memory in memory_layers(model).values():
        memory.values.data.fill_(value)
        memory.scope = scope_of(torch.eye(16)[:centres], torch.zeros(centres), torch.ones(centres))
    return model


def two_adapters() -> list[Any]:
    return [taught(1.0, 1), taught(2.0, 3)]


def adapter_saves(path: Path) -> Callable[[int], None]:
    models = two_adapters()
    return lambda number: models[number % 2].save_pretrained(path)


def kill_adapter_saves(number: int, rng: random.Random, folder: Path) -> dict[str, int]:
    """An adapter of other rows and another scope is saved over the one that is there, again and again."""
    expected = [_memory(model) for model in two_adapters()]
    path = folder / "adapter"
    save = adapter_saves(path)
    save(0)
    found = {"kills": 0, "unloadable": 0, "mixed": 0, "old or new": 0}
    for _ in range(number):
        killed_while(adapter_saves, path, wait=rng.uniform(0, 0.15))
        found["kills"] += 1
        try:
            now = _memory(PeftModel.from_pretrained(tiny_model(), path))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is counted)
            found["unloadable"] += 1
            logger.error("save: %s", error)
            save(0)
            continue
        found["old or new" if any(_same(now, one) for one in expected) else "mixed"] += 1
    return found


def file_saves(path: Path, kind: str) -> Callable[[int], None]:
    def save(n: int) -> None:
        size = 200 + n % 2 * 2000
        if kind == "patch":
            rows = torch.full((size, 64), float(n))
            layer = LayerPatch(torch.arange(size), rows, rows + 1, "a")
            RowPatch({"l": layer}, "b", {"n": n}).save(path)
        else:
            counts = torch.full((size,), n)
            Background({"l": LayerBackground(counts, counts.clone(), n)}).save(path)

    return save


def kill_file_saves(kind: str) -> Callable[[int, random.Random, Path], dict[str, int]]:
    def part(number: int, rng: random.Random, folder: Path) -> dict[str, int]:
        path = folder / f"{kind}.safetensors"

        save = file_saves(path, kind)
        save(0)
        found = {"kills": 0, "unloadable": 0, "mixed": 0, "old or new": 0}
        for _ in range(number):
            killed_while(file_saves, path, kind, wait=rng.uniform(0, 0.1))
            found["kills"] += 1
            try:
                layer: Any = (RowPatch if kind == "patch" else Background).load(path).layers["l"]
            except Exception as error:  # noqa: BLE001 (whatever it is, it is counted)
                found["unloadable"] += 1
                logger.error("%s: %s", kind, error)
                save(0)
                continue
            if kind == "patch":
                whole = torch.equal(layer.after, layer.before + 1) and len(layer.after.unique()) == 1
            else:
                whole = layer.counts.unique().tolist() == layer.df.unique().tolist() == [layer.num_batches]
            found["old or new" if whole else "mixed"] += 1
        return found

    return part


def opened(path: Path) -> Stream:
    options = {} if path.exists() else {"background": BACKGROUND}
    return Stream(tiny_model(), path, tokenizer=make_tokenizer(CHAT_TEMPLATE), **options)  # type: ignore[arg-type]


def turn(stream: Stream) -> None:
    if "more" in stream.tasks:
        stream.undo("more")
    else:
        stream.teach("more", FACTS[:2])
    stream.save()


def turns(path: Path) -> Callable[[int], None]:
    stream = opened(path)
    return lambda _: turn(stream)


def kill_streams(number: int, rng: random.Random, folder: Path) -> dict[str, int]:
    """A stream holds one task, and another one is taught, saved, taken back and saved, again and again."""
    path = folder / "stream"

    stream = opened(path)
    stream.teach("first", FACTS[2:4])
    stream.save()
    states = {}
    for _ in range(2):
        states[tuple(stream.tasks)] = _memory(stream.model)
        turn(stream)
    found = {"kills": 0, "unloadable": 0, "mixed": 0, "old or new": 0}
    for _ in range(number):
        lines = len(stream.ledger.entries)
        killed_while(turns, path, wait=rng.uniform(0, 0.15))
        found["kills"] += 1
        try:
            # the adapter may be one save behind the ledger; what is opened follows the ledger
            adapter = _memory(PeftModel.from_pretrained(tiny_model(), path))
            stream = opened(path)
            whole = _same(_memory(stream.model), states[tuple(stream.tasks)])
            whole &= any(_same(adapter, state) for state in states.values())
            whole &= len(stream.ledger.entries) >= lines
            stream.save()
            verify(path)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is counted)
            found["unloadable"] += 1
            logger.error("learn: %s", error)
            shutil.rmtree(path)
            stream = opened(path)
            stream.teach("first", FACTS[2:4])
            stream.save()
            continue
        found["old or new" if whole else "mixed"] += 1
    return found


def teach(method: str, folder: Path | None = None, **options: Any) -> Any:
    model: Any = tiny_model()
    if method == "smf":
        model = get_peft_model(model, SparseMemoryConfig(**SMALL))
        options["background"] = GENERAL
    return finetune(
        model, FACTS, method, tokenizer=make_tokenizer(CHAT_TEMPLATE), output_dir=folder, batch_size=2,
        gradient_accumulation_steps=2, max_steps=9, **options,
    )  # fmt: skip


def kill_and_resume_training(number: int, rng: random.Random, folder: Path) -> dict[str, int]:
    """Each run of nine steps, a checkpoint every three, is killed twice at random moments and continued."""
    whole = {name: teach(method, **options) for name, (method, options) in METHODS.items()}
    found = {"kills": 0, "resumes": 0, "cannot continue": 0, "equal to the bit": 0, "different": 0}
    for turn in range(number):
        name = list(METHODS)[turn % len(METHODS)]
        method, options = METHODS[name]
        out = folder / f"run-{turn}"
        for kill in range(2):
            lines = out / "metrics.jsonl"
            least = rng.randrange(1, 9) if kill == 0 else 1
            killed(
                partial(teach, method, out, resume=kill > 0, **options),
                ready=partial(_has_losses, lines, least),
                wait=rng.uniform(0, 0.3),
            )
            found["kills"] += 1
        try:
            done = teach(method, out, resume=True, **options)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is counted)
            found["cannot continue"] += 1
            logger.error("train %s: %s", name, error)
            continue
        found["resumes"] += 1
        same = done.loss == whole[name].loss and _same(
            done.model.state_dict(), whole[name].model.state_dict()
        )
        found["equal to the bit" if same else "different"] += 1
    return found


def _has_losses(log: Path, least: int) -> bool:
    return log.exists() and log.read_text().count('"loss"') >= least


def load_mutants(number: int, rng: random.Random, folder: Path) -> dict[str, int]:
    found = {"mutants": 0, "refused": 0, "right": 0, "same": 0, "failed": 0}
    work = folder / "work"
    work.mkdir()
    made, watched = make_folder(folder / "made"), mutants.Watched(work)
    each = -(-number // len(mutants.KINDS))
    start = rng.randrange(10**6)
    for kind in mutants.KINDS:
        # in portions, so that one failure hides no others
        for first in range(start, start + each, 50):
            seeds = range(first, min(first + 50, start + each))
            found["mutants"] += len(seeds)
            try:
                counts = mutants.try_mutants(made, work, kind, seeds, watched)
            except AssertionError as error:
                found["failed"] += 1
                watched.seen.clear()
                logger.error("mutants: %s", error)
                continue
            for key, value in counts.items():
                found[key] += value
    return found


def two_processes(number: int, rng: random.Random, folder: Path) -> dict[str, int]:
    found = {"runs": 0, "same rows as one process": 0, "different": 0}
    for turn in range(number):
        for method in ("smf", "smf-open"):
            path = folder / f"{method}-{turn}"
            path.mkdir()
            (first, second), _ = several_processes(method, path)
            run(method, 0, str(path / "one"), gradient_accumulation_steps=2)
            one = torch.load(path / "one.0")["state"]
            same = all(
                torch.equal(first["state"][n], second["state"][n])
                and torch.allclose(first["state"][n].float(), one[n].float(), rtol=1e-3, atol=1e-4)
                for n in one
            )
            found["runs"] += 1
            found["same rows as one process" if same else "different"] += 1
    for rule in ("kl", "grad"):
        path = folder / rule
        path.mkdir()
        (first, _), _ = several_processes(rule, path, call=plain)
        found[f"bytes per step, rule {rule}"] = max(first["bytes"])
        found[f"allowed bytes, rule {rule}"] = most_bytes(rule, len(first["state"]))
    return found


PARTS: dict[str, Callable[[int, random.Random, Path], dict[str, int]]] = {
    "save": kill_adapter_saves,
    "patch": kill_file_saves("patch"),
    "background": kill_file_saves("background"),
    "learn": kill_streams,
    "train": kill_and_resume_training,
    "mutants": load_mutants,
    "processes": two_processes,
}
# What must be 0 in every part.
LOSSES = ("unloadable", "mixed", "cannot continue", "different", "failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    chosen = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    done = read_json(chosen.out) if chosen.out.exists() else {}
    wanted = [name for name in PARTS if SIZES[chosen.size][name]]
    about = {"size": chosen.size, "commit": environment()["commit"]}
    if any(done.get(key) != value for key, value in about.items()) or set(wanted) <= done["parts"].keys():
        done = {"size": chosen.size, "parts": {}, "seconds": {}}
    for name, part in PARTS.items():
        number = SIZES[chosen.size][name]
        if name in done["parts"] or not number:
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            done["parts"][name] = part(number, random.Random(f"soak {name}"), Path(folder))
        done["seconds"][name] = round(time.monotonic() - begun, 1)
        write_json(chosen.out, {**done, **environment()})
        logger.info("%s: %s (%s s)", name, done["parts"][name], done["seconds"][name])
    table = page(read_json(chosen.out))
    write_atomically(chosen.out.with_suffix(".md"), lambda path: path.write_text(table))
    sys.stdout.write(table)
    return int(any(found.get(key, 0) for found in done["parts"].values() for key in LOSSES))


def page(done: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = [
        f"| {name} | {', '.join(f'{key} {value:,}' for key, value in found.items())} | "
        f"{sum(found.get(key, 0) for key in LOSSES)} | {done['seconds'][name]:,} |"
        for name, found in done["parts"].items()
    ]
    command = f"python benchmarks/soak.py docs/results/soak.json --size {done['size']}"
    about = f"What each part does is said at the top of that file. Machine: {done['machine']}; "
    about += f"commit {done['commit']}; seed `soak NAME` for each part. `lost` must be 0."
    head = ["# Kills, resumes and damaged files", "", f"Made by `{command}`.", about, ""]
    head += ["| part | counts | lost | seconds |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *rows]) + "\n"


def _memory(model: Any) -> dict[str, torch.Tensor]:
    layers = memory_layers(model).items()
    return {f"{name}.{key}": t.clone() for name, one in layers for key, t in one.state_dict().items()}


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


if __name__ == "__main__":
    sys.exit(main())
