import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemem import Background, select_rows


def _background(counts, df, num_batches=10):
    as_int = {"layer": torch.tensor(counts)}, {"layer": torch.tensor(df)}
    return Background.from_counts(*as_int, num_batches)["layer"]


def test_tfidf_and_kl_equal_their_formulas():
    counts = torch.tensor([4, 0, 3, 2, 1])
    background = _background([100, 5, 0, 50, 1], [10, 2, 0, 9, 1])
    p = [c / 10 for c in (4, 0, 3, 2, 1)]
    tfidf = [p[i] * math.log(11 / (df + 1)) for i, df in enumerate((10, 2, 0, 9, 1))]
    q = [(b + 1) / 161 for b in (100, 5, 0, 50, 1)]
    kl = [p[i] * math.log((p[i] + 1e-8) / (q[i] + 1e-8)) for i in range(5)]
    for rule, scores in (("tfidf", tfidf), ("kl", kl)):
        expected = sorted((i for i in range(5) if i != 1), key=lambda i: -scores[i])
        assert select_rows(counts, background, top_t=4, rule=rule).tolist() == expected


def test_among_equal_scores_the_lowest_slot_is_selected():
    assert select_rows(torch.tensor([0, 2, 2, 2, 5]), top_t=3, rule="tf").tolist() == [4, 1, 2]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 40))
def test_unread_slots_are_never_selected(counts, top_t):
    counts = torch.tensor(counts)
    background = _background([1] * len(counts), [1] * len(counts))
    for rule in ("kl", "tfidf", "tf", "random", lambda c, b: -c.double()):
        rows = select_rows(counts, background, top_t=top_t, rule=rule)
        assert len(rows) == min(top_t, int((counts > 0).sum()))
        assert rows.dtype == torch.int64
        assert len(set(rows.tolist())) == len(rows)
        assert bool((counts[rows] > 0).all())


def test_grad_takes_the_largest_norms():
    norms = torch.tensor([9.0, 1.0, 5.0, 7.0])
    rows = select_rows(torch.tensor([0, 1, 1, 1]), top_t=2, rule="grad", gradient_norms=norms)
    assert rows.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_t": 0}, "top_t=0"),
        ({"top_t": 1.5}, "top_t=1.5"),
        ({"top_t": 1, "rule": "best"}, "rule='best' must be one of"),
        ({"top_t": 1, "rule": "kl"}, "needs background="),
        ({"top_t": 1, "rule": "grad"}, "gradient_norms"),
        ({"top_t": 1, "rule": lambda c, b: c[:1]}, "returned shape"),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        select_rows(torch.tensor([1, 2]), **options)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 10))
def test_the_best_are_those_of_a_stable_sort_of_all(counts, top_t):
    counts = torch.tensor(counts)
    by_sort = sorted((i for i in range(len(counts)) if counts[i]), key=lambda i: -counts[i])
    assert select_rows(counts, top_t=top_t, rule="tf").tolist() == by_sort[:top_t]


def test_an_undefined_norm_counts_as_the_largest():
    norms = torch.tensor([3.0, math.nan, 5.0, math.inf, 1.0])
    for top_t in (1, 3):
        rows = select_rows(torch.ones(5, dtype=torch.int64), top_t=top_t, rule="grad", gradient_norms=norms)
        assert rows.tolist() == [1, 3, 2][:top_t]
