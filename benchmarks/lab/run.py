"""Trials of the tail memory on cached states: the states are computed once and used by many trials.

    python benchmarks/lab/run.py handbook '{"gate": "28"}' '{"gate": "mean", "lr": 0.4}' --folds 0,1,2,3
    python benchmarks/lab/run.py chapters '{"steps": 600}'

Options are those of DEFAULTS. "handbook" trains on the choosing handbook without one wording of each fact and
then asks in that wording (the fold is also the seed). "chapters" trains on 1,600 of the medical recipe's
training records and asks 200 others. Each finished trial writes one line into the results file; a finished
trial is skipped.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)
torch.set_flush_denormal(True)

import cache as states_  # noqa: E402
import rows  # noqa: E402
import texts  # noqa: E402
from gates import fit, space  # noqa: E402

from sparsemem.background.calibration import _Statistics  # noqa: E402
from sparsemem.provenance import environment  # noqa: E402

OUT = Path(__file__).resolve().parent.parent / "results" / "lab.jsonl"
DEFAULTS = {
    "reads": [23, 26, 28], "gate": "28",
    "kinds": False, "start_quantile": 0.98, "within_quantile": 0.98, "prose_quantile": None, "ramp": 1 / 3,
    "reach": None, "start_width": None, "width": 0.1,
    "lr": 0.4, "decay": "linear", "steps": 200, "batch": 8, "top_t": 1024, "stop_loss": None,
    "keep": 0, "elsewhere": 0, "linear": [], "linear_lr": 0.05, "bound": None, "known": 1024, "common": 1000,
}  # fmt: skip


def tail_of(options: dict, taught: states_.States, seed: int) -> rows.Tail:
    """An untrained tail memory whose gates are fitted to the taught states."""
    reads = options["reads"]
    gated = reads if options["gate"] in ("each", "mean", "least", "product") else [int(options["gate"])]
    memories, gates = {}, {}
    for layer in sorted({*reads, *gated}):
        if layer in reads:
            memories[layer] = rows.addressing(
                f"background{seed}", layer, lambda layer=layer: statistics(seed, layer), seed
            )
        if layer in gated:
            around = space_of(seed, layer, options["known"])
            extra = []
            if options["keep"]:
                extra.append(texts.keep(options["keep"]).layer(layer))
            if options["elsewhere"]:
                extra.append(texts.elsewhere(taught, options["elsewhere"], seed).layer(layer))
            gates[layer] = fit(taught.layer(layer), taught.example, taught.start, around, options, extra)
    tables = {layer: rows.Table(torch.zeros(rows.NUM_SLOTS, 576)) for layer in memories}
    linear = {layer: rows.Table(torch.zeros(576, 576)) for layer in options["linear"]}
    return rows.Tail(memories, gates, options["gate"], tables, linear, options["bound"])


def statistics(seed: int, layer: int) -> _Statistics:
    background, _ = texts.general_text(seed)
    seen = _Statistics(576, seed)
    seen.add(background.layer(layer))
    seen.starts.add(background.layer(layer)[background.start])
    seen.answers.add(background.layer(layer)[background.answer & ~background.start])
    return seen


def space_of(seed: int, layer: int, room: int) -> dict[str, torch.Tensor]:
    def make() -> dict[str, torch.Tensor]:
        background, num_chats = texts.general_text(seed)
        prose = background.layer(layer)[background.example >= num_chats]
        return space(statistics(seed, layer), prose, room)

    return states_.kept(f"space{seed}-{layer}", [room], make)


def handbook(options: dict, fold: int) -> tuple[dict, rows.Tail]:
    states, folds = texts.handbook()
    out = folds[states.example] == fold
    taught, asked = states[~out], states[out]
    began = time.perf_counter()
    tail = tail_of(options, taught, fold)
    done = rows.train(tail, taught, options, fold)
    done["seconds"] = time.perf_counter() - began
    good, _, whole = rows.right(tail, asked)
    openness = torch.stack(list(tail.openness(asked).values())).amax(0)
    return {
        **done,
        "recall": mean(rows.right(tail, taught)[2]),
        "heldout": mean(whole),
        "heldout_first": mean(good[asked.start]),
        "heldout_open": mean(openness[asked.start] > 0),
        **kept_answers(tail),
        **read_texts(tail),
        "mentions": mean(rows.changed(tail, texts.mentions(texts.OTHER_FORMS, "mentions-other"))),
    }, tail


def chapters(options: dict, fold: int) -> tuple[dict, rows.Tail]:
    taught, asked, answers = texts.chapters()
    began = time.perf_counter()
    tail = tail_of(options, taught, fold)
    done = rows.train(tail, taught, options, fold)
    done["seconds"] = time.perf_counter() - began
    share = rows.choices_right(tail, asked, answers)
    return {**done, "chapters": share, **kept_answers(tail), **read_texts(tail)}, tail


def kept_answers(tail: rows.Tail) -> dict[str, float]:
    return {"kept": 1 - mean(rows.changed(tail, texts.general()))}


def read_texts(tail: rows.Tail) -> dict[str, float]:
    found = {}
    for part in ("probe", "choose", "wiki"):
        figures = rows.on_text(tail, texts.prose(part))
        found |= {f"{key}_{part}": value for key, value in figures.items() if key != "perplexity"}
    return found


def mean(flags: torch.Tensor) -> float:
    return float(flags.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=("handbook", "chapters"))
    parser.add_argument("trials", nargs="+", type=json.loads)
    parser.add_argument("--folds", default="0,1,2,3")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    given.out.parent.mkdir(exist_ok=True)
    run = {"handbook": handbook, "chapters": chapters}[given.data]
    for changes in given.trials:
        unknown = changes.keys() - DEFAULTS.keys()
        if unknown:
            raise SystemExit(f"unknown options {sorted(unknown)}; allowed are {sorted(DEFAULTS)}")
        options = {**DEFAULTS, **changes}
        for fold in map(int, given.folds.split(",")):
            key = {"data": given.data, "options": options, "fold": fold}
            lines = given.out.read_text().splitlines() if given.out.exists() else []
            if not lines:
                given.out.write_text(json.dumps({"header": environment()}) + "\n")
            if any(key.items() <= json.loads(line).items() for line in lines):
                continue
            line = key | {k: round(v, 6) for k, v in run(options, fold)[0].items()}
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            sys.stderr.write(json.dumps({k: v for k, v in line.items() if k != "options"} | changes) + "\n")


if __name__ == "__main__":
    main()
