"""Compare methods: each method with each seed is one run in its own folder, and the folders make the results.

Choices:
- `compare` knows no recipe: a `Recipe` is a name, a model and three plain functions.
- A run's folder holds `config.json` (all that decides its outcome, written before it starts) and
  `result.json` (written when finished, whole or not at all). A finished run is never repeated; a folder that
  holds a run of other settings is refused.
- The base model has no seed and runs first, once: the other runs are measured against its result.
- `results.json` is always made from the run folders, never kept beside them as a second truth.
"""

import json
import logging
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

from .files import write_json

logger = logging.getLogger(__name__)

BASE = "base"
_ORDER = (BASE, "smf", "smf-open", "lora", "full")
_PACKAGES = ("sparsemem", "torch", "transformers", "peft")
_TRUST_IN_THE_PLAN = 30.0

Run: TypeAlias = tuple[str, int | None]


@dataclass(frozen=True)
class Recipe:
    """What `compare` runs.

    `settings(method, seed)` returns, as plain JSON values, all that decides a run's outcome.
    `run(method, seed, base, stage)` does the run and returns `{"row": {...}, "examples": [...], ...}`: the
    figures of the method's row, and questions as `{"question", "expected", "answer", "right"}`. `base` is the
    base's result (None in the base's own run, whose seed is None too); call `stage(name)` as a stage begins.
    `stages(method)` names these stages with the seconds that each is expected to take, for the time left.
    """

    name: str
    model: str
    about: str
    methods: tuple[str, ...]
    settings: Callable[[str, int | None], dict[str, Any]]
    run: Callable[[str, int | None, dict[str, Any] | None, Callable[[str], None]], dict[str, Any]]
    stages: Callable[[str], dict[str, float]]


