"""Background: what general text says, as calibration, scopes and selection need it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import ArtifactError, fingerprint_tensors, load_artifact, save_artifact
from ..layer.memory import ProductKeyMemory

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


def addressing_fingerprint(memory: ProductKeyMemory) -> str:
    return fingerprint_tensors(memory.query, memory.query_bias, memory.keys, memory.key_bias)
