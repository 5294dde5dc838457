"""The figure of a comparison: what was learnt (y axis) and lost (x axis), one panel per kind of loss.

Choices: names stand beside the points, so no legend is needed. A method looks the same in every figure: its
family has a colour (from Okabe and Ito or Paul Tol, safe for colour-blind readers) and a marker. Selection
rules other than KL have an open marker. The base model is an open circle with dashed lines through it. Losses
that differ by orders of magnitude get a symmetric log axis.
"""

import io
import math
import statistics
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

_ROUNDS = 4
# The first four are right, left, above and below.
_ANGLES = (0, 180, 90, 270, 30, -30, 150, 210, 60, -60, 120, 240)
_NEAR, _STEP, _FAR = 9.0, 8.0, 81.0
_MARGIN = 3.0
_LINE_FROM = 12.0


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Area of the intersection."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def distance(self, point: tuple[float, float]) -> float:
        """Distance from the point to the box; 0 inside."""
        x = max(self.left - point[0], point[0] - self.right, 0.0)
        y = max(self.bottom - point[1], point[1] - self.top, 0.0)
        return math.hypot(x, y)


class Place(NamedTuple):
    """A possible place for a name: its box, the gap to its point, and the cost of the place itself."""

    box: Box
    gap: float
    cost: float

    @property
    def middle(self) -> tuple[float, float]:
        return (self.box.left + self.box.right) / 2, (self.box.bottom + self.box.top) / 2


def place_labels(
    axes: Any, names: Sequence[str], points: Sequence[tuple[float, float]], taken: Sequence[Box], colour: str
) -> None:
    """Write each name beside its point (in data coordinates), avoiding the boxes in `taken`."""
    figure = axes.get_figure()
    scale = figure.dpi / 72
    pixels = [(float(x), float(y)) for x, y in axes.transData.transform(points)]
    inside = Box(*axes.get_window_extent().extents)
    options = [
        _places(at, _size(figure, name), scale, inside, [other for other in pixels if other != at])
        for name, at in zip(names, pixels, strict=True)
    ]
    options = [[p._replace(cost=p.cost + _covered(p.box, taken)) for p in places] for places in options]
    chosen: list[Place | None] = [None] * len(names)
    for _ in range(_ROUNDS):
        for i, places in enumerate(options):
            others = [
                box
                for j, place in enumerate(chosen)
                if j != i and place is not None
                for box in (place.box, *(along(pixels[j], place.middle) if place.gap > _LINE_FROM else ()))
            ]
            chosen[i] = min(places, key=lambda place: place.cost + _covered(place.box, others))
    for name, (x, y), at, place in zip(names, points, pixels, chosen, strict=True):
        assert place is not None
        offset = tuple((m - a) / scale for m, a in zip(place.middle, at, strict=True))
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            name, (x, y), offset, textcoords="offset points", ha="center", va="center", color=colour,
            arrowprops=line if place.gap > _LINE_FROM else None, annotation_clip=False, zorder=4,
        )  # fmt: skip


def _size(figure: Any, name: str) -> tuple[float, float]:
    text = figure.text(0, 0, name)
    extent = text.get_window_extent()
    text.remove()
    return extent.width + 2 * _MARGIN, extent.height + _MARGIN


def _places(
    at: tuple[float, float],
    size: tuple[float, float],
    scale: float,
    inside: Box,
    others: Sequence[tuple[float, float]],
) -> list[Place]:
    """Places around a point, near ones first. Outside the panel or near another point, the cost is high."""
    width, height = size
    places = []
    for ring in range(int((_FAR - _NEAR) / _STEP) + 1):
        gap = _NEAR + _STEP * ring
        for rank, angle in enumerate(_ANGLES):
            x = at[0] + math.cos(math.radians(angle)) * (scale * gap + width / 2)
            y = at[1] + math.sin(math.radians(angle)) * (scale * gap + height / 2)
            box = Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            outside = 1 - box.overlap(inside) / (width * height)
            mistaken = sum(box.distance(other) < box.distance(at) for other in others)
            cost = 60 * outside + mistaken + 0.02 * (gap - _NEAR) + 0.01 * rank
            places.append(Place(box, gap, cost))
    return places


