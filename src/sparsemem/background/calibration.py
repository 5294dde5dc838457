"""What data sets and nobody trains, first part: the addressing of a memory (`calibrate`).

Hidden states of a general corpus are centred, whitened and rotated, split into heads and halves;
the sub-keys of each half are the k-means centroids of its queries, the score is the negative squared distance
times an inverse temperature from the data. Value rows stay as they are, so logits stay the base's to the bit.

Reference: ours; it takes the place of the paper's dense retrofit (2605.03229, stage 1).
"""

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..adapter.model import memory_layers
from ..files import fingerprint_base
from ..layer.memory import ProductKeyMemory
from ..precision import precise
from .background import CONTEXT_LENGTH, NUM_CONTEXTS, SAMPLE_SIZE, Background, LayerBackground
from .counting import count_accesses, count_reads
from .fitting import k_means, whitening
from .states import layer_inputs, supervised

logger = logging.getLogger(__name__)

# Below this share of slots in use, or of the entropy of uniform reads, the addressing counts as collapsed.
COLLAPSE = 0.5
# States that the sub-keys are fitted to.
FITTED_SIZE = 4_096
# States of this size are kept for the count; those of a larger corpus are computed again.
KEPT_BYTES = 2**28


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, seed: int = 0) -> Background:
    """Set the addressing of every memory layer from data, then count which slots the same data reads.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids and, where there is padding, attention_mask; a large corpus is iterated
            twice. With labels (-100: not an answer) the states at answer starts are kept apart, for
            `set_scope`'s thresholds.
        seed: of the sample, the rotation and k-means; same data and seed give the same addressing.

    Returns:
        The corpus's Background: counts, df, and each layer's mean, covariance and bounded sample of states.

    Raises:
        ValueError: a row is written, `batches` is an iterator, which can be read only once, or is empty.
    """
    _refuse_written(model)
    statistics, kept = _statistics(model, batches, seed, KEPT_BYTES)
    layers = memory_layers(model)
    with precise(model):
        for name, memory in layers.items():
            _set_addressing(memory, statistics[name], seed)
    background = _background(model, count_reads(layers, kept or layer_inputs(model, batches)), statistics)
    background.contexts = _contexts(batches)
    return background


@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, seed: int = 0) -> Background:
    """What `calibrate` returns, for a memory that keeps the addressing it has, as after a dense retrofit.

    Args:
        model, batches, seed: as for `calibrate`. Counts are of what the model reads as it is, states are the
            base model's. Rows may be written.

    Raises:
        ValueError: `batches` is an iterator or is empty.
    """
    statistics, _ = _statistics(model, batches, seed, 0)
    background = _background(model, count_accesses(model, batches), statistics)
    background.contexts = _contexts(batches)
    return background


