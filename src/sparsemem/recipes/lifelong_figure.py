"""The benchmark's own figures: accuracy over the number of edits, and by the age of an edit."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from ..writing import read_json, write_atomically

_PANELS = (
    ("reliability", "taught wording, right"),
    ("generality", "other wording, right"),
    ("locality", "unrelated answers unchanged"),
    ("knowledge", "general questions still right"),
)
_TENTHS = 10


def draw(out: Path) -> None:
    """Write `edits.png` and `age.png` into `out`, from the finished runs in it."""
    runs = [read_json(path) for path in sorted(out.glob("runs/*/result.json"))]
    runs = [run for run in runs if run["method"] != "base"]
    if runs:
        _save(out / "edits.png", _over_edits(runs))
        _save(out / "age.png", _by_age(runs))


def _over_edits(runs: list[dict[str, Any]]) -> Any:
    figure = _figure(4.0 * len(_PANELS), 3.4)
    for axes, (key, label) in zip(figure.subplots(1, len(_PANELS), sharey=True), _PANELS, strict=True):
        for run in runs:
            points = [(point["edits"], point[key]) for point in run["points"]]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=run["method"])
        axes.set_xscale("log")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("edits, taught one at a time")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share")
    figure.axes[0].legend(fontsize=8)
    return figure


def _by_age(runs: list[dict[str, Any]]) -> Any:
    """Of each run's last point: the share that is right in each tenth of the edits, the oldest first."""
    figure = _figure(9.0, 3.4)
    panels = (("right", "taught wording"), ("right_rephrased", "other wording"))
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for run in runs:
            right = run["points"][-1][key]
            if len(right) >= _TENTHS:
                bounds = [round(i * len(right) / _TENTHS) for i in range(_TENTHS + 1)]
                parts = [right[a:b] for a, b in pairwise(bounds)]
                shares = [sum(part) / len(part) for part in parts]
                axes.plot(range(1, _TENTHS + 1), shares, marker="o", markersize=4,
                          label=f"{run['method']}, {len(right):,} edits")  # fmt: skip
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("tenth of the edits, the first-taught first")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share right at the end")
    if figure.axes[0].lines:
        figure.axes[0].legend(fontsize=8)
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(path: Path, figure: Any) -> None:
    write_atomically(path, lambda part: figure.savefig(part, format="png"))
