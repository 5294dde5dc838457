import pytest
import torch

from sparsemem.background.fitting import k_means, thresholds, whitening
from tiny import scope_of


def test_whitening_makes_the_covariance_the_identity():
    mixing = torch.eye(6) + 0.3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5000, 6) @ mixing + 3
    w = whitening(x.T.cov())
    z = (x - x.mean(0)) @ w.T
    torch.testing.assert_close(z.T.cov(), torch.eye(6), atol=2e-2, rtol=0)


def test_whitening_of_a_degenerate_covariance_is_finite():
    assert whitening(torch.zeros(4, 4)).isfinite().all()
    assert whitening(torch.ones(4, 4)).isfinite().all()


def _around(axis, number, noise, seed=0):
    spread = noise * torch.randn(number, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(torch.eye(16)[axis] + spread, dim=-1)


def _fitted(taught, example, known, general, width=1.0):
    return thresholds(taught, example, taught, known, torch.ones(len(known)).bool(), general, 0.98, width)


def test_thresholds_lie_between_known_and_taught_states():
    taught, known, general = _around(0, 30, 0.1), _around(1, 50, 0.3, seed=1), _around(2, 200, 0.3, seed=2)
    example = torch.arange(30)
    lo, hi, separable = _fitted(taught, example, known, general)
    assert separable
    assert lo < hi < 1
    scope = scope_of(taught, [lo] * 30, [hi] * 30, known)
    assert (scope.gate(taught) == 1).float().mean() >= 0.95
    assert (scope.gate(known) > 0).float().mean() <= 0.04
    assert (scope.gate(general) > 0).sum() <= 1

    mixed = torch.nn.functional.normalize(torch.randn(30, 16), dim=-1)
    assert not _fitted(mixed, example, mixed + 0.0, general)[2]


def test_general_text_raises_lo():
    taught, known = _around(0, 30, 0.1), _around(1, 50, 0.1)
    example, near = torch.arange(30), _around(0, 100, 0.9, seed=2)
    far, close = (_fitted(taught, example, known, text)[0] for text in (known, near))
    assert close > far
    scope = scope_of(taught, [close] * 30, [2.0] * 30, known)
    assert (scope.gate(near) > 0).sum() <= 1


def test_one_example_gives_no_warning():
    """With only one example, the score of an unseen wording cannot be estimated."""
    taught, known = _around(0, 3, 0.05), _around(1, 50, 0.3, seed=1)
    lo, hi, separable = _fitted(taught, torch.zeros(3).long(), known, known)
    assert separable
    assert lo < hi < 1


def test_hi_is_always_above_lo():
    """hi == lo would make the gate NaN."""
    taught, known = _around(0, 30, 1e-4), _around(0, 50, 1e-4, seed=1)
    for own in (known, taught):
        lo, hi, _ = _fitted(taught, torch.arange(30), own, own)
        gate = scope_of(taught, [lo] * 30, [hi] * 30, own).gate(taught)
        assert gate.isfinite().all()


@pytest.mark.parametrize(("n", "k"), [(200, 8), (5, 8), (8, 8)])
def test_k_means_is_deterministic_and_its_centroids_differ(n, k):
    points = torch.randn(n, 3)
    runs = [k_means(points, k, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*runs)
    assert len(runs[0].unique(dim=0)) == k


def test_k_means_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0], [50, 0], [0, 50]])
    points = (centres[:, None] + 0.1 * torch.randn(3, 40, 2)).flatten(0, 1)
    found = k_means(points, 3, torch.Generator().manual_seed(0))
    assert (torch.cdist(centres, found).min(1).values < 1).all()
