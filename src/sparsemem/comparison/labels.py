"""Place names beside the points of a figure so that they cover no point, error bar or other name.

Choices: all positions are in pixels, and the layout of the figure must be final. For each name, places in
rings around its point are tried, and the cheapest is chosen. A place costs more if it covers something or if
another point is nearer. Several rounds let the first names move for later ones. A name far from its point
gets a line to it.
"""

import math
from collections.abc import Sequence
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
            others = [place.box for j, place in enumerate(chosen) if j != i and place is not None]
            chosen[i] = min(places, key=lambda place: place.cost + _covered(place.box, others))
    for name, (x, y), at, place in zip(names, points, pixels, chosen, strict=True):
        assert place is not None
        middle = ((place.box.left + place.box.right) / 2, (place.box.bottom + place.box.top) / 2)
        offset = tuple((m - a) / scale for m, a in zip(middle, at, strict=True))
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


def _covered(box: Box, others: Sequence[Box]) -> float:
    """Cost of covering other boxes: 1 for each, plus 60 times the covered share of this box's area."""
    area = (box.right - box.left) * (box.top - box.bottom)
    overlaps = [overlap for other in others if (overlap := box.overlap(other))]
    return len(overlaps) + 60 * sum(overlaps) / area
