"""Time to read value rows and compute their gradients, compared with the plain version and with gathering.

    python benchmarks/reads.py docs/results/reads.json

Slots and weights are random. The methods take turns in one process, and the fastest run counts, because the
machine may be busy. `product` is one matrix product over all slots, `bag` is PyTorch's embedding_bag or its
backward pass, `gather` gathers the rows in pieces, `ours` is what the package chooses.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemem.atomic import write_json
from sparsemem.layer import values as room
from sparsemem.provenance import environment

NUM_RUNS = 4
# tokens, reads, num_slots, d
SHAPES = (
    (376, 1024, 1024, 576),
    (376, 1024, 4096, 576),
    (376, 256, 4096, 576),
    (376, 128, 1024, 576),
    (376, 64, 4096, 576),
    (376, 64, 16384, 896),
)
TOP_T = 512


def ways(tokens: int, reads: int, num_slots: int, d: int) -> dict[str, dict[str, Callable[[], Any]]]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(num_slots, d, generator=generator)
    half = table.bfloat16()
    slots = torch.randint(0, num_slots, (tokens, reads), generator=generator)
    weights = torch.rand(tokens, reads, generator=generator)
    grad = torch.randn(tokens, d, generator=generator)
    rows = torch.randperm(num_slots, generator=generator)[:TOP_T].sort().values
    every = torch.arange(num_slots)
    return {
        "read": {
            "ours": lambda: room.read_rows(table, slots, weights),
            "product": lambda: _spread(slots, weights, num_slots) @ table,
        },
        "read_bfloat16": {
            "ours": lambda: room.read_rows(half, slots, weights),
            "gather": partial(_pieces, room.naive_read_rows, half, slots, weights),
        },
        "gradient_of_weights": {
            "ours": lambda: room.weight_gradients(table, slots, grad),
            "product": lambda: (grad @ table.T).gather(1, slots),
            "bag": partial(_bag_weights, table, slots, grad),
            "gather": partial(_pieces, _gathered_weights, table, slots, grad),
        },
        "gradient_of_all_rows": {
            "ours": lambda: room.row_gradients(slots, weights, grad, every, num_slots),
            "product": lambda: _spread(slots, weights, num_slots).T @ grad,
            "bag": partial(_bag_rows, slots, weights, grad, num_slots),
            "gather": partial(_gathered_rows, slots, weights, grad, num_slots),
        },
        f"gradient_of_{TOP_T}_rows": {
            "ours": lambda: room.row_gradients(slots, weights, grad, rows, num_slots)
        },
    }


def _spread(slots: Tensor, weights: Tensor, num_slots: int) -> Tensor:
    return weights.new_zeros(len(slots), num_slots).scatter_add_(1, slots, weights)


def _pieces(one: Callable, table: Tensor, slots: Tensor, other: Tensor) -> Tensor:
    step = max(1, 16_384 // slots.shape[1])
    parts = zip(slots.split(step), other.split(step), strict=True)
    return torch.cat([one(table, s, o) for s, o in parts])


def _gathered_weights(table: Tensor, slots: Tensor, grad: Tensor) -> Tensor:
    return torch.einsum("trd,td->tr", table[slots], grad)


def _gathered_rows(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int) -> Tensor:
    out = grad.new_zeros(num_slots, grad.shape[1])
    step = max(1, 16_384 // slots.shape[1])
    for s, w, g in zip(slots.split(step), weights.split(step), grad.split(step), strict=True):
        out.index_add_(0, s.flatten(), (w[..., None] * g[:, None]).flatten(0, 1))
    return out


def _bag_rows(slots: Tensor, weights: Tensor, grad: Tensor, num_slots: int) -> Tensor:
    table = grad.new_zeros(num_slots, grad.shape[1]).requires_grad_()
    out = F.embedding_bag(slots, table, per_sample_weights=weights, mode="sum")
    return torch.autograd.grad(out, table, grad)[0]


def _bag_weights(table: Tensor, slots: Tensor, grad: Tensor) -> Tensor:
    weights = grad.new_zeros(slots.shape).requires_grad_()
    out = F.embedding_bag(slots, table, per_sample_weights=weights, mode="sum")
    return torch.autograd.grad(out, weights, grad)[0]


def measure() -> list[dict[str, Any]]:
    found = []
    for shape in SHAPES:
        seconds: dict[str, dict[str, float]] = {}
        for name, several in ways(*shape).items():
            seconds[name] = dict.fromkeys(several, float("inf"))
            for run in range(NUM_RUNS + 1):
                for way, work in several.items():
                    start = time.perf_counter()
                    work()
                    if run:
                        seconds[name][way] = min(seconds[name][way], time.perf_counter() - start)
        sizes = dict(zip(("tokens", "reads", "num_slots", "d"), shape, strict=True))
        found.append({**sizes, "slots_per_read": shape[2] / shape[1], "seconds": seconds})
    return found


if __name__ == "__main__":
    write_json(Path(sys.argv[1]), {"shapes": measure(), "runs": NUM_RUNS, **environment()})
