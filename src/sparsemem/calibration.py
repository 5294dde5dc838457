"""What data sets and nobody trains: the addressing (`calibrate`) and the scope (`set_scope`) of memory layers.

calibrate: hidden states of a general corpus are centred, whitened and rotated, split into heads and halves; the
sub-keys of each half are the k-means centroids of its queries, the score is the negative squared distance times an
inverse temperature from the data. Value rows stay as they are (zero), so logits stay the base's to the bit.

set_scope: the whitened states at the supervised positions of the training data become the centres of the relevance
gate, its thresholds come from the background and from how near the training examples are to each other.

Reference: ours; it takes the place of the paper's dense retrofit (2605.03229, stage 1).
"""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .access import SAMPLE_SIZE, Background, LayerBackground, addressing_fingerprint, count_accesses, layer_inputs
from .files import fingerprint_base
from .memory import ProductKeyMemory
from .relevance import k_means, thresholds, whiten, whitening
from .tuner import memory_layers

logger = logging.getLogger(__name__)

# Mean difference, in nats, between the scores of the best and the last of the top_k slots: the softmax temperature.
SCORE_SPREAD = 2.0
# Below this share of slots in use, or of the entropy of uniform reads, the addressing counts as collapsed.
COLLAPSE = 0.5
# Supervised states kept by set_scope before k-means; random beyond that.
TAUGHT_SIZE = 16_384


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, seed: int = 0) -> Background:
    """Set the addressing of every memory layer from data, then count which slots the same data reads.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids and, where there is padding, attention_mask; iterated twice.
        seed: of the sample, the rotation and k-means; same data and seed give the same addressing.

    Returns:
        The corpus's Background: counts, df, and each layer's mean, covariance and bounded sample of states.

    Raises:
        ValueError: `batches` is an iterator, which can be read only once, or is empty.
    """
    if iter(batches) is batches:
        raise ValueError(
            f"batches: got a {type(batches).__name__}, which can be read only once and is needed twice; "
            "pass a list or a DataLoader"
        )
    layers = memory_layers(model)
    statistics = {name: _Statistics(memory.d_in, seed) for name, memory in layers.items()}
    for _, states in layer_inputs(model, batches):
        for name, x in states.items():
            statistics[name].add(x)
    for name, memory in layers.items():
        _set_addressing(memory, statistics[name], seed)
    background = count_accesses(model, batches)
    for name, memory in layers.items():
        layer, seen = background[name], statistics[name]
        layer.mean, layer.covariance, layer.num_states = seen.mean, seen.covariance, seen.count
        layer.sample = seen.sample.to(torch.bfloat16)
        layer.addressing = addressing_fingerprint(memory)
        _report(name, addressing_report(layer))
    for config in getattr(model, "peft_config", {}).values():
        if hasattr(config, "base_fingerprint"):
            config.base_fingerprint = fingerprint_base(model)
    return background