def along(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """Boxes of a few pixels along a line."""
    number = int(math.dist(start, end) / 6) + 1
    shares = [i / number for i in range(number + 1)]
    at = [tuple(a + share * (b - a) for a, b in zip(start, end, strict=True)) for share in shares]
    return [Box(x - 2, y - 2, x + 2, y + 2) for x, y in at]


def _covered(box: Box, others: Sequence[Box]) -> float:
    """Cost of covering other boxes: 1 for each, plus 60 times the covered share of this box's area."""
    area = (box.right - box.left) * (box.top - box.bottom)
    overlaps = [overlap for other in others if (overlap := box.overlap(other))]
    return len(overlaps) + 60 * sum(overlaps) / area


_INK, _FAINT = "#222222", "#dcdcdc"
_STYLES = {
    "base": ("#444444", "o"),
    "smf": ("#0072B2", "o"),
    "smf-open": ("#56B4E9", "o"),
    "lora": ("#D55E00", "o"),
    "full": ("#009E73", "o"),
    "calibrated": ("#332288", "v"),
    "replacement": ("#CC79A7", "s"),
    "additive": ("#E69F00", "^"),
    "additive-scale": ("#882255", "D"),
}
_OTHER_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#332288", "#882255")
_OTHER_MARKERS = ("P", "X", "p", "*", "<", ">", "h")
_OPEN_RULES = ("tfidf", "tf", "grad", "random")
_NAMES = {
    "reliability": "taught facts answered wholly",
    "locality": "unrelated answers",
    "recall_heldout": "recall of reworded questions",
    "recall_train": "recall of taught questions",
    "knowledge": "general knowledge",
    "medmcqa": "accuracy on MedMCQA",
    "triviaqa": "accuracy on TriviaQA",
    "chapters": "accuracy on ICD-10 chapters",
    "chapters_sum": "accuracy on ICD-10 chapters",
    "perplexity": "rise of perplexity",
    "wikitext": "rise of WikiText perplexity",
    "drift": "drift (nats per token)",
}
# A symmetric log axis is linear below these values; shares never get a log axis.
_LINEAR_TO = {"perplexity": 0.01, "wikitext": 0.01, "drift": 0.001}
_MANY = 6


class Point(NamedTuple):
    """One method: `x` is lost, `y` is learnt; both with their standard deviations over the seeds."""

    method: str
    x: float
    y: float
    x_spread: float
    y_spread: float


def pareto_figure(
    rows: list[dict[str, Any]],
    *,
    learnt: Sequence[str],
    lost: Sequence[str],
    lines: Sequence[Sequence[str]] = (),
) -> bytes:
    """Draw what was learnt and what was lost, as PNG bytes; the upper left corner is best.

    Args:
        rows: the rows of the results.
        learnt: keys of the rows; the first one that any row has is drawn on the y axis.
        lost: keys of the rows, one panel each. A perplexity is drawn as its relative rise over the base
            model's, drift unchanged, and every other key as the base model's value minus the method's.
            Panels without points are left out.
        lines: methods whose points a thin line joins, in this order: one method at several strengths.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    up = next((key for key in learnt if any(number(row, key) is not None for row in rows)), learnt[-1])
    panels = {key: points for key in lost if (points := _points(rows, up, key))}
    many = len(rows) > _MANY
    width, height = (5.0, 4.8) if many else (3.7, 3.6)
    # Figure and canvas are used directly: pyplot keeps global state and may look for a display
    figure = Figure(figsize=(0.6 + width * max(1, len(panels)), height), dpi=160)
    figure.set_layout_engine("constrained", w_pad=0.12)
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    all_axes[0].set_ylabel(f"learnt: {_NAMES.get(up, up)}", color=_INK)
    all_axes[0].set_ylim(*_heights([point for points in panels.values() for point in points]))
    for axes, (key, points) in zip(all_axes, panels.items(), strict=False):
        _draw(axes, key, points)
        _join(axes, points, lines)
    figure.draw_without_rendering()
    # labels are placed on the final layout, which must not change any more
    figure.set_layout_engine("none")
    for axes, points in zip(all_axes, panels.values(), strict=False):
        at = [(point.x, point.y) for point in points]
        place_labels(axes, [point.method for point in points], at, _taken(axes, points, lines), _INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def number(row: dict[str, Any], key: str) -> float | None:
    """The row's number for this key, or None if it has none."""
    value = row.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def method_style(method: str) -> tuple[str, str, bool]:
    """Colour, marker, and whether the marker is filled; they depend only on the method's name."""
    family, _, rule = method.rpartition("-")
    named = family if family and rule in ("kl", *_OPEN_RULES) else method
    filled = method != "base" and (named == method or rule not in _OPEN_RULES)
    if named in _STYLES:
        return *_STYLES[named], filled
    chosen = zlib.crc32(named.encode())
    colour = _OTHER_COLOURS[chosen % len(_OTHER_COLOURS)]
    return colour, _OTHER_MARKERS[chosen // len(_OTHER_COLOURS) % len(_OTHER_MARKERS)], filled


def _points(rows: list[dict[str, Any]], learnt: str, lost: str) -> list[Point]:
    base = number(next((row for row in rows if row["method"] == "base"), {}), lost)
    if lost == "drift":
        loss, scale = float, 1.0
    elif base is None:
        return []
    elif lost in _LINEAR_TO:
        loss, scale = (lambda value: value / base - 1), 1 / base
    else:
        loss, scale = (lambda value: base - value), 1.0
    points = []
    for row in rows:
        x, y, spread = number(row, lost), number(row, learnt), row.get("spread", {})
        if x is not None and y is not None:
            points.append(
                Point(row["method"], loss(x), y, scale * spread.get(lost, 0.0), spread.get(learnt, 0.0))
            )
    return points


def _heights(points: list[Point]) -> tuple[float, float]:
    """Limits of the y axis: 0 to 1, or the range of the points if they are close together."""
    least = min((point.y - point.y_spread for point in points), default=0.0)
    most = max((point.y + point.y_spread for point in points), default=1.0)
    if most - least > 0.5:
        return -0.04, 1.06
    span = max(most - least, 0.01)
    return least - 0.15 * span, most + 0.15 * span


def _draw(axes: Any, key: str, points: list[Point]) -> None:
    from matplotlib.ticker import FuncFormatter

    for point in points:
        colour, marker, filled = method_style(point.method)
        if point.method == "base":
            axes.axvline(point.x, color=colour, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            axes.axhline(point.y, color=colour, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.errorbar(
            point.x, point.y, xerr=point.x_spread or None, yerr=point.y_spread or None, fmt=marker,
            markersize=8, color=colour, markerfacecolor=colour if filled else "white", markeredgewidth=1.6,
            elinewidth=1.2, zorder=3, clip_on=False,
        )  # fmt: skip
    _scale(axes, key, points)
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain if key == "drift" else _percent))
    axes.minorticks_off()
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_INK)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel(f"lost: {_NAMES.get(key, key)}", color=_INK)


def _join(axes: Any, points: list[Point], lines: Sequence[Sequence[str]]) -> None:
    """Thin lines through the points of one method at several strengths."""
    for one, other in _joined(points, lines):
        colour = method_style(one.method)[0]
        axes.plot([one.x, other.x], [one.y, other.y], color=colour, linewidth=1.0, zorder=2)


def _joined(points: list[Point], lines: Sequence[Sequence[str]]) -> list[tuple[Point, Point]]:
    at = {point.method: point for point in points}
    return [pair for line in lines for pair in pairwise(at[method] for method in line if method in at)]


def _taken(axes: Any, points: list[Point], lines: Sequence[Sequence[str]]) -> list[Box]:
    """Boxes that no name may cover: markers, error bars, and lines."""
    panel, boxes = Box(*axes.get_window_extent().extents), []
    for pair in _joined(points, lines):
        start, end = axes.transData.transform([(point.x, point.y) for point in pair]).tolist()
        boxes += along(start, end)
    for point in points:
        x, y = map(float, axes.transData.transform((point.x, point.y)))
        low = axes.transData.transform((point.x - point.x_spread, point.y - point.y_spread))
        high = axes.transData.transform((point.x + point.x_spread, point.y + point.y_spread))
        boxes += [
            Box(x - 11, y - 11, x + 11, y + 11),
            Box(low[0], y - 2, high[0], y + 2),
            Box(x - 2, low[1], x + 2, high[1]),
        ]
        if point.method == "base":
            boxes += [Box(panel.left, y - 3, panel.right, y + 3), Box(x - 3, panel.bottom, x + 3, panel.top)]
    return boxes


def _percent(value: float, _position: int) -> str:
    return f"{100 * value:g} %"


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def _scale(axes: Any, key: str, points: list[Point]) -> None:
    least = min(0.0, *(point.x - point.x_spread for point in points))
    most = max(point.x + point.x_spread for point in points)
    linear_to = _LINEAR_TO.get(key)
    sizes = [abs(point.x) for point in points if point.method != "base"]
    # on a linear axis, half of the methods would be in the first fifth
    squeezed = bool(sizes) and statistics.median_low(sizes) < max(sizes) / 5
    if linear_to is not None and squeezed and most > linear_to:
        axes.set_xscale("symlog", linthresh=linear_to, linscale=0.6)
        axes.set_xlim(min(-0.2 * linear_to, 1.2 * least), 4 * most)
    else:
        span = (most - least) or 1.0
        axes.set_xlim(least - (0.25 if len(points) > _MANY else 0.06) * span, most + 0.25 * span)
        if linear_to is None:
            axes.set_xticks([tick for tick in axes.get_xticks() if least <= tick <= 1])
