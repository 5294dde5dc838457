"""A table over two processes gives what one process with the whole table gives."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sparsemem import select_rows
from sparsemem.background.background import LayerBackground
from sparsemem.layer.log import ReadLog
from sparsemem.layer.values import read_rows
from sparsemem.optim.sharded import ShardedTable

NUM_SLOTS, D, READS, TOP_T = 101, 6, 5, 9
# the two processes have different numbers of tokens
TOKENS = (7, 4)


def case():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(NUM_SLOTS, D, generator=generator)
    # few distinct counts, so that many scores are equal
    slots = torch.randint(0, NUM_SLOTS, (2, sum(TOKENS), READS), generator=generator)
    weights, grad = torch.rand(2, sum(TOKENS), READS), torch.randn(2, sum(TOKENS), D, generator=generator)
    weights = torch.rand(weights.shape, generator=generator)
    counts = torch.randint(0, 3, (NUM_SLOTS,), generator=generator)
    return values, slots, weights, grad, LayerBackground(counts, counts, 4)


def sharded(rank, out):
    """Two micro-batches, then a selection, as one of the processes that the environment names."""
    dist.init_process_group("gloo")
    values, slots, weights, grad, background = case()
    found = {}
    for rule in ("kl", "tfidf", "tf"):
        table = ShardedTable(NUM_SLOTS, values[rank::2].clone())
        mine = slice(0, TOKENS[0]) if rank == 0 else slice(TOKENS[0], None)
        reads, gradients = [], []
        for part in range(2):
            w = weights[part, mine].clone().requires_grad_()
            y = table.read(slots[part, mine], w)
            y.backward(grad[part, mine])
            reads.append(y.detach())
            gradients.append(w.grad)
        chosen, gradient = table.select(background, top_t=TOP_T, rule=rule)
        assert table.rows.grad is None
        found[rule] = {"read": reads, "weights": gradients, "chosen": chosen, "gradient": gradient}
    torch.save(found, f"{out}.{rank}")


_WORKER = """
import os, sys
sys.path[:0] = {path!r}
from test_sharded_table import sharded
import torch.distributed as dist
sharded(int(os.environ["RANK"]), {out!r})
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    tests = Path(__file__).parents[1]
    sys.path.insert(0, str(tests))
    from test_processes import start

    folder = tmp_path_factory.mktemp("two")
    path = [str(tests), str(Path(__file__).parent)]
    workers = start(_WORKER.format(out=str(folder / "out"), path=path), folder, 2)
    assert [worker.wait(120) for worker in workers] == [0, 0]
    return [torch.load(folder / f"out.{rank}") for rank in range(2)]


@pytest.mark.parametrize("rule", ["kl", "tfidf", "tf"])
def test_two_processes_read_and_select_as_one(two, rule):
    values, slots, weights, grad, background = case()
    values.requires_grad_()
    log = ReadLog()
    first, second = (found[rule] for found in two)
    for part in range(2):
        w = weights[part].clone().requires_grad_()
        y = read_rows(values, slots[part], w, log)
        y.backward(grad[part])
        torch.testing.assert_close(torch.cat([first["read"][part], second["read"][part]]), y)
        torch.testing.assert_close(torch.cat([first["weights"][part], second["weights"][part]]), w.grad)
    counts = log.counts(NUM_SLOTS, values.device)
    rows = select_rows(counts, background, top_t=TOP_T, rule=rule).sort().values
    assert torch.equal(first["chosen"], rows)
    assert torch.equal(second["chosen"], rows)
    gradient = log.row_gradients(rows, values)
    for rank, found in enumerate((first, second)):
        torch.testing.assert_close(found["gradient"], gradient[rows % 2 == rank])
