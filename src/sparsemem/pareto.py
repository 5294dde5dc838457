"""The figure of a comparison: what was learnt (up) against what was lost (right), a panel per way of losing.

Choices: methods are named beside their points, so that nobody has to decode a legend; the colours are Okabe
and Ito's, which colour-blind readers can tell apart; losses that span decades get a symmetric log axis.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_COLOURS = {"base": "#444444", "smf": "#0072B2", "smf-open": "#56B4E9", "lora": "#D55E00", "full": "#009E73"}
_OTHER_COLOURS = ("#CC79A7", "#E69F00", "#7F7F7F")
_INK, _FAINT = "#222222", "#dcdcdc"


class Panel(NamedTuple):
    """One way of losing: axis label, end of its linear part (None: nowhere), unit, and points."""

    label: str
    linear_to: float | None
    percent: bool
    points: list["Point"]


class Point(NamedTuple):
    """One method: `x` lost, `y` learnt, and their standard deviations over the seeds."""

    method: str
    x: float
    y: float
    x_spread: float
    y_spread: float


def pareto_figure(rows: list[dict[str, Any]]) -> bytes:
    """PNG of recall against knowledge lost, rise of perplexity, and drift; the upper left corner is best.

    Panels without a single point are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reworded = any(number(row, "recall_heldout") is not None for row in rows)
    panels = [
        panel for panel in _panels(rows, "recall_heldout" if reworded else "recall_train") if panel.points
    ]
    num_panels = max(1, len(panels))
    # Figure and canvas directly: pyplot keeps state of its own and may look for a display
    figure = Figure(figsize=(0.6 + 3.7 * num_panels, 3.6), dpi=160)
    figure.set_layout_engine("constrained", w_pad=0.12)
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, num_panels, sharey=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=False):
        _draw(axes, panel)
    all_axes[0].set_ylabel(f"learnt: recall of {'reworded' if reworded else 'taught'} questions", color=_INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def number(row: dict[str, Any], key: str) -> float | None:
    """A row's figure, or None where it has none."""
    value = row.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _panels(rows: list[dict[str, Any]], learnt: str) -> list[Panel]:
    base = next((row for row in rows if row["method"] == "base"), {})
    knowledge, perplexity = number(base, "knowledge"), number(base, "perplexity")

    def points(key: str, loss: Callable[[float], float], scale: float = 1.0) -> list[Point]:
        made = [_point(row, learnt, key, loss, scale) for row in rows]
        return [point for point in made if point is not None]

    panels = [Panel("lost: drift (nats per token)", 0.001, False, points("drift", float))]
    if perplexity is not None:
        rise = points("perplexity", lambda value: value / perplexity - 1, 1 / perplexity)
        panels.insert(0, Panel("lost: rise of perplexity", 0.01, True, rise))
    if knowledge is not None:
        lost = points("knowledge", lambda value: knowledge - value)
        panels.insert(0, Panel("lost: general knowledge", None, True, lost))
    return panels


def _point(
    row: dict[str, Any], learnt: str, key: str, loss: Callable[[float], float], scale: float
) -> Point | None:
    x, y, spread = number(row, key), number(row, learnt), row.get("spread", {})
    if x is None or y is None:
        return None
    return Point(row["method"], loss(x), y, scale * spread.get(key, 0.0), spread.get(learnt, 0.0))


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter

    for i, point in enumerate(panel.points):
        colour = _COLOURS.get(point.method, _OTHER_COLOURS[i % len(_OTHER_COLOURS)])
        axes.errorbar(
            point.x, point.y, xerr=point.x_spread or None, yerr=point.y_spread or None, fmt="o", markersize=8,
            color=colour, markerfacecolor="white" if point.method == "base" else colour, markeredgewidth=1.6,
            elinewidth=1.2, zorder=3, clip_on=False,
        )  # fmt: skip
        left = _crowded(point, panel.points)
        axes.annotate(
            point.method, (point.x, point.y), (-9 if left else 9, 0), textcoords="offset points", va="center",
            ha="right" if left else "left", color=_INK,
        )  # fmt: skip
    _scale(axes, panel)
    axes.set_ylim(-0.04, 1.06)
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    axes.xaxis.set_major_formatter(FuncFormatter(_percent if panel.percent else _plain))
    axes.minorticks_off()
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_INK)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel(panel.label, color=_INK)


def _crowded(point: Point, others: Sequence[Point]) -> bool:
    """Whether a label to the right would run into another point."""
    reach = 0.15 * (max(other.x for other in others) - min(other.x for other in others))
    return any(0 < other.x - point.x < reach and abs(other.y - point.y) < 0.06 for other in others)


def _percent(value: float, _position: int) -> str:
    return f"{100 * value:g} %"


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def _scale(axes: Any, panel: Panel) -> None:
    xs = [point.x for point in panel.points]
    least, most = min(0.0, *xs), max(xs)
    if panel.linear_to is not None and most > panel.linear_to:
        axes.set_xscale("symlog", linthresh=panel.linear_to, linscale=0.6)
        axes.set_xlim(min(-0.2 * panel.linear_to, 1.2 * least), 4 * most)
    else:
        span = (most - least) or 1.0
        axes.set_xlim(least - 0.06 * span, most + 0.25 * span)
        if panel.percent:
            axes.set_xticks([tick for tick in axes.get_xticks() if least <= tick <= 1])
