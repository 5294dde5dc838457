"""Set a memory's addressing from data, without training (`calibrate`).

The hidden states of a general corpus are centred, whitened and rotated, and split into heads and halves. The
sub-keys of each half are the k-means centroids of its queries. The score of a sub-key is the negative squared
distance times an inverse temperature, which also comes from the data. Value rows are not changed, so logits
stay bit-identical to the base model's.

Reference: ours. It replaces the paper's dense retrofit (2605.03229, stage 1).
"""

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..adapter.memories import memory_layers
from ..artifacts import fingerprint_base
from ..layer.memory import ProductKeyMemory
from ..precision import precise
from .background import (
    CONTEXT_LENGTH,
    NUM_CONTEXTS,
    SAMPLE_SIZE,
    Background,
    LayerBackground,
    addressing_fingerprint,
)
from .fitting import k_means, whitening
from .states import layer_inputs, supervised

logger = logging.getLogger(__name__)

# The addressing has collapsed if the share of slots in use, or the entropy as a share of that of uniform
# reads, is below this.
COLLAPSE = 0.5
# Maximum number of states that the sub-keys are fitted to.
FITTED_SIZE = 4_096
# If a corpus's states need no more bytes than this, they are kept for counting. Otherwise they are computed
# again.
KEPT_BYTES = 2**28


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, seed: int = 0) -> Background:
    """Set the addressing of every memory layer from data, then count the slots that this data reads.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids and, if there is padding, attention_mask. It is iterated more than once.
            If there are labels (-100: not part of an answer), the states of answers are also kept apart, for
            the thresholds of `set_scope`.
        seed: for the sample, the rotation and k-means. The same data and seed give the same addressing.

    Returns:
        The Background of the corpus: counts, df, and for each layer the mean, covariance and a sample of
        states.

    Raises:
        ValueError: a value row is not zero, or `batches` is empty or an iterator, which can be read only
            once.
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
    """Make the Background that `calibrate` returns, but do not change the addressing.

    Use this after a dense retrofit, for example. The counts are those of the model with its memory, the
    states are those of the base model. Value rows need not be zero.

    Args:
        model, batches, seed: as for `calibrate`.

    Raises:
        ValueError: `batches` is an iterator or is empty.
    """
    statistics, _ = _statistics(model, batches, seed, 0)
    background = _background(model, count_accesses(model, batches), statistics)
    background.contexts = _contexts(batches)
    return background


def addressing_report(layer: LayerBackground) -> dict[str, float]:
    """Measure how evenly a corpus uses the slots of one layer.

    Returns:
        "used": share of slots that are read at least once. "entropy": entropy of the reads, divided by that
        of uniform reads. "top1": share of the reads that go to the most-read 1 % of slots.
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
            f"model: the memory of {written[0]} has rows that are not zero, and after calibration other "
            "tokens would read them; revert its patches first, or call count_accesses(model, batches), "
            "which does not change the addressing"
        )


def _statistics(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], seed: int, kept_bytes: int
) -> tuple[dict[str, "_Statistics"], list[tuple[Mapping[str, Tensor], dict[str, Tensor]]]]:
    """Statistics of each layer's inputs, and the inputs themselves if they need at most `kept_bytes`."""
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
        _, starts, within = supervised(batch) if "labels" in batch else (None, None, None)
        for name, x in states.items():
            statistics[name].add(x)
            if starts is not None and within is not None:
                statistics[name].starts.add(x[starts.to(x.device)])
                statistics[name].answers.add(x[within.to(x.device)])
    return statistics, kept


def _contexts(batches: Iterable[Mapping[str, Tensor]]) -> Tensor | None:
    """Pieces of the corpus's running text [n, CONTEXT_LENGTH], spread over the corpus. None if there is none.

    Running text is a row in which all tokens are labels, or a row of a batch without labels.
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
    """Add the statistics to the counts, and note the base model's fingerprint in the adapter's config."""
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
    # -|q - c|^2 = 2 q.c - |c|^2 - |q|^2. The last term is the same for all sub-keys and is left out.
    centroids = memory.keys.detach().clone()
    memory.keys.copy_(2 * centroids)
    memory.key_bias.copy_(-(centroids**2).sum(-1))
    # Softmax temperature: on average, the best of the top_k slots gets top_k times the weight of the last.
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
    """A uniform sample, in random order, of at most SAMPLE_SIZE states from a stream of unknown length."""

    def __init__(self, width: int, seed: int) -> None:
        self.states, self.ranks = torch.zeros(0, width), torch.zeros(0)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, states: Tensor) -> None:
        # Each state gets a random rank, and the states with the lowest ranks are kept.
        ranks = torch.cat([self.ranks, torch.rand(len(states), generator=self.generator)])
        ranks, kept = ranks.sort(stable=True)
        self.ranks = ranks[:SAMPLE_SIZE]
        self.states = torch.cat([self.states, states.detach().float().cpu()])[kept[:SAMPLE_SIZE]]


class _Statistics:
    """Streaming mean and covariance (Chan's update), and samples of all states and of those of answers."""

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


def count_accesses(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Background:
    """Count the slots that a corpus reads. Tokens out of scope are counted too.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids and, if there is padding, attention_mask. Padding is not counted.

    Returns:
        A Background with only counts and df.

    Raises:
        ValueError: `batches` is empty, or a batch has no input_ids.
    """
    return count_reads(memory_layers(model), layer_inputs(model, batches, memory=True))


def count_reads(
    layers: Mapping[str, ProductKeyMemory], inputs: Iterable[tuple[Mapping[str, Tensor], dict[str, Tensor]]]
) -> Background:
    """As `count_accesses`, but from the output of `layer_inputs`."""
    counts = {name: torch.zeros(m.num_slots, dtype=torch.int64) for name, m in layers.items()}
    df = {name: torch.zeros_like(c) for name, c in counts.items()}
    digest, num_batches = hashlib.sha256(), 0

    for batch, states in inputs:
        digest.update(batch["input_ids"].cpu().contiguous().numpy().tobytes())
        num_batches += 1
        for name, x in states.items():
            read = torch.bincount(
                layers[name].address(x)[0].flatten().cpu(), minlength=layers[name].num_slots
            )
            counts[name] += read
            df[name] += (read > 0).long()
    background = Background.from_counts(counts, df, num_batches)
    background.corpus = digest.hexdigest()
    for name, memory in layers.items():
        background[name].addressing = addressing_fingerprint(memory)
    return background
