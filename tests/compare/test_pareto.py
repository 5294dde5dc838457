import io

import numpy as np
import pytest
from PIL import Image

from sparsemem.compare.figure import method_style, pareto_figure

# figures are drawn
pytestmark = pytest.mark.slow

ARMS = (
    "base", "replacement-kl", "replacement-tfidf", "additive-kl", "additive-tfidf", "additive-scale-kl",
    "additive-scale-tfidf", "calibrated-kl", "smf", "smf-open", "lora", "full",
)  # fmt: skip
ROWS = [
    {"method": method, "medmcqa": 0.34 + 0.005 * i, "wikitext": 13.0 + 0.4 * i, "triviaqa": 0.26 - 0.01 * i}
    for i, method in enumerate(ARMS)
]


def draw(rows, learnt=("medmcqa",), lost=("wikitext", "triviaqa"), lines=()):
    with Image.open(io.BytesIO(pareto_figure(rows, learnt=learnt, lost=lost, lines=lines))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def has(image, colour):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((image == wanted).all(axis=-1).any())


def test_a_dozen_methods_look_different():
    assert len({method_style(method) for method in ARMS}) == len(ARMS)


def test_a_method_looks_the_same_whatever_else_is_drawn():
    assert method_style("additive-kl")[:2] == method_style("additive-tfidf")[:2]
    assert method_style("additive-kl")[2]
    assert not method_style("additive-tfidf")[2]
    assert method_style("rehearsal") == method_style("rehearsal")
    for rows in (ROWS, [ROWS[0], ROWS[10]]):
        assert has(draw(rows), method_style("lora")[0])


def test_each_way_of_losing_is_a_panel():
    one = draw(ROWS, lost=("wikitext",)).shape[1]
    two = draw(ROWS, lost=("wikitext", "triviaqa")).shape[1]
    assert two > 1.7 * one
    assert draw(ROWS, lost=("wikitext", "unread")).shape[1] == one


def test_the_first_figure_there_is_counts_as_learnt():
    rows = [{**row, "recall_train": 0.5} for row in ROWS]
    first = draw(rows, learnt=("recall_heldout", "medmcqa", "recall_train"))
    assert np.array_equal(first, draw(rows, learnt=("medmcqa",)))
    assert not np.array_equal(first, draw(rows, learnt=("recall_train",)))


def test_losses_are_taken_against_the_base():
    worse = [ROWS[0], {**ROWS[10], "wikitext": 13.0 * 1.5}]
    scaled = [{**row, "wikitext": 2 * row["wikitext"]} for row in worse]
    assert np.array_equal(draw(worse, lost=("wikitext",)), draw(scaled, lost=("wikitext",)))
    moved = [{**row, "triviaqa": row["triviaqa"] + 0.25} for row in worse]
    assert np.array_equal(draw(worse, lost=("triviaqa",)), draw(moved, lost=("triviaqa",)))


def test_without_a_base_only_drift_can_be_drawn():
    rows = [{"method": "smf", "medmcqa": 0.4, "wikitext": 13.0, "drift": 0.1}]
    both = draw(rows, lost=("wikitext", "drift"))
    assert np.array_equal(both, draw(rows, lost=("drift",)))


@pytest.mark.parametrize(
    "rows", [[{"method": "base"}], [{"method": "base", "medmcqa": 0.3, "wikitext": 13.0}]]
)
def test_few_figures_are_drawn_too(rows):
    assert draw(rows).size


def test_points_of_one_method_are_joined():
    rows = [row for row in ROWS if row["method"] in ("base", "lora", "full")]
    apart, joined = draw(rows), draw(rows, lines=(("lora", "full"), ("lora", "not drawn")))
    colour = [int(method_style("lora")[0][i : i + 2], 16) for i in (1, 3, 5)]
    count = [(image == colour).all(axis=-1).sum() for image in (apart, joined)]
    assert count[1] > count[0] + 50
