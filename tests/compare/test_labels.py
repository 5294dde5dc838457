from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from sparsemem.compare.figure import Box, along, place_labels

# figures are drawn
pytestmark = pytest.mark.slow

NAMES = [f"a-long-method-{i}" for i in range(12)]


def placed(points, taken=lambda axes: []):
    figure = Figure(figsize=(5, 4.8), dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    markers = [Box(x - 11, y - 11, x + 11, y + 11) for x, y in axes.transData.transform(points)]
    names = NAMES[: len(points)]
    place_labels(axes, names, points, [*markers, *taken(axes)], "#222222")
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert [label.get_text() for label in labels] == names
    for label in labels:
        label.update_positions(figure.canvas.get_renderer())
    # the text alone, without the line to its point
    boxes = [Box(*Text.get_window_extent(label).extents) for label in labels]
    return axes, labels, boxes, markers


@pytest.mark.parametrize("seed", range(3))
def test_names_cover_no_name_and_no_point(seed):
    points = np.random.default_rng(seed).uniform(0.25, 0.75, size=(12, 2)).tolist()
    axes, _, boxes, markers = placed(points)
    inside = Box(*axes.get_window_extent().extents)
    assert all(a.overlap(b) == 0 for a, b in combinations(boxes, 2))
    assert all(box.overlap(marker) == 0 for box in boxes for marker in markers)
    assert all(
        box.overlap(inside) == pytest.approx((box.right - box.left) * (box.top - box.bottom)) for box in boxes
    )


def test_a_name_stands_to_the_right_and_moves_off_an_error_bar():
    point = [(0.5, 0.5)]
    _, _, (free,), (marker,) = placed(point)
    assert free.left > marker.right
    assert free.bottom < (marker.bottom + marker.top) / 2 < free.top

    def bar(axes):
        (_, y), (low, _), (high, _) = axes.transData.transform([(0.5, 0.5), (0.3, 0.5), (0.7, 0.5)])
        return [Box(low, y - 2, high, y + 2)]

    axes, _, (moved,), _ = placed(point, bar)
    assert moved.overlap(bar(axes)[0]) == 0


def test_a_name_moves_off_the_line_that_joins_two_points():
    points = [(0.4, 0.5), (0.6, 0.5)]

    def line(axes):
        return along(*axes.transData.transform(points).tolist())

    axes, _, boxes, _ = placed(points, line)
    assert len(line(axes)) > 10
    assert all(box.overlap(part) == 0 for box in boxes for part in line(axes))


def test_no_name_stands_on_the_line_of_another():
    points = [(0.5 + 0.012 * i, 0.5 + 0.03 * (i % 2)) for i in range(6)]
    axes, labels, boxes, _ = placed(points)
    at = axes.transData.transform(points).tolist()
    led = [i for i, label in enumerate(labels) if label.arrow_patch is not None]
    assert led
    for i in led:
        middle = (boxes[i].left + boxes[i].right) / 2, (boxes[i].bottom + boxes[i].top) / 2
        for j, box in enumerate(boxes):
            assert i == j or all(box.overlap(part) == 0 for part in along(at[i], middle))


def test_a_name_that_went_far_has_a_line_to_its_point():
    alone = placed([(0.5, 0.5)])[1]
    assert alone[0].arrow_patch is None
    crowd = placed([(0.5 + 0.004 * i, 0.5) for i in range(12)])[1]
    assert any(label.arrow_patch is not None for label in crowd)
