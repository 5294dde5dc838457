"""Access counts of a general corpus, and the Background that calibration, scopes and selection need."""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layer import SparseMemoryLayer
from ..adapter.tuner import memory_layers
from ..files import ArtifactError, fingerprint_tensors, load_artifact, save_artifact
from ..layer.memory import ProductKeyMemory
from ..precision import autocast, precise, takes

KIND = "background"
# States kept per layer, in bfloat16: enough for k-means and for a .999 quantile, bounded whatever the corpus.
SAMPLE_SIZE = 8_192

# Number and length of the pieces of running text that a background keeps.
NUM_CONTEXTS, CONTEXT_LENGTH = 32, 24
_CONTEXTS = "contexts"

_TENSORS = ("counts", "df", "mean", "covariance", "sample", "starts", "answers")


@dataclass
class LayerBackground:
    """One layer's share of a Background.

    Attributes:
        counts, df: [num_slots] int64: reads, and number of batches that read the slot at all.
        num_batches: n_bg of the TF-IDF rule.
        mean [d_in], covariance [d_in, d_in] float64, sample [n, d_in]: of the layer's inputs; None where only
            counts are known.
        starts [m, d_in]: sample of the inputs at answer starts, the positions before an answer's first label.
        answers [k, d_in]: sample of the inputs at the other positions of these answers.
        addressing: fingerprint of the query and keys that made the counts; None: unchecked.
    """

    counts: Tensor
    df: Tensor
    num_batches: int
    mean: Tensor | None = None
    covariance: Tensor | None = None
    sample: Tensor | None = None
    starts: Tensor | None = None
    answers: Tensor | None = None
    num_states: int = 0
    addressing: str | None = None


