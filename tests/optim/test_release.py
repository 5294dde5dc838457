"""The effect of each quirk of the authors' code, on one model and the same batches."""

import copy
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model

from sparsemem import RowAdamW, SparseMemoryConfig, memory_layers
from sparsemem.optim.release import QUIRKS, ReleaseAdamW
from tiny import SMALL, batch

OPTIONS = {"lr": 0.1, "top_t": 4, "rule": "tf", "moments": "element"}


@pytest.fixture
def model(tiny_llama):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
    for memory in memory_layers(model).values():
        memory.values.data.normal_()
    return model


def micro_batches(seed):
    whole = batch(seed)
    return [{key: value[i : i + 3] for key, value in whole.items()} for i in (0, 3)]


def steps(model, optimizer, num_steps=1):
    """For each step, the rows of the first memory layer that it changed."""
    memory, moved = next(iter(memory_layers(model).values())), []
    for seed in range(num_steps):
        before = memory.values.detach().clone()
        for part in micro_batches(seed):
            model(**part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(set((memory.values != before).any(1).nonzero().flatten().tolist()))
    return moved


def both(model, quirk, num_steps=1):
    plain = copy.deepcopy(model)
    as_written = steps(plain, RowAdamW(plain, **OPTIONS), num_steps)
    return as_written, steps(model, ReleaseAdamW(model, quirks=[quirk], **OPTIONS), num_steps)


def test_each_micro_batch_selects_its_own_rows(model):
    (plain,), (quirky,) = both(model, "micro-batch")
    assert len(plain) == 4
    assert 4 < len(quirky) <= 8


def test_a_micro_batch_gives_gradients_only_to_rows_it_selected(model):
    """The gradient of a row is the sum over the micro-batches that selected it."""
    optimizer = ReleaseAdamW(model, quirks=["micro-batch"], **OPTIONS)
    name, memory = next(iter(optimizer.layers.items()))
    parts, alone = micro_batches(0), {}
    for part in parts:
        model(**part).loss.backward()
        rows, gradient = optimizer._choose(name, memory, memory.log)
        alone |= {(id(part), int(row)): own for row, own in zip(rows, gradient, strict=True)}
        optimizer.zero_grad()
    for part in parts:
        model(**part).loss.backward()
    for row, gradient in zip(*optimizer._choose(name, memory, memory.log), strict=True):
        expected = sum(alone[key] for key in alone if key[1] == int(row))
        torch.testing.assert_close(gradient, expected)


def test_padding_counts_as_reads(model):
    """36 tokens read one row each, all different. All but three tokens are padding."""
    options = {**OPTIONS, "top_t": 36}
    moved = {}
    for quirks in ((), ("padding",)):
        optimizer = ReleaseAdamW(copy.deepcopy(model), quirks=quirks, **options)
        for memory in optimizer.layers.values():
            slots = torch.arange(36)[:, None]
            counted = torch.arange(36) < 3
            memory.log.add(slots, torch.ones(36, 1), torch.ones(36, memory.d_out), counted, 36)
        optimizer.step()
        moved[quirks] = {name: len(rows) for name, rows in optimizer.selected.items()}
    assert set(moved[()].values()) == {3}
    assert set(moved["padding",].values()) == {36}


def test_deselected_rows_continue_to_change(model):
    plain, quirky = both(model, "moments", num_steps=4)
    assert all(len(rows) <= 4 for rows in plain)
    assert all(before <= after for before, after in pairwise(quirky))
    assert len(quirky[-1]) > 4


def test_the_moments_quirk_equals_dense_adamw_with_masked_gradients(model):
    name, memory = next(iter(memory_layers(model).items()))
    table = torch.nn.Parameter(memory.values.detach().clone())
    dense = torch.optim.AdamW([table], lr=0.1, weight_decay=0.0)
    optimizer = ReleaseAdamW(model, quirks=["moments"], **OPTIONS)
    for seed in range(5):
        for part in micro_batches(seed):
            model(**part).loss.backward()
        rows, _ = optimizer._choose(name, memory, memory.log)
        table.grad = torch.zeros_like(table)
        table.grad[rows] = memory.log.row_gradients(rows, memory.values)
        dense.step()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(memory.values, table, rtol=1e-4, atol=1e-5)


def test_without_quirks_it_equals_row_adamw(model):
    plain = copy.deepcopy(model)
    steps(plain, RowAdamW(plain, **OPTIONS), 3)
    steps(model, ReleaseAdamW(model, quirks=[], **OPTIONS), 3)
    for name, memory in memory_layers(model).items():
        assert torch.equal(memory.values, memory_layers(plain)[name].values)


def test_an_unknown_quirk_is_refused(model):
    with pytest.raises(ValueError, match=r"quirks=\['x'\] may only contain 'micro-batch'"):
        ReleaseAdamW(model, quirks=["x"])
    assert QUIRKS == ("micro-batch", "padding", "moments")