def addressing_report(layer: LayerBackground) -> dict[str, float]:
    """How evenly a corpus uses the slots of one layer.

    Returns:
        "used": share of slots read at all; "entropy": of the reads, as a share of uniform's; "top1": share of the reads
        that fall on the most-read 1 % of slots.
    """
    counts = layer.counts.double()
    p = counts / counts.sum().clamp_min(1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum() / torch.tensor(float(len(p))).log()
    top = p.sort(descending=True).values[: max(1, len(p) // 100)].sum()
    return {"used": float((counts > 0).double().mean()), "entropy": float(entropy), "top1": float(top)}


@torch.no_grad()
def set_scope(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], background: Background, *, extend: bool = False
) -> None:
    """Set each memory layer's scope from training data; from then on tokens out of scope pass as in the base model.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids, labels (-100: not supervised) and attention_mask. Centres are the states at the
            positions whose next label is supervised, memory switched off.
        background: of `calibrate`, which keeps mean, covariance and a sample of states.
        extend: keep the scope there is and add to it: g is then the largest over both.

    Raises:
        ValueError: no supervised position, no room for centres, or a background without states.
    """
    layers = memory_layers(model)
    background.check(layers)
    for name in layers:
        if background[name].mean is None:
            raise ValueError(
                f"background: holds only counts for {name}, a scope also needs mean, covariance and states; "
                "use the background that calibrate returned"
            )
    taught: dict[str, list[Tensor]] = {name: [] for name in layers}
    examples: list[Tensor] = []
    first = 0
    for batch, states in layer_inputs(model, batches):
        if "labels" not in batch:
            raise ValueError("batches: have no 'labels'; a scope is taken from supervised positions, pass labels too")
        supervised, row = _supervised(batch)
        examples.append(row + first)
        first += len(batch["input_ids"])
        for name, x in states.items():
            taught[name].append(x[supervised.to(x.device)].float().cpu())
    example = torch.cat(examples)
    if len(example) == 0:
        raise ValueError("batches: no position is supervised (every label is -100); a scope needs at least one")
    keep = torch.randperm(len(example), generator=torch.Generator().manual_seed(0))[:TAUGHT_SIZE].sort().values
    scopes = {
        name: _scope_of(name, memory, torch.cat(taught[name])[keep], example[keep], background[name], extend)
        for name, memory in layers.items()
    }
    for name, memory in layers.items():
        write_scope(memory, *scopes[name])


def clear_scope(model: nn.Module) -> None:
    """Forget every memory layer's scope: the gate is open everywhere (g = 1), as in the paper."""
    for memory in memory_layers(model).values():
        for buffer in (memory.scope_mean, memory.scope_whitener, memory.scope_centres, memory.scope_lo, memory.scope_hi):
            buffer.zero_()
        memory.scope_size.zero_()


def write_scope(
    memory: ProductKeyMemory, mean: Tensor, whitener: Tensor, centres: Tensor, lo: Tensor, hi: Tensor
) -> None:
    """Put a whole scope into one layer: centres [n, d_in], lo and hi [n]; the rest of the buffers is zero."""
    n = len(centres)
    for buffer, value in ((memory.scope_mean, mean), (memory.scope_whitener, whitener)):
        buffer.copy_(value)
    for buffer, value in ((memory.scope_centres, centres), (memory.scope_lo, lo), (memory.scope_hi, hi)):
        buffer.zero_()
        buffer[:n] = value
    memory.scope_size.fill_(n)


def _scope_of(
    name: str, memory: ProductKeyMemory, states: Tensor, example: Tensor, layer: LayerBackground, extend: bool
) -> tuple[Tensor, ...]:
    assert layer.mean is not None and layer.covariance is not None and layer.sample is not None
    mean, whitener = layer.mean.float(), whitening(layer.covariance)
    old = int(memory.scope_size) if extend else 0
    if old:
        mean, whitener = memory.scope_mean.cpu(), memory.scope_whitener.cpu()
    room = len(memory.scope_centres) - old
    if room < 1:
        raise ValueError(
            f"max_centres={len(memory.scope_centres)}: the scope of {name} is full; make the memory with a larger max_centres"
        )
    taught = whiten(states, mean, whitener)
    centres = taught
    if len(taught) > room:
        centres = nn.functional.normalize(k_means(taught, room, torch.Generator().manual_seed(0)), dim=-1)
    lo, hi, separable = thresholds(taught, example, whiten(layer.sample, mean, whitener), centres)
    if not separable:
        logger.warning(
            "%s: what is taught and the background cannot be told apart (lo %.2f); other answers may change", name, lo
        )
    logger.info("%s: %d centres, lo %.3f, hi %.3f", name, len(centres), lo, hi)
    los, his = centres.new_full((len(centres),), lo), centres.new_full((len(centres),), hi)
    if old:
        centres = torch.cat([memory.scope_centres[:old].cpu(), centres])
        los, his = torch.cat([memory.scope_lo[:old].cpu(), los]), torch.cat([memory.scope_hi[:old].cpu(), his])
    return mean, whitener, centres, los, his


def _supervised(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Among a batch's unpadded positions: which predict a supervised label, and the row of each of these."""
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    predicts = torch.zeros_like(mask)
    predicts[:, :-1] = labels[:, 1:] != -100
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    return predicts[mask], rows[mask & predicts].cpu()


def _set_addressing(memory: ProductKeyMemory, seen: "_Statistics", seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = memory.num_heads * memory.key_dim
    rotation = torch.linalg.qr(torch.randn(memory.d_in, memory.d_in, generator=generator)).Q
    rotation = rotation[torch.arange(width) % memory.d_in] @ whitening(seen.covariance)
    mean = seen.mean.float()
    memory.query.copy_(rotation)
    memory.query_bias.copy_(-(rotation @ mean))
    queries = ((seen.sample.float() - mean) @ rotation.T).view(-1, memory.num_heads, 2, memory.key_dim // 2)
    for head in range(memory.num_heads):
        for half in range(2):
            memory.keys[head, half] = k_means(queries[:, head, half], memory.num_keys, generator)
    # The score -|q - c|^2 as a linear one: 2 q.c - |c|^2, leaving out |q|^2, which is the same for every sub-key.
    centroids = memory.keys.detach().clone()
    memory.keys.copy_(2 * centroids)
    memory.key_bias.copy_(-(centroids**2).sum(-1))
    scale = SCORE_SPREAD / _score_spread(memory, seen.sample[:2048].float()).clamp_min(1e-6)
    memory.keys.mul_(scale)
    memory.key_bias.mul_(scale)


def _score_spread(memory: ProductKeyMemory, states: Tensor) -> Tensor:
    weights = memory.address(states.to(memory.query.device))[1].view(-1, memory.top_k).clamp_min(1e-30)
    logits = weights.log()
    return (logits[:, 0] - logits[:, -1]).mean().cpu() if memory.top_k > 1 else torch.tensor(SCORE_SPREAD)


def _report(name: str, report: dict[str, float]) -> None:
    text = "%s: %.0f %% of slots in use, entropy %.2f of uniform, %.0f %% of reads on the top 1 %%"
    values = (name, 100 * report["used"], report["entropy"], 100 * report["top1"])
    collapsed = report["used"] < COLLAPSE or report["entropy"] < COLLAPSE
    logger.log(logging.WARNING if collapsed else logging.INFO, text + (": collapsed" if collapsed else ""), *values)


class _Statistics:
    """Streaming mean and covariance (Chan's update), and a uniform sample of at most SAMPLE_SIZE states."""

    def __init__(self, width: int, seed: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)
        self.sample = torch.zeros(0, width)
        self.ranks = torch.zeros(0)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, states: Tensor) -> None:
        x = states.detach().cpu().double()
        if len(x) == 0:
            return
        mean = x.mean(0)
        gap, total = mean - self.mean, self.count + len(x)
        self.scatter += (x - mean).T @ (x - mean) + torch.outer(gap, gap) * (self.count * len(x) / total)
        self.mean += gap * (len(x) / total)
        self.count = total
        # Every state draws a random rank, the lowest stay: a uniform sample of a stream of unknown length.
        ranks = torch.cat([self.ranks, torch.rand(len(x), generator=self.generator)])
        self.ranks, kept = ranks.sort(stable=True)
        self.ranks, kept = self.ranks[:SAMPLE_SIZE], kept[:SAMPLE_SIZE]
        self.sample = torch.cat([self.sample, x.float()])[kept]

    @property
    def covariance(self) -> Tensor:
        return self.scatter / max(1, self.count - 1)


