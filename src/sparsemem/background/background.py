"""Background: statistics of general text, for calibration, scopes and the selection of rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifacts import ArtifactError, fingerprint_tensors, load_artifact, save_artifact
from ..layer.memory import ProductKeyMemory

KIND = "background"
# Maximum number of states kept per layer, in bfloat16. Enough for k-means and a .999 quantile.
SAMPLE_SIZE = 8_192

# Maximum number of pieces of running text that a background keeps, and the length of each in tokens.
NUM_CONTEXTS, CONTEXT_LENGTH = 32, 24
_CONTEXTS = "contexts"

_TENSORS = ("counts", "df", "mean", "covariance", "sample", "starts", "answers")


@dataclass
class LayerBackground:
    """The statistics of one memory layer.

    Attributes:
        counts: [num_slots] int64, how often each slot was read.
        df: [num_slots] int64, how many batches read the slot at least once.
        num_batches: number of batches, n_bg of the TF-IDF rule.
        mean [d_in], covariance [d_in, d_in]: float64, of the layer's inputs. None if only counts are known.
        sample [n, d_in]: a random sample of the layer's inputs. None if only counts are known.
        starts [m, d_in]: a sample of the inputs at answer starts. An answer start is the position before the
            first label of an answer.
        answers [k, d_in]: a sample of the inputs at the other positions of these answers.
        num_states: number of inputs that mean and covariance were computed from.
        addressing: fingerprint of the query and keys for which slots were counted. None: it is not checked.
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
    """Statistics of a general corpus for each memory layer: `background[name]` gives those of one layer.

    Attributes:
        layers: by `memory_layers` name.
        corpus: SHA-256 of the token ids of the corpus.
        contexts: [n, CONTEXT_LENGTH] int64, pieces of the corpus's running text as token ids. `finetune` puts
            taught answers into them; the states of these answers become known states of the scope.
    """

    layers: dict[str, LayerBackground] = field(default_factory=dict)
    corpus: str | None = None
    contexts: Tensor | None = None

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, Tensor], df: Mapping[str, Tensor], num_batches: int
    ) -> "Background":
        """A background from counts that you have. The addressing that gave the counts is not checked.

        Args:
            counts, df: by `memory_layers` name, [num_slots] int64, as in `LayerBackground`.
            num_batches: number of batches.

        Raises:
            ValueError: `counts` and `df` have different layers.
        """
        if counts.keys() != df.keys():
            raise ValueError(
                f"df: has layers {sorted(df)}, counts has {sorted(counts)}; give the same layers"
            )
        return cls({name: LayerBackground(counts[name], df[name], num_batches) for name in counts})

    def __getitem__(self, name: str) -> LayerBackground:
        if name not in self.layers:
            raise ValueError(
                f"background: has no layer {name!r}, only {sorted(self.layers)}; calibrate this model first"
            )
        return self.layers[name]

    def check(self, layers: Mapping[str, ProductKeyMemory]) -> None:
        """Check that the background fits these memory layers.

        Raises:
            ValueError: a layer is missing, or has another number of slots or another addressing.
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
                    f"background: was counted with another addressing of {name} than the model has now; "
                    "make a new one with count_accesses(model, batches)"
                )

    def save(self, path: str | Path) -> None:
        """Write the background to one safetensors file, atomically."""
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
        """Read a background that `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged, or not a background.
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
    """Fingerprint of the tensors that decide which slots a state reads."""
    return fingerprint_tensors(memory.query, memory.query_bias, memory.keys, memory.key_bias)
