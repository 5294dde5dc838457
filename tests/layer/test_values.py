import pytest
import torch

from sparsemem.layer.values import ReadLog, naive_read_rows, read_rows


def _case(tokens=7, reads=6, num_slots=11, width=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_slots, width, generator=generator).to(dtype)
    slots = torch.randint(0, num_slots, (tokens, reads), generator=generator)
    weights = torch.rand(tokens, reads, generator=generator)
    return values, slots, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 700])
# gradients by a matrix product and by embedding_bag; a bfloat16 table is cast, or gathered if there are few
# tokens
@pytest.mark.parametrize(("num_slots", "reads"), [(11, 32), (1100, 32), (1100, 4)])
def test_read_equals_naive_in_value_and_gradients(dtype, tokens, num_slots, reads):
    """Law 3: fp32 tolerance 1e-5; a bfloat16 table differs only in the rounding of its gradient."""
    values, slots, weights = _case(tokens=tokens, reads=reads, num_slots=num_slots, dtype=dtype)
    grads = []
    for read in (read_rows, naive_read_rows):
        # the naive version sums a bfloat16 table's gradient in float32, so that only the last rounding
        # differs
        v = (values if read is read_rows else values.float()).clone().requires_grad_()
        w = weights.clone().requires_grad_()
        out = read(v, slots, w)
        (out * torch.arange(values.shape[1])).sum().backward()
        grads.append((out.detach(), v.grad, w.grad))
    (out, dv, dw), (out_n, dv_n, dw_n) = grads
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, out_n, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, dw_n, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dv.float(), dv_n, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-3)


def test_a_second_derivative_is_refused():
    values, slots, weights = _case()
    weights.requires_grad_()
    (first,) = torch.autograd.grad(
        read_rows(values, slots, weights).square().sum(), weights, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("counted", [None, torch.arange(70) % 3 > 0])
def test_an_unread_log_stays_bounded_and_exact(counted):
    values, slots, weights = _case(tokens=70, num_slots=40)
    values.requires_grad_()
    log, kept, sizes = ReadLog(), ReadLog(apart=True), []
    for number in range(20):
        for one in (log, kept):
            (read_rows(values, slots, weights, one, counted) * number).sum().backward()
        sizes.append(len(log.entries))
    assert max(sizes) < 3
    assert len(kept.entries) == 20
    assert torch.equal(log.counts(40, values.device), kept.counts(40, values.device))
    torch.testing.assert_close(log.table_gradient(values), kept.table_gradient(values))
    log.clear()
    assert not log.counts(40, values.device).any()
    assert not log.table_gradient(values).any()


def test_log_holds_the_gradient_that_the_table_does_not_get():
    values, slots, weights = _case()
    dense = values.clone().requires_grad_()
    naive_read_rows(dense, slots, weights).square().sum().backward()
    logged, log = values.clone().requires_grad_(), ReadLog()
    read_rows(logged, slots, weights, log).square().sum().backward()

    assert logged.grad is None
    rows = torch.tensor([0, 3, 10])
    torch.testing.assert_close(log.row_gradients(rows, values), dense.grad[rows])
    assert log.counts(11, values.device).tolist() == torch.bincount(slots.flatten(), minlength=11).tolist()


def test_counts_leave_out_padding_and_evaluation():
    values, slots, weights = _case(tokens=4)
    values.requires_grad_()
    log = ReadLog()
    with torch.no_grad():
        read_rows(values, slots, weights, log)
    assert log.entries == []
    counted = torch.tensor([True, False, True, False])
    read_rows(values, slots, weights, log, counted).sum().backward()
    expected = torch.bincount(slots[counted].flatten(), minlength=11)
    assert log.counts(11, values.device).tolist() == expected.tolist()


def test_row_gradients_of_unread_rows_are_zero():
    values, slots, weights = _case(num_slots=50)
    values.requires_grad_()
    log = ReadLog()
    read_rows(values, slots, weights, log).sum().backward()
    unread = torch.tensor(sorted(set(range(50)) - set(slots.flatten().tolist()))[:4])
    assert not log.row_gradients(unread, values).any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_sorted_reads_give_the_counts_and_gradients_of_all_slots(masked, passes):
    values, slots, weights = _case(tokens=20, num_slots=2000)
    values.requires_grad_()
    log, dense = ReadLog(), ReadLog()
    counted = torch.arange(20) % 3 > 0 if masked else None
    for number in range(passes):
        for one in (log, dense):
            read_rows(values, slots.roll(number, 0), weights, one, counted).square().sum().backward()
    by_slot, counts = log.sorted_reads(2000), dense.counts(2000, values.device)
    assert not by_slot.fetch(torch.tensor([0]))
    assert by_slot.fetch(torch.tensor([1]))
    assert torch.equal(by_slot.slots, counts.nonzero().flatten())
    assert torch.equal(by_slot.counts, counts[by_slot.slots])
    # rows that only padding reads, and rows that nothing reads, too
    rows = torch.randperm(2000)
    torch.testing.assert_close(log.row_gradients(rows, values), dense.row_gradients(rows, values))
    assert log.row_gradients(rows[:0], values).shape == (0, 5)


def test_reads_are_not_sorted_where_counts_of_all_slots_are_fewer():
    values, slots, weights = _case(tokens=20, reads=6, num_slots=120)
    values.requires_grad_()
    log = ReadLog()
    assert log.sorted_reads(120) is None
    read_rows(values, slots, weights, log).sum().backward()
    assert log.sorted_reads(120) is None
    assert log.sorted_reads(121) is not None
