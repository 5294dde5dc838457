"""Run a method of the demo at several learning rates; one folder per rate in docs/results/demo-sweep.

    python benchmarks/demo_sweep.py lora 1e-4 3e-4 1e-3

A finished run is not repeated. The demo uses the rate that forgets least at recall 0.95.
"""

import sys
from dataclasses import replace
from pathlib import Path

from sparsemem.compare.compare import compare
from sparsemem.compare.recipes.demo import DemoSettings, recipe

OUT = Path(__file__).parents[1] / "docs" / "results" / "demo-sweep"


def sweep(method: str, rates: list[float], seed: int = 0) -> None:
    settings = DemoSettings()
    for rate in rates:
        teaching = replace(settings.teaching, lr={**settings.teaching.lr, method: rate})
        chosen = recipe(settings=replace(settings, teaching=teaching))
        results = compare(chosen, out=OUT / f"{method}-{rate:g}", methods=["base", method], seeds=[seed])
        row = next(row for row in results["rows"] if row["method"] == method)
        sys.stdout.write(f"{method} lr {rate:g}: {row}\n")


if __name__ == "__main__":
    sweep(sys.argv[1], [float(rate) for rate in sys.argv[2:]])
