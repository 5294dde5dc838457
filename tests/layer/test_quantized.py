import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from sparsemem import RowAdamW, RowPatch, SparseMemoryConfig, memory_layers, quantize_rows
from sparsemem.layer.tables import LARGEST, QuantizedRows
from sparsemem.layer.values import naive_read_rows
from tiny import SMALL, tiny_batch, tiny_model


def _table(num_slots=30, d=8, written=11):
    table, sizes = torch.zeros(num_slots, d), torch.logspace(-6, 3, written)
    table[torch.randperm(num_slots)[:written]] = torch.randn(written, d) * sizes[:, None]
    return table


@pytest.mark.parametrize("bits", [8, 4])
def test_each_number_changes_by_at_most_half_a_scale(bits):
    table = _table()
    rows = QuantizedRows(table, bits).rows(torch.arange(30))
    scales = table.abs().amax(1, keepdim=True) / LARGEST[bits]
    assert bool(((rows - table).abs() <= scales * 0.5001).all())
    # the largest number of a row is kept, and a row of zeros too
    torch.testing.assert_close(rows.abs().amax(1), table.abs().amax(1))


@given(st.integers(1, 12), st.sampled_from([8, 4]))
def test_a_read_is_that_of_the_rows_as_stored(tokens, bits):
    stored, slots = QuantizedRows(_table(), bits), torch.randint(0, 30, (tokens, 5))
    weights = torch.rand(tokens, 5)
    expected = naive_read_rows(stored.rows(torch.arange(30)), slots, weights)
    torch.testing.assert_close(stored.read(slots, weights), expected)


def test_an_unwritten_row_takes_an_index_alone():
    table = torch.zeros(10_000, 64)
    table[::1000] = 1.0
    assert QuantizedRows(table, 8).num_bytes() == 4 * 10_000 + 11 * (64 + 4)
    assert QuantizedRows(table, 4).num_bytes() == 4 * 10_000 + 11 * (32 + 4)


def test_a_row_of_subnormal_numbers_becomes_zero():
    table = torch.full((2, 4), 1e-45)
    assert not QuantizedRows(table, 8).rows(torch.tensor([0, 1])).any()


@pytest.fixture(params=["last", "own"])
def model(request):
    model = get_peft_model(tiny_model(), SparseMemoryConfig(**SMALL, write=request.param))
    for memory in memory_layers(model).values():
        torch.nn.init.normal_(memory.values.data[:9])
    return model.eval()


@torch.no_grad()
def test_a_quantised_model_reads_and_does_nothing_else(model, tmp_path):
    before, twin = model(**tiny_batch()).logits, copy.deepcopy(model)
    stored = quantize_rows(model, 8)
    after = model(**tiny_batch()).logits
    for name, memory in memory_layers(twin).items():
        memory.values.copy_(stored[name].rows(torch.arange(memory.num_slots)))
    torch.testing.assert_close(after, twin(**tiny_batch()).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(after, before)
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="quantised already"):
        quantize_rows(model, 8)
    for use in (lambda: RowPatch.snapshot(model), lambda: RowAdamW(model, 0.1, rule="tf")):
        with pytest.raises((AttributeError, ValueError), match="quantised"):
            use()


def test_bad_numbers_of_bits_are_named(model):
    with pytest.raises(ValueError, match="bits=3 must be 8 or 4"):
        quantize_rows(model, 3)
    with pytest.raises(ValueError, match="even row width"):
        QuantizedRows(torch.ones(3, 5), 4)
    assert all(isinstance(memory.values, torch.nn.Parameter) for memory in memory_layers(model).values())
