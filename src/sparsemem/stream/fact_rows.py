"""Fact rows: the patch of one task, in which each token of each answer has a row of its own.

A row is fitted alone, to the base's last residual at its position, so that what a task writes depends on the
task and the base and on nothing else. It must also win where the residual is weaker or stronger, since an
unseen wording's differs. Thresholds come from the base model alone: otherwise undoing one task would change
others.

Reference: ours; one key and one value a taught position is GRACE's form (2211.11031), with two keys (see
`layer.facts`) and rows fitted through norm and head alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..background.background import LayerBackground
from ..background.fitting import whitening
from ..background.states import layer_inputs, supervised
from ..data.naming import name_runs
from ..data.records import collate
from ..layer.facts import Facts
from ..layer.scope import fact_scope
from ..layer.space import Space, nearest_known, plain_space, whiten
from ..patches.layers import LayerPatch
from ..patches.patch import RowPatch
from ..precision import autocast, device_of, precise
from ..training.cached import READ_AT_ONCE, TailHead, answer_starts

# How much nearness to something known counts. Less than where rows are shared: a fact's row is added at its
# own answer alone, and unseen wordings lie nearer to known states than taught ones do (LOG.md, section 17).
KNOWN_WEIGHT = 0.15
# Answer starts of the background: known states, and those compared to each other for the threshold.
KNOWN_SIZE, COMPARED_SIZE = 512, 2_048
# Share of the background's answer starts that may come nearer to another than a fact without a subject opens.
START_SHARE = 0.10
MIN_STATES = 32
# A fact without a subject opens at least this far around its own state.
MARGIN = 0.04
# Every late state passes this threshold.
ANY = -2.0
STEPS, STEP_SIZE, MOMENTUM = 8, 0.5, 0.5
# A row must win on so many times the residual.
STRENGTHS = (0.5, 1.0, 2.0)
# Positions that are fitted at once; each row's result does not depend on the others.
AT_ONCE = 64
_NORM = "norm"


@dataclass(frozen=True)
class Place:
    """Where the tasks of one stream are written.

    Attributes:
        name: of the memory layer.
        addressing: fingerprint of the layer's addressing.
        base: fingerprint of the base model.
        key_layers: paths of the modules whose inputs give the question key.
        key_least, late_least: thresholds of question keys, and of late states for facts without a subject.
        opening: the tokens that the chat template puts before an answer.
        tokenizer: the base model's.
    """

    name: str
    addressing: str
    base: str
    space: Space
    key_layers: Sequence[str]
    key_least: float
    late_least: float
    opening: Sequence[int]
    tokenizer: Any


def late_space(layer: LayerBackground) -> tuple[Space, float]:
    """A space of late states, and the threshold of facts without a subject, from a layer's background.

    Raises:
        ValueError: the background has too few answers to say how near known questions come to each other.
    """
    if layer.mean is None or layer.covariance is None or layer.starts is None or layer.answers is None:
        raise ValueError("background: holds only counts; use the background that calibrate returned")
    if len(layer.starts) < MIN_STATES:
        raise ValueError(
            f"background: has {len(layer.starts)} answers, at least {MIN_STATES} are needed; "
            "give records with questions and answers"
        )
    mean, whitener = layer.mean.float(), whitening(layer.covariance)
    starts = whiten(layer.starts[:COMPARED_SIZE], mean, whitener)
    nearest = (starts @ starts.T).fill_diagonal_(-1.0).amax(-1)
    least = float(((1 - KNOWN_WEIGHT) * nearest).quantile(1 - START_SHARE))
    return plain_space(mean, whitener, starts[:KNOWN_SIZE], KNOWN_WEIGHT), least


@torch.no_grad()
def fact_patch(
    head: TailHead,
    place: Place,
    examples: Sequence[dict[str, Any]],
    names: Sequence[Sequence[str]],
    info: dict[str, Any],
    progress: Callable[[int, int], object],
) -> RowPatch:
    """The patch of encoded examples.

    Args:
        names: the names of each example's subject; none: a fact without a subject.
        info: `{"task", "facts"}` with one fact an example; goes into the patch, each fact with its number of
            answers.
        progress: gets the number of tokens whose rows are fitted, and of all.
    """
    states = _states(head, place, examples)
    device = device_of(head.model)
    with autocast(head.model):
        rows = fitted_rows(head, states["residuals"].to(device), states["labels"].to(device), progress).cpu()
    with precise(head.model):
        facts, numbers = _facts_of(place, examples, names, states, rows, info["task"])
    told = [{**fact, "answers": number} for fact, number in zip(info["facts"], numbers, strict=True)]
    nothing, none = torch.zeros(0, head.layers[place.name].d_out), torch.zeros(0, dtype=torch.int64)
    layer = LayerPatch(none, nothing, nothing, place.addressing, fact_scope(place.space, facts))
    return RowPatch({place.name: layer}, place.base, {**info, "facts": told}).referring()


def _states(head: TailHead, place: Place, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Float32 on the CPU, at supervised positions: last residuals, late states, states of the middle layers,
    and labels."""
    base = head.model.get_base_model()
    further = {_NORM: head.norm} | {f"key:{path}": base.get_submodule(path) for path in place.key_layers}
    batches = [
        collate(examples[at : at + READ_AT_ONCE], head.pad_token_id)
        for at in range(0, len(examples), READ_AT_ONCE)
    ]
    parts: dict[str, list[Tensor]] = {key: [] for key in ("residuals", "late", "middle", "labels")}
    for batch, seen in layer_inputs(head.model, batches, further=further):
        predicts = supervised(batch)[0]

        def at(name: str, seen: Any = seen, predicts: Tensor = predicts) -> Tensor:
            return seen[name][predicts.to(seen[name].device)].float().cpu()

        parts["residuals"].append(at(_NORM))
        parts["late"].append(at(place.name))
        middle = [at(f"key:{path}") for path in place.key_layers]
        parts["middle"].append(torch.cat(middle, -1))
        labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        parts["labels"].append(labels[batch["attention_mask"].bool()][predicts])
    return {key: torch.cat(several) for key, several in parts.items()}


