"""The results of a comparison, made from its run folders: one row per method, averaged over its seeds.

Choices: what a report needs to know about the recipe (the order of the methods, which values are learnt and
which are lost) is in every run's `result.json`, so a report does not need the recipe. If a run does not have
these keys, those of the demo are used.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..atomic import read_json

BASE = "base"
LEARNT = ("recall_heldout", "recall_train")
LOST = ("knowledge", "perplexity", "drift")
_ORDER = (BASE, "smf", "smf-open", "lora", "full")

Run: TypeAlias = tuple[str, int | None]


def run_name(method: str, seed: int | None) -> str:
    """The name of a run's folder; the base model has no seed."""
    return method if seed is None else f"{method}-seed{seed}"


def collect(out: str | Path) -> dict[str, Any]:
    """Results of all finished runs under `out`: one row per method, with mean and spread over its seeds.

    Raises:
        ValueError: there is no finished run, a file cannot be read, or runs answered different questions.
    """
    out = Path(out)
    results = [read_json(path) for path in sorted(out.glob("runs/*/result.json"))]
    if not results:
        raise ValueError(
            f"{out} holds no finished run (no runs/*/result.json); give a folder that `compare` wrote"
        )
    order = _recorded(results, "order", _ORDER)
    results.sort(key=lambda r: (_place(r["method"], order), r["seed"] or 0))
    by_method: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_method.setdefault(result["method"], []).append(result)
    seeds = sorted({r["seed"] for r in results if r["seed"] is not None})
    versions = [r["versions"] for r in results]
    return {
        **{key: results[0][key] for key in ("recipe", "model", "about")},
        "learnt": _recorded(results, "learnt", LEARNT),
        "lost": _recorded(results, "lost", LOST),
        "seed": seeds[0] if seeds else None,
        "seeds": seeds,
        "rows": [_mean_row(method, group) for method, group in by_method.items()],
        "against_base": _against_base(by_method),
        "runs": [{"method": r["method"], "seed": r["seed"], **r["row"]} for r in results],
        "examples": _merge_examples({method: group[0] for method, group in by_method.items()}),
        "settings": {run_name(r["method"], r["seed"]): r["settings"] for r in results},
        "versions": {name: _joined(v.get(name) for v in versions) for name in versions[0]},
        "machine": _joined(r["machine"] for r in results),
        "commit": _joined(r["commit"] for r in results),
    }


def _recorded(results: list[dict[str, Any]], key: str, default: tuple[str, ...]) -> list[str]:
    return list(next((result[key] for result in results if key in result), default))


def _place(method: str, order: list[str]) -> tuple[int, str]:
    # the base model comes first, even if the order does not list it
    named = [BASE, *(name for name in order if name != BASE)]
    return (named.index(method) if method in named else len(named), method)


def _mean_row(method: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [result["row"] for result in results]
    row: dict[str, Any] = {"method": method, "seeds": [r["seed"] for r in results if r["seed"] is not None]}
    if len(rows) == 1:
        return {**row, **rows[0]}
    spread = {}
    for key, first in rows[0].items():
        values = [r.get(key) for r in rows]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            row[key] = statistics.fmean(values)
            spread[key] = statistics.stdev(values)
        else:
            row[key] = first if all(v == first for v in values) else None
    return {**row, "spread": spread}


def _against_base(by_method: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each method and task the result of `paired.against_base`, if every run answered the task."""
    base = by_method[BASE][0].get("items", {}) if BASE in by_method else {}
    compared: dict[str, dict[str, Any]] = {}
    for method, results in by_method.items():
        for task, answered in base.items() if method != BASE else ():
            runs = [result.get("items", {}).get(task) for result in results]
            if all(run is not None for run in runs):
                try:
                    compared.setdefault(method, {})[task] = against_base(answered, runs)
                except ValueError as error:
                    raise ValueError(
                        f"{task} of {method} cannot be compared with the base model: {error}"
                    ) from None
    return compared


def _merge_examples(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for method, result in results.items():
        for example in result.get("examples", []):
            question = {"question": example["question"], "expected": example["expected"]}
            entry = merged.setdefault(example["question"], {**question, "answers": {}, "right": {}})
            entry["answers"][method] = example["answer"]
            entry["right"][method] = example["right"]
    return list(merged.values())


def _joined(values: Iterable[Any]) -> str | None:
    """The distinct values of all runs, joined by commas, so that a report shows if versions were mixed."""
    return ", ".join(dict.fromkeys(str(v) for v in values if v is not None)) or None


NUM_RESAMPLES = 10_000
_SEED = 0
_TAILS = (0.025, 0.975)


def against_base(base: Sequence[bool], runs: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """`difference` of the runs' mean accuracy from the base model's, 95 % interval `low` to `high`, and `n`.

    Args:
        base: for each of n questions, whether the base model's answer is correct.
        runs: the same for each run (one per seed), with the same questions in the same order.

    Raises:
        ValueError: there are no questions or no runs, or the numbers of questions differ.
    """
    lengths = {len(base), *(len(run) for run in runs)}
    if not runs or len(base) == 0 or len(lengths) > 1:
        got = f"the base has {len(base)} and the runs have {[len(run) for run in runs]}"
        raise ValueError(f"all runs must answer the same questions, at least one; got: {got}")
    # integers, so that equal differences are exactly equal
    total = np.sum(np.asarray(runs, dtype=np.int64), axis=0) - len(runs) * np.asarray(base, dtype=np.int64)
    values, counts = np.unique(total, return_counts=True)
    draws = np.random.default_rng(_SEED).multinomial(len(base), counts / len(base), size=NUM_RESAMPLES)
    low, high = np.quantile(draws @ values, _TAILS) / (len(base) * len(runs))
    difference = float(total.sum()) / (len(base) * len(runs))
    return {"difference": difference, "low": float(low), "high": float(high), "n": len(base)}
