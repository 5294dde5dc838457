"""The question key: a projection of middle layers' states that says what is asked, whoever it is about.

The classes of a linear discriminant analysis are relations ("capital of", "author of"; `data.forms`). What
varies within a class are names, wordings and contexts. A token's key is the projection of its states, scaled
to length 1. It is fitted once per base model, in closed form.

Reference: ours; speaker verification tells speakers apart from recordings in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapter.blocks import state_modules
from ..artifacts import load_artifact, save_artifact

# Of the blocks whose MLP inputs make the key, relative to their number.
DEPTHS = (0.43, 0.53, 0.67, 0.77)
WIDTH = 24
# Of the identity in the covariance within classes, where each state has variance 1.
SHRINKAGE = 0.2
# The least cosine is this quantile of those of two questions about one name that ask different things, of
# relations that were left out of the fit.
QUANTILE = 0.9
# The least cosine is never above this one: a model that cannot tell questions apart leaves it to the subject.
MOST = 0.55


@dataclass(frozen=True)
class QuestionKey:
    """Attributes:
    mean: [width] float32, of the states of the layers side by side.
    projection: [width, key_width] float32.
    least: the least cosine at which two questions are taken for the same.
    """

    mean: Tensor
    projection: Tensor
    least: float


def key_layers(model: nn.Module) -> list[str]:
    """Paths of the modules whose inputs make the key, from first to last."""
    return state_modules(model, DEPTHS)


def save_question_key(key: QuestionKey, path: Path) -> None:
    """Write a key to one file, atomically."""
    save_artifact(
        path, "question key", {"mean": key.mean, "projection": key.projection}, {"least": key.least}
    )


def load_question_key(path: Path) -> QuestionKey:
    """Read what `save_question_key` wrote.

    Raises:
        ArtifactError: the file is missing or damaged, or of another kind.
    """
    tensors, header = load_artifact(path, "question key")
    return QuestionKey(**tensors, least=header["least"])


def discriminant(states: Tensor, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The mean [width] and the projection [width, key_width] that tells the classes apart best.

    Computed in float64. The key has WIDTH numbers, or one less than there are classes.

    Args:
        states: [n, width].
        labels: the class of each state.
    """
    x = states.double()
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-12)
    x = (x - mean) / spread
    kinds = sorted(set(labels))
    classes = torch.tensor([kinds.index(label) for label in labels])
    means = torch.stack([x[classes == kind].mean(0) for kind in range(len(kinds))])
    within = x - means[classes]
    covariance = (1 - SHRINKAGE) * within.T @ within / len(x)
    covariance.diagonal().add_(SHRINKAGE * (within**2).mean().clamp_min(1e-12))
    root = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(root, (means - means.mean(0)).T, upper=False)
    directions = torch.linalg.svd(white, full_matrices=False)[0][:, : min(WIDTH, len(kinds) - 1)]
    projection = torch.linalg.solve_triangular(root.T, directions, upper=True) / spread[:, None]
    return mean.float(), projection.float().contiguous()


def least_cosine(
    states: Tensor, labels: Sequence[str], names: Sequence[str], is_bare: Sequence[bool]
) -> float:
    """A cosine that few pairs of questions reach that ask different things about one name.

    One of the two is bare, as what is taught. The relations of a pair are left out of the fit: in turn every
    other one, and the rest.

    Args:
        states: [n, width].
        labels, names, is_bare: of each state, what is asked, about whom, and whether without any context.
    """
    kinds = sorted(set(labels))
    differing = []
    for left_out in (set(kinds[::2]), set(kinds[1::2])):
        left = [place for place, label in enumerate(labels) if label in left_out]
        fitted = [place for place, label in enumerate(labels) if label not in left_out]
        mean, projection = discriminant(states[fitted], [labels[place] for place in fitted])
        keys = functional.normalize((states[left] - mean) @ projection, dim=-1)
        pairs = [
            (one, two)
            for one, a in enumerate(left)
            for two, b in enumerate(left)
            if is_bare[a] and names[a] == names[b] and labels[a] != labels[b]
        ]
        ones, twos = torch.tensor(pairs).T
        differing.append((keys[ones] * keys[twos]).sum(-1))
    return min(MOST, torch.cat(differing).quantile(QUANTILE).item())
