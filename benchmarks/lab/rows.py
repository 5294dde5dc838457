"""Train rows of a tail memory on cached states, and measure their effect on the base model's answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from cache import States, base, kept
from gates import Gate
from torch import Tensor

from sparsemem.artifacts import fingerprint_tensors
from sparsemem.background.calibration import _set_addressing
from sparsemem.layer.memory import ProductKeyMemory

NUM_SLOTS, BETAS, EPS = 64 * 64, (0.9, 0.95), 1e-8


class Head:
    """The base model's final norm and head: in bfloat16 as in training, or exact."""

    def __init__(self) -> None:
        model = base()[0]
        self.norm, self.eps = model.model.norm.weight.detach(), model.model.norm.variance_epsilon
        self.exact = model.lm_head.weight.detach()
        self.fast = self.exact.bfloat16()

    def __call__(self, last: Tensor, *, exact: bool = False, of: Tensor | None = None) -> Tensor:
        """Logits [n, vocabulary] of last residuals [n, d]; `of`: bfloat16 head rows of chosen tokens."""
        u = last * torch.rsqrt(last.square().mean(-1, keepdim=True) + self.eps) * self.norm
        return F.linear(u, self.exact) if exact else F.linear(u.bfloat16(), self.fast if of is None else of)


class Vocabulary:
    """The tokens in the training loss, a tenth of all: labels, the most common tokens, the base model's most
    likely tokens, and tokens that the memory makes likely (searched with the whole head at intervals)."""

    def __init__(self, states: States, common: int) -> None:
        parts = [self._likely(part) for part in states.last.split(256)]
        self.tokens = torch.cat([states.label.clamp_min(0), *parts, torch.arange(common)]).unique()
        self.take(states)

    def take(self, states: States) -> None:
        self.rows = head().fast[self.tokens].contiguous()
        self.label = torch.searchsorted(self.tokens, states.label)

    @torch.no_grad()
    def grow(self, hidden: Tensor, states: States) -> None:
        """Add the tokens that are most likely at these last residuals."""
        tokens = torch.cat([self.tokens, self._likely(hidden)]).unique()
        if len(tokens) > len(self.tokens):
            self.tokens = tokens
            self.take(states)

    @torch.no_grad()
    def _likely(self, last: Tensor) -> Tensor:
        return head()(last).topk(32).indices.flatten().unique()


def vocabulary(states: States, common: int) -> Vocabulary:
    return kept("vocabulary", [fingerprint(states), common], lambda: Vocabulary(states, common))


def fingerprint(states: States) -> str:
    return fingerprint_tensors(states.last, states.label)


@cache
def head() -> Head:
    return Head()


def addressing(name: str, layer: int, seen: Callable[[], Any], seed: int) -> ProductKeyMemory:
    """A memory whose query and keys are calibrated on the background's states of a layer."""

    def make() -> dict[str, Tensor]:
        memory = _empty()
        with torch.no_grad():
            _set_addressing(memory, seen(), seed)
        return {key: getattr(memory, key).detach() for key in ("query", "query_bias", "keys", "key_bias")}

    memory = _empty()
    for key, value in kept(f"keys-{name}-{layer}", [seed], make).items():
        getattr(memory, key).data.copy_(value)
    return memory


def _empty() -> ProductKeyMemory:
    return ProductKeyMemory(576, 576, num_keys=64, num_heads=16, top_k=64, key_dim=64)


@torch.no_grad()
def address(memory: ProductKeyMemory, states: Tensor) -> tuple[Tensor, Tensor]:
    """Slots int16 and weights float32 [n, reads]."""
    parts = [memory.address(part) for part in states.split(512)]
    if not parts:
        return torch.zeros(0, 1024, dtype=torch.int16), torch.zeros(0, 1024)
    return torch.cat([p[0].short() for p in parts]), torch.cat([p[1] for p in parts])


def spread(slots: Tensor, weights: Tensor) -> Tensor:
    """[n, slots] of [n, reads]."""
    return weights.new_zeros(len(slots), NUM_SLOTS).scatter_add_(1, slots.long(), weights)


@dataclass
class Table:
    """One value table with RowAdamW's state: a moment per row, one second moment for the table."""

    values: Tensor
    moment: Tensor = field(init=False)
    steps: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.moment = torch.zeros_like(self.values)
        self.steps = torch.zeros(len(self.values), 1)
        self.second = torch.zeros(2)

    def step(self, rows: Tensor, gradient: Tensor, lr: float) -> None:
        """Reference: `optim.RowAdamW`, moments "table"."""
        self.steps[rows] += 1
        moment = torch.lerp(self.moment[rows], gradient, 1 - BETAS[0])
        self.moment[rows] = moment
        new = torch.stack([gradient.square().mean(), torch.ones(())])
        self.second += (new - self.second) * (1 - BETAS[1])
        scale = (self.second[0] / self.second[1]).sqrt() + EPS
        self.values[rows] -= lr * moment / (1 - BETAS[0] ** self.steps[rows]) / scale


