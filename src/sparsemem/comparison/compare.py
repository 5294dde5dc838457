"""Compare methods: each method with each seed is one run in its own folder, and the folders make the results.

Choices:
- `compare` knows no recipe: a `Recipe` is a name, a model and a few plain functions.
- A run's folder holds `config.json` (all that decides its outcome, written before it starts) and
  `result.json` (written when finished, whole or not at all). A finished run is never repeated; a folder that
  holds a run of other settings is refused. What else the recipe keeps there is its own.
- An unfinished run is run again in its folder: the recipe goes on from what it finds there.
- The base model has no seed and runs first, once: the other runs are measured against its result.
- `results.json` is always made from the run folders, never kept beside them as a second truth.
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

from ..files import read_json, write_json
from ..provenance import differences, environment, flat
from .results import BASE, LEARNT, LOST, Run, collect, run_name

logger = logging.getLogger(__name__)

PARTIAL = "partial"
_TRUST_IN_THE_PLAN = 30.0

Stage: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """What `compare` runs.

    `settings(method, seed)` returns, as plain JSON values, all that decides a run's outcome.
    `run(method, seed, base, stage, folder)` does the run and returns `{"row": {...}, "examples": [...]}` and
    what else it likes: the figures of the method's row, and questions as `{"question", "expected", "answer",
    "right"}`. `base` is the base's result (None in the base's own run, whose seed is None too); call
    `stage(name)` as a stage begins. `folder` is the run's own: what an interrupted run needs to go on belongs
    into `folder / PARTIAL`, which is removed when the run is finished. With `"items": {task: [right, ...]}`
    in the result, for the same questions in the same order in every run, the methods are compared to the base
    question by question.
    `stages(method)` names these stages with the seconds that each is expected to take, for the time left.
    `learnt` are the row's figures of what is learnt, of which a report draws the first that there is; `lost`
    those whose loss against the base it draws, a panel each. `order` is that of the methods in a report
    (empty: that of `methods`), `seeds` those of a comparison that names none, and `plan(method)` says, as
    plain JSON values, what a run will take (data, steps, memory). `precision` is what models compute in while
    a run lasts, one of its settings; None: the faster one on this machine. `figures(out)` draws what the
    recipe shows beside the report, from the finished runs under `out`.
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

    Methods and seeds are the recipe's where none are named. The base is always run (or found finished) first.
    `out/results.json` is rewritten after each run: whatever stops the comparison leaves the finished runs'
    results behind, and calling again takes them up.

    Raises:
        ValueError: for an unknown method, none or a repeated one, or a run folder that holds other settings.
    """
    out = Path(out)
    runs = _planned(recipe, methods, seeds)
    folders = {run: out / "runs" / run_name(*run) for run in runs}
    # all folders are looked at before anything runs: a refusal must not come after minutes of work
    for run, own in folders.items():
        # other seeds of the method as well, for they will share a row
        for folder in (own, *sorted(out.glob(f"runs/{run[0]}-seed*"))):
            changes = _changes(folder, _config(recipe, *run), seeds_may_differ=folder != own)
            if not changes:
                continue
            advice = "choose another output folder or delete that one"
            raise ValueError(f"{folder} holds a run of other settings ({changes}); {advice}")
    clock = _Clock(recipe, [run for run in runs if not _finished(folders[run])], progress)
    base = None
    for run, folder in folders.items():
        if _finished(folder):
            progress(f"{run_name(*run)}: already finished, taken from {folder}")
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
        ValueError: for an unknown method, none or a repeated one, or a `config.json` that cannot be read.
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
    seeds = recipe.seeds if seeds is None else seeds
    for method in wanted:
        if method != BASE and method not in recipe.methods:
            allowed = ", ".join(dict.fromkeys((BASE, *recipe.methods)))
            raise ValueError(f"method {method!r} is unknown to recipe {recipe.name!r}; use one of {allowed}")
    if not wanted or len(set(wanted)) < len(wanted) or not seeds or len(set(seeds)) < len(seeds):
        got = f"methods are {wanted} and seeds {list(seeds)}"
        raise ValueError(f"methods and seeds must each name one or more, none twice, but {got}")
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
    """How the run that the folder holds differs from this one, in words; empty where none does."""
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
    """Do one run in its folder, and write its result there."""
    config = _config(recipe, *run)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    # torch, which a dry run does without
    from ..precision import computing_in

    with computing_in(recipe.precision):
        result = recipe.run(*run, base, stage, folder)
    result["row"] = {key: _finite(value) for key, value in result["row"].items()}
    order = recipe.order or recipe.methods
    about = {"about": recipe.about, "order": order, "learnt": recipe.learnt, "lost": recipe.lost}
    write_json(folder / "result.json", {**config, **about, **result, **environment()})


def _finite(value: Any) -> Any:
    """A diverged run's infinite perplexity becomes None: JSON knows no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        # the plan counts as half a minute of experience, so that the first short stage does not rule
        return planned * (self._taken + _TRUST_IN_THE_PLAN) / (self._expected + _TRUST_IN_THE_PLAN)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 3 * 3600 else f"{round(seconds / 3600)} h"
