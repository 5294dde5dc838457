"""Compare methods: each method with each seed is one run in its own folder; the folders give the results.

Choices:
- `compare` knows no particular recipe: a `Recipe` is a name, a model and a few plain functions.
- A run's folder holds `config.json` (all settings that decide its result, written before the run starts) and
  `result.json` (written completely when the run is finished). A finished run is never repeated. A folder with
  a run of other settings is rejected. The recipe may keep further files in the folder.
- An unfinished run is started again in its folder; the recipe continues from the files that it finds there.
- The base model has no seed and runs once, first; the other runs are compared with its result.
- `results.json` is always made from the run folders, so the two cannot disagree.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..atomic import read_json, write_json
from ..provenance import differences, environment, flat
from .results import BASE, LEARNT, LOST, Run, collect, run_name

logger = logging.getLogger(__name__)

PARTIAL = "partial"
_TRUST_IN_THE_PLAN = 30.0

Stage: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """What `compare` runs.

    Attributes:
        name, model, about: for the report.
        methods: the methods that a comparison runs by default; others: those that run only if they are named.
        settings: `settings(method, seed)` returns all settings that decide a run's result, as plain JSON
            values.
        run: `run(method, seed, base, stage, folder)` does one run and returns `{"row": {...},
            "examples": [...]}`, the numbers of the method's row, and questions as `{"question", "expected",
            "answer", "right"}`; further keys are allowed. `base` is the result of the base model's run; in
            that run itself, `base` and `seed` are None. Call `stage(name)` when a stage begins. `folder`
            belongs to the run. Files that an interrupted run needs to continue go into `folder / PARTIAL`,
            which is removed when the run is finished. If the result has `"items": {task: [right, ...]}`, with
            the same questions in the same order in every run, the methods are compared with the base model
            question by question.
        stages: `stages(method)` returns the stages with their expected seconds, to estimate the time left.
        learnt: keys of the row that measure what was learnt; the report draws the first one that exists.
        lost: keys of the row whose loss relative to the base model is drawn, one panel each.
        order: order of the methods in the report; empty: as in `methods` and `others`.
        seeds: the seeds that a comparison uses by default.
        precision: number format of the computation during a run; it is one of the run's settings. None: the
            faster one on this machine.
        plan: `plan(method)` returns what a run needs (data, steps), as plain JSON values.
        figures: `figures(out)` draws further figures from the finished runs in the folder `out`.
    """

    name: str
    model: str
    about: str
    methods: tuple[str, ...]
    settings: Callable[[str, int | None], dict[str, Any]]
    run: Callable[[str, int | None, dict[str, Any] | None, Stage, Path], dict[str, Any]]
    stages: Callable[[str], dict[str, float]]
    learnt: tuple[str, ...] = LEARNT
    lost: tuple[str, ...] = LOST
    others: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    precision: str | None = None
    plan: Callable[[str], dict[str, Any]] | None = None
    figures: Callable[[Path], None] | None = None


def compare(
    recipe: Recipe,
    *,
    out: str | Path,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    progress: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Run every method with every seed, one folder per run under `out/runs`, and return the results.

    The base model always runs first, unless its run is already finished. `out/results.json` is rewritten
    after each run. If the comparison is interrupted, calling it again reuses the finished runs.

    Args:
        recipe: what to run.
        out: folder for the runs and results.
        methods: None: those of the recipe.
        seeds: None: those of the recipe.
        progress: called with each line of progress.

    Raises:
        ValueError: a method is unknown; methods or seeds are empty or repeated; or a run folder holds a run
            with other settings.
    """
    out = Path(out)
    runs = _planned(recipe, methods, seeds)
    folders = {run: out / "runs" / run_name(*run) for run in runs}
    # check all folders before anything runs: an error must not come after minutes of work
    for run, own in folders.items():
        # also check the other seeds of the method, because they share a row
        for folder in (own, *sorted(out.glob(f"runs/{run[0]}-seed*"))):
            changes = _changes(folder, _config(recipe, *run), seeds_may_differ=folder != own)
            if not changes:
                continue
            advice = "give another --out or delete that folder"
            raise ValueError(f"{folder} holds a run with other settings ({changes}); {advice}")
    clock = _Clock(recipe, [run for run in runs if not _finished(folders[run])], progress)
    base = None
    for run, folder in folders.items():
        if _finished(folder):
            progress(f"{run_name(*run)}: already finished, reusing {folder}")
        else:
            clock.start_run(run)
            _run(recipe, run, base, clock.start_stage, folder)
            clock.end_run()
            write_json(out / "results.json", collect(out))
        if (folder / PARTIAL).exists():
            shutil.rmtree(folder / PARTIAL)
        if run[0] == BASE:
            base = read_json(folder / "result.json")
    results = collect(out)
    write_json(out / "results.json", results)
    if recipe.figures is not None:
        recipe.figures(out)
    return results


def dry_run(
    recipe: Recipe,
    *,
    out: str | Path,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> str:
    """What `compare` would do, as text: every run with its state, settings and plan. Runs and writes nothing.

    Raises:
        ValueError: a method is unknown; methods or seeds are empty or repeated; or a `config.json` cannot be
            read.
    """
    blocks, seconds = [], 0.0
    for method, seed in _planned(recipe, methods, seeds):
        folder, config = Path(out) / "runs" / run_name(method, seed), _config(recipe, method, seed)
        if changes := _changes(folder, config):
            state = f"other settings ({changes})"
        elif _finished(folder):
            state = "finished"
        else:
            state = "to do"
            seconds += sum(recipe.stages(method).values())
        plan = {} if recipe.plan is None else recipe.plan(method)
        lines = [f"{run_name(method, seed)}: {state}"]
        for name, content in (("settings", config["settings"]), ("plan", plan)):
            if content:
                pairs = (f"{key}={json.dumps(value)}" for key, value in flat(content).items())
                lines.append(f"  {name}: {' '.join(pairs)}")
        blocks.append("\n".join(lines))
    left = f"to do: about {_duration(seconds)}" if seconds else "nothing to do"
    return "\n".join([*blocks, left])


def _planned(recipe: Recipe, methods: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Run]:
    wanted = list(recipe.methods if methods is None else methods)
    known = dict.fromkeys((BASE, *recipe.methods, *recipe.others))
    seeds = recipe.seeds if seeds is None else seeds
    for method in wanted:
        if method not in known:
            raise ValueError(
                f"method {method!r} is unknown in recipe {recipe.name!r}; use one of {', '.join(known)}"
            )
    if not wanted or len(set(wanted)) < len(wanted) or not seeds or len(set(seeds)) < len(seeds):
        got = f"methods are {wanted} and seeds {list(seeds)}"
        raise ValueError(f"give at least one method and one seed, and none of them twice; got: {got}")
    taught = [method for method in wanted if method != BASE]
    return [(BASE, None), *((method, seed) for seed in seeds for method in taught)]


def _config(recipe: Recipe, method: str, seed: int | None) -> dict[str, Any]:
    config = {"recipe": recipe.name, "model": recipe.model, "method": method, "seed": seed}
    # through JSON and back, so that tuples and lists compare equal to what a file holds
    settings = recipe.settings(method, seed)
    if recipe.precision is not None:
        settings = {**settings, "precision": recipe.precision}
    return json.loads(json.dumps({**config, "settings": settings}))


def _changes(folder: Path, config: dict[str, Any], *, seeds_may_differ: bool = False) -> str:
    """How the settings of the run in the folder differ from this run, as text; empty if they do not."""
    path = folder / "config.json"
    if not path.exists():
        return ""
    held = read_json(path)
    if seeds_may_differ:
        held, config = (
            {**one, "seed": None, "settings": {**one["settings"], "seed": None}} for one in (held, config)
        )
    return differences(held, config)


def _finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


def _run(recipe: Recipe, run: Run, base: dict[str, Any] | None, stage: Stage, folder: Path) -> None:
    """Do one run and write its result into its folder."""
    config = _config(recipe, *run)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    # imports torch, which a dry run does not need
    from ..precision import computing_in

    with computing_in(recipe.precision):
        result = recipe.run(*run, base, stage, folder)
    result["row"] = {key: _finite(value) for key, value in result["row"].items()}
    order = recipe.order or (*recipe.methods, *recipe.others)
    about = {"about": recipe.about, "order": order, "learnt": recipe.learnt, "lost": recipe.lost}
    write_json(folder / "result.json", {**config, **about, **result, **environment()})


def _finite(value: Any) -> Any:
    """Infinite values (a diverged run's perplexity) become None, because JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Clock:
    """Reports each stage with the time left: the expected seconds, scaled by their accuracy so far."""

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
        label = f"[{self._done}/{self._num_runs}] {run_name(*self._run)}: {stage}"
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
        # the plan counts like half a minute of measured time, so a short first stage changes little
        return planned * (self._taken + _TRUST_IN_THE_PLAN) / (self._expected + _TRUST_IN_THE_PLAN)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 3 * 3600 else f"{round(seconds / 3600)} h"
