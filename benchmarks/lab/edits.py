"""Rows of each task's own on cached states: which thresholds tell rephrased questions from all others.

    python benchmarks/lab/edits.py 1000 '[{"taught": 300}, {"taught": 1000, "weight": 0, "start": 0.72}]'

The first number: of zsRE edits whose states are cached. Options are those of DEFAULTS. A centre a supervised
position, in whitened space of layer 28; the nearest open centre's label counts as the answer's next token
(a fitted row makes it so). One line per trial goes into the results file; a finished trial is skipped.
Figures: share of edits whose every position is open and right, in the taught wording (reliability) and in the
other (generality), by teacher forcing; share of `loc` questions with the base's own ten-token answer at which
nothing opens (locality); known answer starts of the background, and its prose tokens, that open; questions
of edits that were not taught that open (untaught).
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
torch.set_flush_denormal(True)

import cache  # noqa: E402

cache.LAYERS = (12, 16, 20, 23, 26, 28)

from sparsemem.background.fitting import whitening  # noqa: E402
from sparsemem.data.general import general_background  # noqa: E402
from sparsemem.data.generation import complete  # noqa: E402
from sparsemem.data.records import prompt_ids  # noqa: E402
from sparsemem.provenance import environment  # noqa: E402

OUT = Path(__file__).resolve().parent.parent / "results" / "edits.jsonl"
DEFAULTS = {"taught": 1000, "weight": 0.15, "start": 0.646, "within": 0.764, "known": 512}


def answers_elsewhere(rows: list[dict]) -> list[str]:
    model, tokenizer = cache.base()
    prompts = [prompt_ids(row["loc"], tokenizer) for row in rows]
    return complete(model, tokenizer, prompts, max_new_tokens=10, batch_size=40)


def states_of(questions: list[str], answers: list[str]) -> cache.States:
    pairs = zip(questions, answers, strict=True)
    return cache.states_of_records("e", [{"prompt": q, "completion": a or "."} for q, a in pairs])


class Lab:
    """The cached states, whitened."""

    def __init__(self, number: int) -> None:
        path = Path(os.environ["SPARSEMEM_SHARED_DATA"]) / "zsre.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:number]
        self.taught = states_of([row["src"] for row in rows], [row["alt"] for row in rows])
        self.reworded = states_of([row["rephrase"] for row in rows], [row["alt"] for row in rows])
        local = cache.kept("locans", [number], lambda: answers_elsewhere(rows))
        self.local = states_of([row["loc"] for row in rows], local)
        background = cache.states_of_records("bg", general_background(), everywhere=True)
        x = background.layer(28)
        self.mean, self.whitener = x.double().mean(0).float(), whitening(torch.cov(x.double().T))
        self.starts = self.white(background[background.start])
        self.within = self.white(background[background.answer & ~background.start])
        self.prose = self.white(background[~background.answer])
        self.number = number

    def white(self, states: cache.States) -> torch.Tensor:
        return F.normalize((states.layer(28) - self.mean) @ self.whitener.T, dim=-1)


def trial(lab: Lab, options: dict) -> dict[str, float]:
    known = torch.cat([lab.starts[: options["known"]], lab.within[: options["known"]]])
    own = lab.taught.example < options["taught"]
    centres, label = lab.white(lab.taught[own]), lab.taught.label[own]
    least = torch.where(lab.taught.start[own], options["start"], options["within"])

    def nearest(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score = z @ centres.T - options["weight"] * (z @ known.T).amax(1, keepdim=True).clamp_min(0)
        best, place = score.masked_fill(score <= least, -torch.inf).max(1)
        return best.isfinite(), label[place]

    def whole(states: cache.States) -> float:
        is_open, answer = nearest(lab.white(states))
        wrong = torch.zeros(lab.number).index_add_(
            0, states.example, (~(is_open & (answer == states.label))).float()
        )
        return float((wrong[: options["taught"]] == 0).float().mean())

    asked = lab.reworded[lab.reworded.example < options["taught"]]
    opened = torch.zeros(lab.number).index_add_(
        0, lab.local.example, nearest(lab.white(lab.local))[0].float()
    )
    others = lab.taught[lab.taught.start & (lab.taught.example >= options["taught"])]
    return {
        "reliability": whole(lab.taught[own]),
        "generality": whole(asked),
        "locality": float((opened == 0).float().mean()),
        "known_open": float(nearest(lab.starts)[0].float().mean()),
        "prose_open": float(nearest(lab.prose)[0].float().mean()),
        "untaught_open": float(nearest(lab.white(others))[0].float().mean()) if len(others) else float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int)
    parser.add_argument("trials", type=json.loads)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    lab = Lab(given.number)
    for changes in given.trials:
        options = {**DEFAULTS, **changes}
        key = {"cached": given.number, "options": options}
        lines = given.out.read_text().splitlines() if given.out.exists() else []
        if not lines:
            given.out.write_text(json.dumps({"header": environment()}) + "\n")
        if any(key.items() <= json.loads(line).items() for line in lines):
            continue
        line = json.dumps(key | {name: round(value, 5) for name, value in trial(lab, options).items()})
        with given.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
