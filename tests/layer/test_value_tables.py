import copy
import sys

import psutil
import pytest
import torch
from peft import get_peft_model

from sparsemem import Background, RowAdamW, RowPatch, SparseMemoryConfig, memory_layers
from sparsemem.background.background import LayerBackground
from sparsemem.layer.tables import copy_table, zero_table
from tiny import HIDDEN, SMALL, batch


def _grown(before):
    return psutil.Process().memory_info().rss - before


def test_a_table_is_an_ordinary_tensor_of_zeros():
    table = zero_table(50, 7)
    assert table.shape == (50, 7)
    assert not table.any()
    table[3] = 1
    twin = copy.deepcopy(torch.nn.Parameter(table))
    twin.data[4] = 2
    assert table.sum() == 7
    assert zero_table(2, 3).add_(1).sum() == 6


def test_a_copy_has_the_same_bytes():
    table = torch.zeros(9, 3)
    table[2], table[5, 1], table[7, 0] = -0.0, float("nan"), 1e-45
    for dtype in (torch.float32, torch.bfloat16):
        one = table.to(dtype)
        twin = copy_table(one)
        assert torch.equal(twin.view(torch.uint8), one.view(torch.uint8))
        twin[0] = 1
        assert not one[0].any()


def test_a_model_on_the_meta_device_has_its_table_there():
    with torch.device("meta"):
        assert zero_table(4, 4).is_meta


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count mapped memory in other ways")
def test_a_million_rows_train_in_the_memory_of_the_written_ones(tiny_llama):
    """A table of 1,048,576 x 16 float32 (64 MB) per layer; a step writes 40 rows."""
    small = {**SMALL, "num_keys": 1024, "write": "own", "layers_to_transform": [1, 2]}
    model = tiny_llama()
    before = psutil.Process().memory_info().rss
    model = get_peft_model(model, SparseMemoryConfig(**small))
    ones = torch.ones(1024**2, dtype=torch.int64)
    names = list(memory_layers(model))
    optimizer = RowAdamW(
        model, 0.1, top_t=40, background=Background({name: LayerBackground(ones, ones, 1) for name in names})
    )
    snapshot = RowPatch.snapshot(model)
    for seed in range(3):
        model(**batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    patch = RowPatch.diff(model, since=snapshot)
    assert all(len(patch.layers[name].slots) >= 40 for name in names)
    # two tables alone would take 2 * 64 MB, their copies as much again
    assert _grown(before) < 2 * 4 * 1024**2 * HIDDEN
