import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.layer.product_keys import best_pairs, best_sub_keys, sub_key_scores


def top_k_slots(scores, top_k):
    num_keys = scores.shape[-1]
    return best_pairs(*scores.topk(min(top_k, num_keys), dim=-1), num_keys, top_k)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_top_k_equals_exhaustive_top_k(data):
    """Law 4. The scores are compared, because ties may differ in index."""
    num_keys = data.draw(st.integers(2, 17))
    top_k = data.draw(st.integers(1, min(40, num_keys**2)))
    heads, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    scores = torch.randn(tokens, heads, 2, num_keys, generator=generator)
    if data.draw(st.booleans()):
        # rounding makes ties, as in bfloat16
        scores = scores.round(decimals=1)

    slots, best = top_k_slots(scores, top_k)
    sums = (scores[..., 0, :, None] + scores[..., 1, None, :]).flatten(-2)
    expected = sums.topk(top_k, dim=-1).values

    torch.testing.assert_close(best, expected, rtol=0, atol=0)
    assert slots.shape == (tokens, heads, top_k)
    assert all(len(set(row)) == top_k for row in slots.flatten(0, 1).tolist())
    torch.testing.assert_close(sums.gather(-1, slots), best, rtol=0, atol=0)


def test_slot_is_first_sub_key_times_num_keys_plus_second():
    scores = torch.tensor([[[[0.0, 5.0, 1.0], [0.0, 1.0, 7.0]]]])
    slots, best = top_k_slots(scores, 1)
    assert slots.item() == 1 * 3 + 2
    assert best.item() == 12.0


@pytest.mark.parametrize("width", [1, 3, 20])
def test_sub_key_scores_are_inner_products_plus_bias(width):
    queries, keys, bias = torch.randn(4, 2, 2, width), torch.randn(2, 2, 5, width), torch.randn(2, 2, 5)
    scores = sub_key_scores(queries, keys, bias)
    expected = queries[3, 1, 0] @ keys[1, 0, 4] + bias[1, 0, 4]
    torch.testing.assert_close(scores[3, 1, 0, 4], expected)


@pytest.mark.parametrize("num_best", [1, 4, 9])
def test_the_gradient_of_queries_from_the_best_sub_keys_is_that_from_all(num_best):
    """Law 3: values bit for bit, gradients to 1e-6."""
    keys, bias = torch.randn(3, 2, 9, 5), torch.randn(3, 2, 9)
    ours, naive = (torch.randn(7, 3, 2, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    best, sub_keys = best_sub_keys(ours.requires_grad_(), keys, bias, num_best)
    expected, same = sub_key_scores(naive.requires_grad_(), keys, bias).topk(num_best, dim=-1)
    assert torch.equal(best, expected)
    assert torch.equal(sub_keys, same)
    out = torch.randn_like(best)
    best.backward(out)
    expected.backward(out)
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-6, atol=1e-6)


def test_keys_that_train_get_a_gradient():
    queries, keys = torch.randn(7, 3, 2, 5), torch.randn(3, 2, 9, 5, requires_grad=True)
    best, _ = best_sub_keys(queries.requires_grad_(), keys, torch.zeros(3, 2, 9), 2)
    best.sum().backward()
    assert keys.grad.any()
    assert queries.grad.any()
