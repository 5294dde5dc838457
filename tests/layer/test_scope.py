from dataclasses import replace

import pytest
import torch

from sparsemem.layer.facts import FACT_TENSORS
from sparsemem.layer.scope import KNOWN_WEIGHT, fact_scope
from sparsemem.layer.space import whiten
from tiny import facts_with, scope_of


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


def test_facts_join_and_leave():
    centres = scope_of(torch.eye(4)[:2], [0.5, 0.5], [0.6, 0.6])
    facts = facts_with([[5, 6], [7]], torch.eye(2), [(0, [3, 4]), (1, [9])])
    both = centres.joined(fact_scope(centres.space, facts))
    alone = replace(both, facts=facts.chosen(torch.tensor([False, True])))
    assert torch.equal(alone.facts.answers, torch.tensor([7]))
    assert torch.equal(alone.facts.names, torch.tensor([[2, 9]]))
    left = both.without(fact_scope(centres.space, facts))
    assert torch.equal(left.centres, centres.centres)
    assert len(left.facts) == len(left.facts.names) == len(left.facts.rows) == 0
    other = both.without(centres)
    assert all(torch.equal(a, b) for a, b in zip(vars_of(other.facts), vars_of(facts), strict=True))
    with pytest.raises(ValueError, match="not in the scope"):
        centres.without(fact_scope(centres.space, facts))


def vars_of(facts):
    return [getattr(facts, key) for key in FACT_TENSORS]
