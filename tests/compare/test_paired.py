"""The paired bootstrap against binomial quantiles, and against resampling the questions one by one."""

from math import comb, sqrt

import numpy as np
import pytest

from sparsemem.compare.results import against_base


def binomial_quantile(n, p, q):
    total = 0.0
    for k in range(n + 1):
        total += comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= q:
            return k
    raise AssertionError


@pytest.mark.parametrize(("n", "gained"), [(2, 1), (40, 10), (200, 30)])
def test_gains_alone_have_binomial_quantiles(n, gained):
    entry = against_base([False] * n, [[True] * gained + [False] * (n - gained)])
    assert entry["difference"] == gained / n
    assert entry["n"] == n
    for key, q in (("low", 0.025), ("high", 0.975)):
        # 10,000 resamples know the tail's share to about .0016
        around = {binomial_quantile(n, gained / n, q + shift) / n for shift in (-0.005, 0.0, 0.005)}
        assert min(around) <= entry[key] <= max(around)


def test_equals_resampling_the_questions():
    generator = np.random.default_rng(1)
    n = 300
    base = generator.random(n) < 0.4
    runs = [np.where(generator.random(n) < 0.2, ~base, base) for _ in range(3)]
    gains = np.mean(runs, axis=0) - base
    drawn = gains[generator.integers(0, n, size=(10_000, n))].mean(axis=1)
    entry = against_base(base.tolist(), [run.tolist() for run in runs])
    assert entry["difference"] == pytest.approx(gains.mean())
    tolerance = 0.15 * gains.std() / sqrt(n)
    assert [entry["low"], entry["high"]] == pytest.approx(
        np.quantile(drawn, (0.025, 0.975)).tolist(), abs=tolerance
    )


def test_pairing_sees_what_two_accuracies_do_not():
    """The same accuracy by the same answers is no difference for certain, by other answers it is not."""
    base = [True, False] * 50
    same = against_base(base, [base])
    assert (same["difference"], same["low"], same["high"]) == (0.0, 0.0, 0.0)
    other = against_base(base, [[not right for right in base]])
    assert other["difference"] == 0.0
    assert other["low"] < -0.1
    assert other["high"] > 0.1


def test_the_same_answers_give_the_same_interval():
    base, run = [False] * 50, [True] * 20 + [False] * 30
    assert against_base(base, [run]) == against_base(base, [run])
    assert against_base(base, [run]) == against_base(base, [run, run])


@pytest.mark.parametrize(("base", "runs"), [([], [[]]), ([True], []), ([True, True], [[True], [True, True]])])
def test_other_numbers_of_questions_are_refused(base, runs):
    with pytest.raises(ValueError, match="the same questions, at least one"):
        against_base(base, runs)