def _facts_of(
    place: Place,
    examples: Sequence[dict[str, Any]],
    names: Sequence[Sequence[str]],
    states: dict[str, Tensor],
    rows: Tensor,
    task: str,
) -> tuple[Facts, list[int]]:
    """The facts of examples, and how many answers each example has."""
    space = place.space
    starts = [answer_starts(one["labels"]) for one in examples]
    for one in starts:
        # a text without a prompt is an answer from its beginning
        one[0] = True
    first = torch.cat(starts)
    at = first.nonzero().flatten()
    numbers = [int(one.sum()) for one in starts]
    sizes = torch.diff(torch.cat([at, torch.tensor([len(first)])]))
    z = space.late(states["late"][at]).to(torch.bfloat16).float()
    keys = space.keys(states["middle"][at]).to(torch.bfloat16).float()
    own = (z * z).sum(-1) - space.known_weight * nearest_known(z, space.known)
    # each fact opens at its own state, however near something known is to it
    nameless = torch.minimum(own.new_tensor(place.late_least), own - MARGIN)
    owner = [number for number, many in enumerate(numbers) for _ in range(many)]
    ids = [_identity(task, number) for number in range(len(owner))]
    runs = [name_runs(one, place.tokenizer, space.classes) for one in names]
    held = [[ids[fact], *run] for fact, example in enumerate(owner) for run in runs[example]]
    length = max(map(len, held), default=1)
    named = torch.tensor([bool(runs[example]) for example in owner])
    least = torch.stack([own.new_full((len(at),), place.key_least), torch.where(named, ANY, nameless)], 1)
    facts = Facts(
        fact_ids=torch.tensor(ids),
        fact_keys=keys,
        fact_states=z,
        fact_least=least,
        fact_openings=torch.tensor(
            [pair for one in examples for pair in _openings(one, place.opening)], dtype=torch.int64
        ),
        fact_sizes=sizes,
        names=torch.tensor([row + [-1] * (length - len(row)) for row in held], dtype=torch.int64).view(
            -1, length
        ),
        answers=states["labels"],
        rows=rows,
    )
    return facts, numbers


def _openings(example: dict[str, Any], opening: Sequence[int]) -> list[list[int]]:
    """The two tokens that must come before each answer of an example; -1: any."""
    labels, ids = example["labels"], example["input_ids"]
    pairs = []
    for end in range(1, len(labels)):
        if labels[end] != -100 and (labels[end - 1] == -100 or end == 1):
            last = list(ids[max(0, end - len(opening)) : end])
            fixed = list(opening) if opening and last == list(opening) else []
            pairs.append([-1] * (2 - len(fixed)) + fixed)
    return pairs


def _identity(task: str, number: int) -> int:
    digest = hashlib.sha256(f"{task}\n{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1


def fitted_rows(
    head: TailHead,
    residuals: Tensor,
    labels: Tensor,
    progress: Callable[[int, int], object] = lambda _done, _of: None,
) -> Tensor:
    """Rows [n, width] float32 to add to last residuals [n, width], rounded to bfloat16.

    Args:
        labels: [n] int64, the token that each position is to predict.
        progress: gets the number of positions that are done, and n.
    """
    rows = []
    for start in range(0, len(labels), AT_ONCE):
        progress(start, len(labels))
        chosen = slice(start, start + AT_ONCE)
        rows.append(_fitted(head, residuals[chosen], labels[chosen]))
    return torch.cat(rows).to(torch.bfloat16).float()


def _fitted(head: TailHead, residuals: Tensor, labels: Tensor) -> Tensor:
    """Normalised gradient descent with a falling rate; a step is measured by the residual's length."""
    size = residuals.norm(dim=1, keepdim=True)
    rows, moment = torch.zeros_like(residuals), torch.zeros_like(residuals)
    wanted = labels.repeat(len(STRENGTHS))
    for step in range(STEPS):
        with torch.enable_grad():
            rows.requires_grad_(True)
            tried = torch.cat([residuals * strength + rows for strength in STRENGTHS])
            loss = functional.cross_entropy(head.logits_of(tried).float(), wanted, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, rows)
        direction = gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
        moment = torch.lerp(moment, direction, 1 - MOMENTUM)
        rows = rows.detach() - STEP_SIZE * 2 * (1 - step / STEPS) * size * moment
    return rows
