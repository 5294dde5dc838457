from dataclasses import replace

import pytest
import torch

from sparsemem.layer.scope import KNOWN_WEIGHT, whiten
from tiny import scope_of


def test_gate_is_exactly_zero_below_lo_and_one_above_hi():
    scope = scope_of(torch.eye(3)[:1], [0.6], [0.9])
    g = scope.gate(torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.8, 0.6, 0]]))
    assert g[0] == 1
    assert g[1] == 0
    assert g[2] == pytest.approx((0.8 - 0.6) / 0.3, abs=1e-5)


def test_similarity_to_known_states_lowers_the_gate():
    state = torch.tensor([[0.8, 0.6, 0.0]])
    open_scope = scope_of(torch.eye(3)[:1], [0.0], [1.0])
    with_known = scope_of(torch.eye(3)[:1], [0.0], [1.0], known=torch.eye(3)[1:])
    assert with_known.gate(state).item() == pytest.approx(
        open_scope.gate(state).item() - KNOWN_WEIGHT * 0.6, abs=1e-6
    )


def test_joined_scopes_can_be_separated_again():
    centres = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    first, second = (
        scope_of(centres[:2], [0.1, 0.1], [0.5, 0.5]),
        scope_of(centres[2:], [0.3, 0.3], [0.6, 0.6]),
    )
    both, states = first.joined(second), torch.randn(20, 8)
    torch.testing.assert_close(both.gate(states), torch.maximum(first.gate(states), second.gate(states)))
    for part, rest in ((first, second), (second, first)):
        left = both.without(part)
        assert torch.equal(left.centres, rest.centres)
        assert torch.equal(left.lo, rest.lo)
    assert first.without(first) is None
    with pytest.raises(ValueError, match="not in the scope"):
        first.without(second)


def test_whitened_states_have_unit_length():
    z = whiten(torch.randn(9, 5) * 100, torch.ones(5), torch.eye(5))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(9))


def test_the_nearest_open_centre_speaks_and_the_last_of_equals():
    centres = torch.eye(4)[[0, 1, 1, 2]]
    rows = torch.arange(12.0).view(4, 3)
    scope = replace(scope_of(centres, torch.full((4,), 0.5), torch.full((4,), 0.6)), rows=rows)
    states = torch.tensor([[1.0, 0.2, 0, 0], [0.2, 1.0, 0, 0], [0, 0, 1.0, 0.9], [0, 0, 0.1, 1.0]])
    assert torch.equal(scope.own_read(states), torch.stack([rows[0], rows[2], rows[3], torch.zeros(3)]))


def test_rows_join_and_leave_with_their_centres():
    thresholds = torch.full((2,), 0.5), torch.full((2,), 0.6)
    plain = scope_of(torch.eye(4)[:2], *thresholds)
    owned = replace(scope_of(torch.eye(4)[2:], *thresholds), rows=torch.ones(2, 3))
    both = plain.joined(owned)
    assert torch.equal(both.rows, torch.cat([torch.zeros(2, 3), torch.ones(2, 3)]))
    left, other = both.without(owned), both.without(plain)
    assert left.rows.shape == (0, 0)
    assert torch.equal(other.rows, owned.rows)
