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
