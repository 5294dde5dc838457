"""The question key: a projection of middle layers' states that says what is asked, whoever it is about.

The classes of a linear discriminant analysis are relations ("capital of", "author of"). What varies within a
class are names, wordings and contexts. A token's key is the projection of its states, scaled to length 1. It
is fitted once per base model, in closed form.

Reference: ours; speaker verification tells speakers apart from recordings in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter.blocks import state_modules
from .states import layer_inputs

# Of the blocks whose MLP inputs make the key, relative to their number.
DEPTHS = (0.53, 0.67, 0.77)
WIDTH = 48
# Of the identity in the covariance within classes.
SHRINKAGE = 0.1
# The least cosine of a question's key to a taught one's for which the taught answer is given.
LEAST = 0.45
BATCH_SIZE = 16


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


@torch.no_grad()
def fit_question_key(
    model: nn.Module, layers: Sequence[str], prompts: Sequence[Sequence[int]], relations: Sequence[int]
) -> QuestionKey:
    """Fit the key of a model.

    Args:
        model: a model with memory layers, which are switched off.
        layers: as from `key_layers`.
        prompts: token ids up to where an answer begins.
        relations: the class of each prompt.
    """
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    further = {f"key:{path}": base.get_submodule(path) for path in layers}
    batches = [
        _padded([prompts[place] for place in order[at : at + BATCH_SIZE]])
        for at in range(0, len(order), BATCH_SIZE)
    ]
    states = []
    for batch, seen in layer_inputs(model, batches, further=further):
        last = batch["attention_mask"].sum(1).cumsum(0) - 1
        states.append(torch.cat([seen[key][last.to(seen[key].device)].float().cpu() for key in further], -1))
    return discriminant(torch.cat(states), torch.tensor([relations[place] for place in order]))


def discriminant(states: Tensor, classes: Tensor) -> QuestionKey:
    """The projection [width, key_width] of states [n, width] that tells classes [n] apart best."""
    x = states.double()
    mean = x.mean(0)
    kinds = classes.unique()
    means = torch.stack([x[classes == kind].mean(0) for kind in kinds]) - mean
    within = x - mean - means[torch.searchsorted(kinds, classes)]
    covariance = within.T @ within / len(x)
    mixed = (1 - SHRINKAGE) * covariance
    mixed += SHRINKAGE * covariance.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
    variance, basis = torch.linalg.eigh(mixed)
    white = basis / variance.clamp_min(1e-12).sqrt()
    _, _, directions = torch.linalg.svd(means @ white, full_matrices=False)
    return QuestionKey(mean.float(), (white @ directions[:WIDTH].T).float().contiguous(), LEAST)


def _padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