@dataclass
class Background:
    """Access statistics of a general corpus, per memory layer: `background[name]`.

    Attributes:
        layers: by `memory_layers` name.
        corpus: SHA-256 of the token ids that were counted.
        contexts: [n, CONTEXT_LENGTH] int64, token ids from the corpus's running text, in which `finetune`
            sees how the states of taught answers look elsewhere.
    """

    layers: dict[str, LayerBackground] = field(default_factory=dict)
    corpus: str | None = None
    contexts: Tensor | None = None

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, Tensor], df: Mapping[str, Tensor], num_batches: int
    ) -> "Background":
        """From counts made elsewhere; which addressing made them is not checked."""
        if counts.keys() != df.keys():
            raise ValueError(f"df: has layers {sorted(df)}, counts has {sorted(counts)}; both need the same")
        return cls({name: LayerBackground(counts[name], df[name], num_batches) for name in counts})

    def __getitem__(self, name: str) -> LayerBackground:
        if name not in self.layers:
            raise ValueError(
                f"background: has no layer {name!r}, only {sorted(self.layers)}; calibrate this model first"
            )
        return self.layers[name]

    def check(self, layers: Mapping[str, ProductKeyMemory]) -> None:
        """Raises:
        ValueError: the background was counted on other layers or another addressing than `layers`.
        """
        for name, memory in layers.items():
            layer = self[name]
            if len(layer.counts) != memory.num_slots:
                raise ValueError(
                    f"background: {name} has {len(layer.counts)} slots, the memory has {memory.num_slots}; "
                    "make a new background with calibrate or count_accesses"
                )
            if layer.addressing is not None and layer.addressing != addressing_fingerprint(memory):
                raise ValueError(
                    f"background: was counted on another addressing of {name} than the model has; "
                    "make a new one with count_accesses(model, batches)"
                )

    def save(self, path: str | Path) -> None:
        """One safetensors file, written atomically."""
        tensors = {} if self.contexts is None else {_CONTEXTS: self.contexts}
        header: dict[str, Any] = {"corpus": self.corpus, "layers": {}}
        for name, layer in self.layers.items():
            held = {key: getattr(layer, key) for key in _TENSORS}
            tensors |= {f"{name}/{key}": value for key, value in held.items() if value is not None}
            facts = {key: getattr(layer, key) for key in ("num_batches", "num_states", "addressing")}
            header["layers"][name] = facts
        save_artifact(path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "Background":
        """Raises:
        ArtifactError: missing, damaged, or not a background.
        """
        tensors, header = load_artifact(path, KIND)
        layers = {}
        for name, facts in header["layers"].items():
            held = {
                key.removeprefix(f"{name}/"): value
                for key, value in tensors.items()
                if key.startswith(f"{name}/")
            }
            if not {"counts", "df"} <= held.keys():
                raise ArtifactError(f"{path}: layer {name} has no counts; get an undamaged copy")
            layers[name] = LayerBackground(**held, **facts)
        return cls(layers, header["corpus"], tensors.get(_CONTEXTS))


def count_accesses(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Background:
    """Count which slots a corpus reads when the model reads it, inside or outside of a scope.

    Args:
        model: a model with memory layers.
        batches: dicts with input_ids and, where there is padding, attention_mask; padding is not counted.

    Raises:
        ValueError: no batches.
    """
    return count_reads(memory_layers(model), layer_inputs(model, batches, memory=True))


def count_reads(
    layers: Mapping[str, ProductKeyMemory], inputs: Iterable[tuple[Mapping[str, Tensor], dict[str, Tensor]]]
) -> Background:
    """`count_accesses` of what `layer_inputs` gave."""
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


def layer_inputs(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    memory: bool = False,
    further: Mapping[str, nn.Module] | None = None,
):
    """For each batch: (batch, {layer name: its inputs [tokens, d_in] at unpadded positions}).

    `further` modules' inputs are given beside the layers'.

    With `memory=False` the layers pass through, so that the inputs are the base model's. The model runs in
    bfloat16 autocast where that is faster; work on its states is not rounded.

    Raises:
        ValueError: no batches, or a batch without input_ids.
    """
    seen: dict[str, Tensor] = {}
    layers = memory_layers(model)
    modules: dict[str, nn.Module] = {name: _module_of(model, memory) for name, memory in layers.items()}
    modules |= further or {}
    handles = [
        module.register_forward_pre_hook(
            lambda _m, args, kw, name=name: seen.__setitem__(
                name, args[0] if args else next(iter(kw.values()))
            ),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    # no logit is looked at, and the vocabulary's are a fifth of a small model's work
    least = {
        key: value for key, value in {"logits_to_keep": 1, "use_cache": False}.items() if takes(model, key)
    }
    empty = True
    try:
        ours = [module for module in modules.values() if isinstance(module, SparseMemoryLayer)]
        off = nullcontext() if memory else memory_off(ours)
        with torch.no_grad(), precise(model), off, evaluating(model):
            for batch in batches:
                if not isinstance(batch, Mapping) or "input_ids" not in batch:
                    raise ValueError(
                        f"batches: got {type(batch).__name__}, each batch must be a dict with 'input_ids'"
                    )
                empty = False
                device = next(model.parameters()).device
                ids = batch["input_ids"].to(device)
                mask = batch.get("attention_mask")
                mask = torch.ones_like(ids) if mask is None else mask.to(device)
                places = {}
                if takes(model, "position_ids") and not mask[:, 0].all():
                    # as generation counts them: the first token behind padding on the left is at 0
                    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
                with autocast(model):
                    model(input_ids=ids, attention_mask=mask, **least, **places)
                yield batch, {n: seen[n].reshape(*mask.shape, -1)[mask.bool()] for n in modules}
    finally:
        for handle in handles:
            handle.remove()
    if empty:
        raise ValueError("batches: is empty; pass at least one batch")


def supervised(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the unpadded positions [tokens]: which predict a label, which start an answer, which go on with one.

    Text that is all label starts no answer.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    predicts, labelled = torch.zeros_like(mask), labels != -100
    predicts[:, :-1] = labelled[:, 1:]
    starts = predicts & ~labelled
    goes_on = predicts & labelled & starts.any(1, keepdim=True)
    return predicts[mask], starts[mask], goes_on[mask]


def addressing_fingerprint(memory: ProductKeyMemory) -> str:
    return fingerprint_tensors(memory.query, memory.query_bias, memory.keys, memory.key_bias)


@contextmanager
def memory_off(layers: Iterable[SparseMemoryLayer]):
    """The given layers pass their base module through, without touching anybody's requires_grad."""
    before = [(layer, layer._disable_adapters) for layer in layers]
    try:
        for layer, _ in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in before:
            layer._disable_adapters = disabled


@contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode within; afterwards every module has its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _module_of(model: nn.Module, memory: ProductKeyMemory) -> SparseMemoryLayer:
    return next(
        m for m in model.modules() if isinstance(m, SparseMemoryLayer) and memory in m.active_memories()
    )
