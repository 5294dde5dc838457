"""A value table whose rows are spread over processes: process r holds the slots with slot % processes == r.

A design with tests, for tables that do not fit one machine's memory. No model uses it yet; see
docs/architecture.md. Every process has tokens of its own, and addresses are computed everywhere.

    read      slot ids and weights go to the owners (all-to-all); an owner sums its rows for each token of
              each process; the sums go back (all-to-all), and each process adds those of all owners
    backward  the gradient of the output goes to all owners; the gradient of weights comes back; counts and
              gradients of rows stay with the owner
    select    each owner offers its own top_t slots with their scores; all processes merge them alike

A step sends 2 N d numbers to each other process, and 3 numbers for each read. It never sends rows, counts of
all slots, or gradients of rows.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..background.background import LayerBackground
from .selection import Rule, best_rows, read_scores


class ShardedTable(nn.Module):
    """The rows that this process owns of one value table.

    Args:
        num_slots: of the whole table.
        rows: [n, d] float32, those of slots rank, rank + processes, rank + 2 * processes, ...
    """

    def __init__(self, num_slots: int, rows: Tensor) -> None:
        super().__init__()
        self.num_slots, self.rows = num_slots, nn.Parameter(rows)
        self.reads: list[_Received] = []

    def read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """As `values.read_rows`, [tokens, d]. All processes must call it, and `backward` of the result too.

        Args:
            slots: [tokens, reads] int64, of the whole table.
            weights: [tokens, reads] float32.
        """
        return _ShardedRead.apply(self.rows, weights, slots, self)  # type: ignore[return-value]

    def select(self, background: LayerBackground | None, *, top_t: int, rule: Rule) -> tuple[Tensor, Tensor]:
        """The rows that one step changes: the same as one process selects from all reads.

        Args:
            background: of this layer, with all slots.
            top_t, rule: as in `select_rows`; every rule that scores by counts.

        Returns:
            The selected slots of the whole table, ascending, [t] int64, the same in all processes; and the
            gradient [m, d] of those that this process owns, in the same order. The reads are cleared.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        owned = torch.cat([one.rows for one in self.reads])
        rows, counts = owned.unique(return_counts=True)
        total = counts.sum()
        dist.all_reduce(total)
        slots = rows * world + rank
        scores = read_scores(slots, counts, self.num_slots, background, rule, num_reads=total)
        best = best_rows(slots, scores, top_t)
        offered = torch.stack([best, scores[torch.searchsorted(slots, best)].view(torch.int64)])
        gathered = _exchange([offered.T.contiguous()] * world)
        slots, order = torch.cat([part[:, 0] for part in gathered]).sort()
        scores = torch.cat([part[:, 1] for part in gathered])[order].view(scores.dtype)
        chosen = best_rows(slots, scores, top_t).sort().values
        mine = chosen[chosen % world == rank] // world
        gradient = torch.zeros(len(mine), self.rows.shape[1])
        for one in self.reads:
            gradient += one.row_gradients(mine)
        self.reads.clear()
        return chosen, gradient


@dataclass
class _Received:
    """The reads that an owner received in one pass: one entry per read, process after process.

    Attributes:
        rows: [n] int64, rows of the owner.
        weights: [n] float32.
        bags: [n] int64, ascending: which token of which process, as an index into `grad_out`.
        grad_out: [all tokens, d], the gradient of the output of all processes' tokens.
    """

    rows: Tensor
    weights: Tensor
    bags: Tensor
    grad_out: Tensor

    def row_gradients(self, rows: Tensor) -> Tensor:
        """Gradient [m, d] of distinct rows, ascending."""
        here = torch.isin(self.rows, rows).nonzero().squeeze(1)
        place, order = torch.searchsorted(rows, self.rows[here]).sort(stable=True)
        reads = here[order]
        starts = torch.searchsorted(place, torch.arange(len(rows) + 1))
        options = {"per_sample_weights": self.weights[reads], "mode": "sum", "include_last_offset": True}
        return F.embedding_bag(self.bags[reads], self.grad_out, starts, **options)  # type: ignore[arg-type]


class _ShardedRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, slots, table):
        world, flat = dist.get_world_size(), slots.flatten()
        owner, order = (flat % world).sort(stable=True)
        sizes = torch.bincount(owner, minlength=world).tolist()
        asked = torch.stack([flat[order] // world, order // slots.shape[1]], 1)
        received = _exchange(list(asked.split(sizes)))
        received_weights = torch.cat(_exchange(list(weights.flatten()[order].split(sizes))))
        num_tokens = [int(one) for one in _exchange([torch.tensor([len(slots)])] * world)]
        firsts = torch.tensor([0, *num_tokens]).cumsum(0)
        bags = torch.cat([part[:, 1] + first for part, first in zip(received, firsts[:-1], strict=True)])
        asked_rows = torch.cat([part[:, 0] for part in received])
        starts = torch.searchsorted(bags, torch.arange(int(firsts[-1]) + 1))
        sums = _sums(asked_rows, rows, starts, received_weights)
        ctx.save_for_backward(rows, asked_rows, received_weights, bags, starts, order)
        ctx.table, ctx.received_sizes = table, [len(part) for part in received]
        return torch.stack(_exchange(list(sums.split(num_tokens)))).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        rows, asked_rows, received_weights, bags, starts, order = ctx.saved_tensors
        grad_out = torch.cat(_exchange([grad_outputs[0].contiguous()] * dist.get_world_size()))
        ctx.table.reads.append(_Received(asked_rows, received_weights, bags, grad_out))
        with torch.enable_grad():
            weights = received_weights.detach().requires_grad_()
            sums = _sums(asked_rows, rows.detach(), starts, weights)
            (gradient,) = torch.autograd.grad(sums, weights, grad_out)
        returned = torch.cat(_exchange(list(gradient.split(ctx.received_sizes))))
        grad_weights = torch.empty_like(returned)
        grad_weights[order] = returned
        return None, grad_weights.view(len(grad_outputs[0]), -1), None, None


def _sums(rows: Tensor, table: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    options = {"per_sample_weights": weights, "mode": "sum", "include_last_offset": True}
    return F.embedding_bag(rows, table, starts, **options)  # type: ignore[arg-type]


def _exchange(parts: list[Tensor]) -> list[Tensor]:
    """Send part r [n_r, ...] to process r. Returns what this process received, from first to last process."""
    lengths = torch.tensor([len(part) for part in parts])
    received = torch.empty_like(lengths)
    dist.all_to_all_single(received, lengths)
    sizes = received.tolist()
    out = parts[0].new_empty(sum(sizes), *parts[0].shape[1:])
    dist.all_to_all_single(out, torch.cat(parts), sizes, lengths.tolist())
    return list(out.split(sizes))