def compare(
    recipe: Recipe,
    *,
    out: str | Path,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    progress: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Run every method with every seed, one folder per run under `out/runs`, and return the results.

    The base is always run (or found finished) first. `out/results.json` is rewritten after each run: whatever
    stops the comparison leaves the finished runs' results behind, and calling again takes them up.

    Raises:
        ValueError: for an unknown method, none or a repeated one, or a run folder that holds other settings.
    """
    out = Path(out)
    runs = _planned(recipe, methods, seeds)
    folders = {run: out / "runs" / _run_name(*run) for run in runs}
    # all folders are looked at before anything runs: a refusal must not come after minutes of work
    for run, folder in folders.items():
        _refuse_other_settings(folder, _config(recipe, *run))
    clock = _Clock(recipe, [run for run in runs if not (folders[run] / "result.json").exists()], progress)
    base = None
    for run, folder in folders.items():
        method, seed = run
        if (folder / "result.json").exists():
            progress(f"{_run_name(*run)}: already finished, taken from {folder}")
        else:
            clock.start_run(run)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", _config(recipe, *run))
            result = recipe.run(method, seed, base, clock.start_stage)
            clock.end_run()
            result["row"] = {key: _finite(value) for key, value in result["row"].items()}
            about = {**_config(recipe, *run), "about": recipe.about}
            write_json(folder / "result.json", {**about, **result, **environment()})
            write_json(out / "results.json", collect(out))
        if method == BASE:
            base = read_json(folder / "result.json")
    results = collect(out)
    write_json(out / "results.json", results)
    return results


def collect(out: str | Path) -> dict[str, Any]:
    """Results of all finished runs under `out`: per method one row, with mean and spread of its seeds.

    Raises:
        ValueError: when there is no finished run, or a file cannot be read.
    """
    out = Path(out)
    results = [read_json(path) for path in sorted(out.glob("runs/*/result.json"))]
    if not results:
        raise ValueError(
            f"{out} holds no finished run (no runs/*/result.json); give a folder that a comparison wrote"
        )
    results.sort(key=lambda r: (_place(r["method"]), r["seed"] or 0))
    by_method: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_method.setdefault(result["method"], []).append(result)
    seeds = sorted({r["seed"] for r in results if r["seed"] is not None})
    versions = [r["versions"] for r in results]
    return {
        **{key: results[0][key] for key in ("recipe", "model", "about")},
        "seed": seeds[0] if seeds else None,
        "seeds": seeds,
        "rows": [_mean_row(method, group) for method, group in by_method.items()],
        "runs": [{"method": r["method"], "seed": r["seed"], **r["row"]} for r in results],
        "examples": _merge_examples({method: group[0] for method, group in by_method.items()}),
        "settings": {_run_name(r["method"], r["seed"]): r["settings"] for r in results},
        "versions": {name: _joined(v.get(name) for v in versions) for name in versions[0]},
        "machine": _joined(r["machine"] for r in results),
        "commit": _joined(r["commit"] for r in results),
    }


def environment() -> dict[str, Any]:
    """Versions of what computes, the machine, and the source's commit (None outside a checkout)."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    processor = f"{platform.system()} {platform.machine()}, {_processor()}"
    return {
        "versions": versions,
        "machine": f"{processor}, {os.cpu_count()} CPUs, {threads} threads",
        "commit": _commit(),
    }


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: naming the file, when it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as JSON ({error}); delete it to have it made again") from None


def differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """The first settings that differ, in words; empty where none does."""
    there, now = _flat(there), _flat(now)
    names = [name for name in {**now, **there} if there.get(name) != now.get(name)]
    return "; ".join(f"{name} {there.get(name)!r} there, {now.get(name)!r} now" for name in names[:3])


def _planned(recipe: Recipe, methods: Sequence[str] | None, seeds: Sequence[int]) -> list[Run]:
    wanted = list(recipe.methods if methods is None else methods)
    for method in wanted:
        if method != BASE and method not in recipe.methods:
            allowed = ", ".join(dict.fromkeys((BASE, *recipe.methods)))
            raise ValueError(f"method {method!r} is unknown to recipe {recipe.name!r}; use one of {allowed}")
    if not wanted or len(set(wanted)) < len(wanted) or not seeds or len(set(seeds)) < len(seeds):
        got = f"methods are {wanted} and seeds {list(seeds)}"
        raise ValueError(f"methods and seeds must each name one or more, none twice, but {got}")
    taught = [method for method in wanted if method != BASE]
    return [(BASE, None), *((method, seed) for seed in seeds for method in taught)]


def _run_name(method: str, seed: int | None) -> str:
    return method if seed is None else f"{method}-seed{seed}"


def _config(recipe: Recipe, method: str, seed: int | None) -> dict[str, Any]:
    config = {"recipe": recipe.name, "model": recipe.model, "method": method, "seed": seed}
    # through JSON and back, so that tuples and lists compare equal to what a file holds
    return json.loads(json.dumps({**config, "settings": recipe.settings(method, seed)}))


def _refuse_other_settings(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "config.json"
    if not path.exists():
        return
    changes = differences(read_json(path), config)
    if changes:
        advice = "choose another output folder or delete that one"
        raise ValueError(f"{folder} holds a run of other settings ({changes}); {advice}")


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {name: settings}
    parts = [_flat(value, f"{name}.{key}" if name else key) for key, value in settings.items()]
    return {key: value for part in parts for key, value in part.items()}


def _finite(value: Any) -> Any:
    """A diverged run's infinite perplexity becomes None: JSON knows no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _place(method: str) -> tuple[int, str]:
    return (_ORDER.index(method) if method in _ORDER else len(_ORDER), method)


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
    """The one value of all runs, or each of them: runs of two versions must not pass for one."""
    return ", ".join(dict.fromkeys(str(v) for v in values if v is not None)) or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # a virtual environment may lie inside someone else's repository: only a tracked file names its commit
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class _Clock:
    """Announces each stage with the time left: the recipe's expected seconds, scaled as they have held."""

    def __init__(self, recipe: Recipe, runs: list[Run], say: Callable[[str], None]):
        self._plan = {run: dict(recipe.stages(run[0])) for run in runs}
        self._say, self._num_runs, self._done = say, len(runs), 0
        self._expected = self._taken = self._begun = 0.0
        self._run: Run | None = None
        self._stage: str | None = None

    def start_run(self, run: Run) -> None:
        self._run, self._stage = run, None
        self._done += 1

    def start_stage(self, stage: str) -> None:
        self._end_stage()
        assert self._run is not None
        self._stage, self._begun = stage, time.monotonic()
        label = f"[{self._done}/{self._num_runs}] {_run_name(*self._run)}: {stage}"
        self._say(f"{label} (about {_duration(self._left())} left)")

    def end_run(self) -> None:
        self._end_stage()
        assert self._run is not None
        self._plan.pop(self._run)

    def _end_stage(self) -> None:
        if self._stage is not None and self._run is not None:
            self._expected += self._plan[self._run].pop(self._stage, 0.0)
            self._taken += time.monotonic() - self._begun
        self._stage = None

    def _left(self) -> float:
        planned = sum(sum(stages.values()) for stages in self._plan.values())
        # the plan counts as half a minute of experience, so that the first short stage does not rule
        return planned * (self._taken + _TRUST_IN_THE_PLAN) / (self._expected + _TRUST_IN_THE_PLAN)


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"