@dataclass
class Tail:
    """The memory that is trained: addressing and table per read layer, gates, linear rows, a bound."""

    memories: dict[int, ProductKeyMemory]
    gates: dict[int, Gate]
    how: str
    tables: dict[int, Table]
    linear: dict[int, Table]
    bound: float | None = None

    def openness(self, states: States) -> dict[int, Tensor]:
        """g [n] by which each read layer's rows count."""
        each = {layer: gate(states.layer(layer)) for layer, gate in self.gates.items()}
        if self.how == "each":
            return {layer: each[layer] for layer in self.memories}
        if self.how in ("mean", "least", "product"):
            stacked = torch.stack(list(each.values()))
            if self.how == "mean":
                one = stacked.mean(0)
            else:
                one = stacked.amin(0) if self.how == "least" else stacked.prod(0) ** (1 / len(stacked))
        else:
            one = each[int(self.how)]
        return dict.fromkeys(self.memories, one)

    def coordinates(self, layer: int, states: Tensor) -> Tensor:
        """Weights of the linear rows [n, d]: unit vectors of the standardised state."""
        gate = self.gates[layer]
        z = states - gate.mean
        deviation = torch.linalg.inv(gate.whitener).square().sum(1).sqrt()
        return F.normalize(z / deviation, dim=-1)

    @torch.no_grad()
    def delta(self, states: States, openness: dict[int, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Which positions are open [m], and what is added there to the last residual [m, d]."""
        openness = self.openness(states) if openness is None else openness
        total = torch.stack(list(openness.values())).amax(0)
        where = (total > 0).nonzero().flatten()
        out = torch.zeros(len(where), 576)
        for layer, memory in self.memories.items():
            x, g = states.layer(layer)[where], openness[layer][where, None]
            for part, at in zip(x.split(512), torch.arange(len(where)).split(512), strict=True):
                read = spread(*address(memory, part)) @ self.tables[layer].values
                if layer in self.linear:
                    read += self.coordinates(layer, part) @ self.linear[layer].values
                out[at] += g[at] * read
        return where, self.bounded(out)

    def bounded(self, added: Tensor) -> Tensor:
        if self.bound is None:
            return added
        return added * (self.bound / added.norm(dim=-1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0)


def train(tail: Tail, states: States, options: dict, seed: int) -> dict[str, float]:
    """Rows from taught states, by RowAdamW with rule "grad"; options: lr, steps, batch, decay, top_t, ..."""
    openness = tail.openness(states)
    read = {
        layer: kept("read", [fingerprint(states), layer, seed], partial(address, memory, states.layer(layer)))
        for layer, memory in tail.memories.items()
    }
    linear = {layer: tail.coordinates(layer, states.layer(layer)) for layer in tail.linear}
    generator = torch.Generator().manual_seed(seed)
    names = states.example.unique()
    places = [(states.example == name).nonzero().flatten() for name in names]
    order: list[int] = []
    losses = []
    few = vocabulary(states, options["common"]) if options["common"] else None
    for step in range(options["steps"]):
        if len(order) < options["batch"]:
            order += torch.randperm(len(names), generator=generator).tolist()
        batch = torch.cat([places[order.pop(0)] for _ in range(options["batch"])])
        rate = decayed(step / options["steps"], options["decay"])
        weights = {layer: spread(s[batch], w[batch]) for layer, (s, w) in read.items()}
        added = torch.zeros(len(batch), 576)
        for layer in tail.memories:
            y = weights[layer] @ tail.tables[layer].values
            if layer in linear:
                y += linear[layer][batch] @ tail.linear[layer].values
            added += openness[layer][batch, None] * y
        added.requires_grad_(True)
        hidden = states.last[batch] + tail.bounded(added)
        if few is None:
            loss = F.cross_entropy(head()(hidden).float(), states.label[batch])
        else:
            if step < 30 or step % 5 == 0:
                few.grow(hidden, states)
            loss = F.cross_entropy(head()(hidden, of=few.rows).float(), few.label[batch])
        loss.backward()
        losses.append(float(loss.detach()))
        gradient = added.grad
        moved: list[tuple[Table, Tensor, Tensor, float]] = []
        for layer in tail.memories:
            g = openness[layer][batch, None] * gradient
            rows = largest(weights[layer], g, options["top_t"])
            moved.append((tail.tables[layer], rows, weights[layer][:, rows].T @ g, options["lr"]))
            if layer in linear:
                every = torch.arange(576)
                moved.append((tail.linear[layer], every, linear[layer][batch].T @ g, options["linear_lr"]))
        norm = torch.stack([part.norm() for _, _, part, _ in moved]).norm()
        scale = (1.0 / (norm + 1e-6)).clamp_max(1.0)
        for table, rows, part, lr in moved:
            if len(rows):
                table.step(rows, part * scale, lr * rate)
        if options.get("stop_loss") and sum(losses[-15:]) / len(losses[-15:]) < options["stop_loss"]:
            break
    last = losses[-15:]
    return {"loss": sum(last) / len(last), "steps": len(losses)}


def largest(weights: Tensor, g: Tensor, top_t: int) -> Tensor:
    """Rows with the largest gradients, ascending; |W^T g| by row comes from g's Gram matrix."""
    square = ((g @ g.T) @ weights * weights).sum(0)
    best = square.topk(top_t)
    return best.indices[best.values > 0].sort().values


def decayed(done: float, kind: str) -> float:
    if kind == "cosine":
        return float(0.5 * (1 + torch.cos(torch.tensor(done * torch.pi))))
    return 1 - done if kind == "linear" else 1.0


@torch.no_grad()
def best_tokens(last: Tensor) -> Tensor:
    parts = [head()(part).argmax(-1) for part in last.split(256)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def right(tail: Tail, states: States) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the likeliest token is the label, per position; the examples; and whether all of theirs are."""
    best = kept_best(states)
    where, added = tail.delta(states)
    best = best.clone()
    best[where] = best_tokens(states.last[where] + added)
    good = best == states.label
    return good, *by_example(good, states.example)


def changed(tail: Tail, states: States) -> Tensor:
    """Per example: whether the most likely token changed anywhere."""
    where, added = tail.delta(states)
    before, after = kept_best(states)[where], best_tokens(states.last[where] + added)
    differs = torch.zeros(len(states), dtype=torch.bool)
    differs[where] = before != after
    return ~by_example(~differs, states.example)[1]


def by_example(good: Tensor, example: Tensor) -> tuple[Tensor, Tensor]:
    names, place = example.unique(return_inverse=True)
    wrong = torch.zeros(len(names), dtype=torch.int64).index_add_(0, place, (~good).long())
    return names, wrong == 0


def kept_best(states: States) -> Tensor:
    """The base's most likely token at each position."""
    return kept("best", fingerprint(states), lambda: best_tokens(states.last))


@torch.no_grad()
def on_text(tail: Tail, states: States, detail: bool = False) -> dict:
    """Drift (mean KL from the base), perplexity before and after, and exposure, on text at every position."""
    before = base_losses(states)
    where, added = tail.delta(states)
    kl, rise = torch.zeros(len(where)), torch.zeros(len(where))
    for at in torch.arange(len(where)).split(128):
        base_logits = head()(states.last[where[at]], exact=True).log_softmax(-1)
        ours = head()(states.last[where[at]] + added[at], exact=True).log_softmax(-1)
        kl[at] = F.kl_div(ours, base_logits, log_target=True, reduction="none").sum(-1)
        label = states.label[where[at], None]
        there = (label >= 0)[:, 0]
        change = base_logits.gather(-1, label.clamp_min(0)) - ours.gather(-1, label.clamp_min(0))
        rise[at] = torch.where(there, change[:, 0], 0.0)
    n = int((states.label >= 0).sum())
    found = {
        "drift": float(kl.sum() / len(states)),
        "perplexity_rise": float((rise.sum() / n).exp() - 1),
        "perplexity": float((before.sum() / n).exp()),
        "exposure": len(where) / len(states),
    }
    return found | ({"where": where, "kl": kl, "added": added.norm(dim=-1)} if detail else {})


def base_losses(states: States) -> Tensor:
    def make() -> Tensor:
        parts = zip(states.last.split(256), states.label.split(256), strict=True)
        return torch.cat(
            [F.cross_entropy(head()(x).float(), y, ignore_index=-100, reduction="none") for x, y in parts]
        )

    return kept("losses", fingerprint(states), make)


@torch.no_grad()
def choices_right(tail: Tail, states: States, answers: list[int], num_choices: int = 4) -> float:
    """Share of items whose right choice has the highest mean log-probability a token."""
    losses = base_losses(states).clone()
    where, added = tail.delta(states)
    for at in torch.arange(len(where)).split(256):
        logits = head()(states.last[where[at]] + added[at]).float()
        losses[where[at]] = F.cross_entropy(logits, states.label[where[at]], reduction="none")
    total = torch.zeros(num_choices * len(answers)).index_add_(0, states.example, losses)
    mean = total / torch.bincount(states.example, minlength=len(total))
    return float((mean.view(-1, num_choices).argmin(-1) == torch.tensor(answers)).float().mean())