def addressing_report(layer: LayerBackground) -> dict[str, float]:
    """How evenly a corpus uses the slots of one layer.

    Returns:
        "used": share of slots read at all; "entropy": of the reads, as a share of uniform's; "top1": share of
        the reads that fall on the most-read 1 % of slots.
    """
    counts = layer.counts.double()
    p = counts / counts.sum().clamp_min(1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum() / torch.tensor(float(len(p))).log()
    top = p.sort(descending=True).values[: max(1, len(p) // 100)].sum()
    return {"used": float((counts > 0).double().mean()), "entropy": float(entropy), "top1": float(top)}


def _refuse_written(model: nn.Module) -> None:
    written = [name for name, memory in memory_layers(model).items() if memory.values.any()]
    if written:
        raise ValueError(
            f"model: the memory of {written[0]} has rows that are not zero, and with new addresses other "
            "tokens would read them; revert its patches first, or call count_accesses(model, batches), "
            "which keeps the addresses"
        )


def _statistics(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], seed: int, kept_bytes: int
) -> tuple[dict[str, "_Statistics"], list[tuple[Mapping[str, Tensor], dict[str, Tensor]]]]:
    """Statistics of each layer's inputs, and what `layer_inputs` gave if it is no more than `kept_bytes`."""
    if iter(batches) is batches:
        raise ValueError(
            f"batches: got a {type(batches).__name__}, which can be read only once and is needed twice; "
            "pass a list or a DataLoader"
        )
    statistics = {name: _Statistics(memory.d_in, seed) for name, memory in memory_layers(model).items()}
    kept: list[tuple[Mapping[str, Tensor], dict[str, Tensor]]] = []
    num_bytes = 0
    for batch, states in layer_inputs(model, batches):
        num_bytes += sum(x.nbytes for x in states.values())
        kept.append((batch, states))
        if num_bytes > kept_bytes:
            kept.clear()
        _, starts, goes_on = supervised(batch) if "labels" in batch else (None, None, None)
        for name, x in states.items():
            statistics[name].add(x)
            if starts is not None and goes_on is not None:
                statistics[name].starts.add(x[starts.to(x.device)])
                statistics[name].answers.add(x[goes_on.to(x.device)])
    return statistics, kept


def _contexts(batches: Iterable[Mapping[str, Tensor]]) -> Tensor | None:
    """Pieces of the corpus's running text [n, CONTEXT_LENGTH], from end to end; None where there is none.

    Running text is a row without an answer: all of it is label, or nothing says what is.
    """
    pieces: list[Tensor] = []
    for batch in batches:
        ids = batch["input_ids"].cpu()
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool().cpu()
        for row, (tokens, kept) in enumerate(zip(ids, mask, strict=True)):
            if "labels" in batch and (batch["labels"][row].cpu()[kept][1:] == -100).any():
                continue
            pieces += [p for p in tokens[kept].split(CONTEXT_LENGTH) if len(p) == CONTEXT_LENGTH]
    chosen = torch.linspace(0, len(pieces) - 1, min(NUM_CONTEXTS, len(pieces))).long().tolist()
    return torch.stack([pieces[index] for index in chosen]) if pieces else None


def _background(
    model: nn.Module, background: Background, statistics: Mapping[str, "_Statistics"]
) -> Background:
    """The counts with the statistics put in, and the model marked as counted on."""
    for name, seen in statistics.items():
        layer = background[name]
        layer.mean, layer.covariance, layer.num_states = seen.mean, seen.covariance, seen.count
        for key in ("sample", "starts", "answers"):
            setattr(layer, key, getattr(seen, key).states.to(torch.bfloat16))
        _report(name, addressing_report(layer))
    for config in getattr(model, "peft_config", {}).values():
        if hasattr(config, "base_fingerprint"):
            config.base_fingerprint = fingerprint_base(model)
    return background


def _set_addressing(memory: ProductKeyMemory, seen: "_Statistics", seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = memory.num_heads * memory.key_dim
    rotation = torch.linalg.qr(torch.randn(memory.d_in, memory.d_in, generator=generator)).Q
    rotation = rotation[torch.arange(width) % memory.d_in] @ whitening(seen.covariance)
    mean = seen.mean.float()
    memory.query.copy_(rotation)
    memory.query_bias.copy_(-(rotation @ mean))
    queries = memory.queries(seen.sample.states[:FITTED_SIZE].to(memory.query.device)).cpu()
    for head in range(memory.num_heads):
        for half in range(2):
            memory.keys[head, half] = k_means(queries[:, head, half], memory.num_keys, generator, steps=10)
    # The score -|q - c|^2 as a linear one: 2 q.c - |c|^2, without |q|^2, the same for every sub-key.
    centroids = memory.keys.detach().clone()
    memory.keys.copy_(2 * centroids)
    memory.key_bias.copy_(-(centroids**2).sum(-1))
    # Softmax temperature: on average the last of top_k slots is read top_k times less than the best.
    if memory.top_k > 1:
        scale = math.log(memory.top_k) / _score_spread(memory, seen.sample.states[:2048]).clamp_min(1e-6)
        memory.keys.mul_(scale)
        memory.key_bias.mul_(scale)


def _score_spread(memory: ProductKeyMemory, states: Tensor) -> Tensor:
    weights = memory.address(states.to(memory.query.device))[1].view(-1, memory.top_k).clamp_min(1e-30)
    logits = weights.log()
    return (logits[:, 0] - logits[:, -1]).mean().cpu()


def _report(name: str, report: dict[str, float]) -> None:
    text = "%s: %.0f %% of slots in use, entropy %.2f of uniform, %.0f %% of reads on the top 1 %%"
    values = (name, 100 * report["used"], report["entropy"], 100 * report["top1"])
    collapsed = report["used"] < COLLAPSE or report["entropy"] < COLLAPSE
    logger.log(
        logging.WARNING if collapsed else logging.INFO, text + (": collapsed" if collapsed else ""), *values
    )


class _Sample:
    """A uniform sample of at most SAMPLE_SIZE states of a stream of unknown length, in random order."""

    def __init__(self, width: int, seed: int) -> None:
        self.states, self.ranks = torch.zeros(0, width), torch.zeros(0)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, states: Tensor) -> None:
        # Every state draws a random rank, and the lowest stay.
        ranks = torch.cat([self.ranks, torch.rand(len(states), generator=self.generator)])
        ranks, kept = ranks.sort(stable=True)
        self.ranks = ranks[:SAMPLE_SIZE]
        self.states = torch.cat([self.states, states.detach().float().cpu()])[kept[:SAMPLE_SIZE]]


class _Statistics:
    """Streaming mean and covariance (Chan's update), and samples of all states and of answer starts."""

    def __init__(self, width: int, seed: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)
        self.sample, self.starts, self.answers = (_Sample(width, seed) for _ in range(3))

    def add(self, states: Tensor) -> None:
        if len(states) == 0:
            return
        x = states.detach().cpu().double()
        mean = x.mean(0)
        gap, total = mean - self.mean, self.count + len(x)
        self.scatter += (x - mean).T @ (x - mean) + torch.outer(gap, gap) * (self.count * len(x) / total)
        self.mean += gap * (len(x) / total)
        self.count = total
        self.sample.add(states)

    @property
    def covariance(self) -> Tensor:
        return self.scatter / max(1, self.count - 1)
