"""Fit the question key of a base model on labelled questions, or take it from the user's cache."""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..adapter.blocks import hidden_size, widths
from ..adapter.layers import SparseMemoryLayer, first_input
from ..artifacts import ArtifactError, fingerprint_base
from ..background.question_key import (
    MOST,
    QUANTILE,
    SHRINKAGE,
    WIDTH,
    QuestionKey,
    discriminant,
    least_cosine,
    load_question_key,
    save_question_key,
)
from ..background.states import evaluating, few_logits, memory_off
from ..precision import autocast, device_of, precise, precision_of
from .forms import EMBEDDED, EMBEDDED_SHARE, FOREIGN_SHARE, TYPED_SHARE, Form, form_samples
from .generation import accepted, by_length, read_beginning, rows_of
from .gguf import cache_folder
from .wordings import forms

logger = logging.getLogger(__name__)

# A model whose states have few numbers needs few samples: so many numbers for one relation, and for one name.
PER_RELATION, PER_NAME = 8, 256
MOST_NAMES, LEAST_NAMES, LEAST_RELATIONS = 5, 2, 24
BATCH_SIZE = 64


def question_key(model: nn.Module, tokenizer: PreTrainedTokenizerBase, layers: Sequence[str]) -> QuestionKey:
    """The key of a base model, kept in the user's cache once it is fitted, if the model has a name.

    Args:
        model, layers: as for `fit_question_key`.
    """
    if not getattr(_base(model).config, "name_or_path", ""):
        return fit_question_key(model, tokenizer, layers)
    made_of = [fingerprint_base(model), precision_of(model), tokenizer.chat_template, list(layers), forms()]
    fit = [SHRINKAGE, WIDTH, QUANTILE, MOST, PER_RELATION, PER_NAME, MOST_NAMES, LEAST_NAMES, LEAST_RELATIONS]
    drawn = [EMBEDDED, EMBEDDED_SHARE, TYPED_SHARE, FOREIGN_SHARE]
    digest = hashlib.sha256(json.dumps([*made_of, *fit, *drawn]).encode()).hexdigest()
    path = cache_folder() / "question-keys" / f"{digest[:16]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    # a second process waits for the first one's key
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            try:
                return load_question_key(path)
            except ArtifactError as error:
                logger.warning("%s; it is made again", error)
        logger.info("fitting what is asked in the states of this model (once)")
        key = fit_question_key(model, tokenizer, layers)
        save_question_key(key, path)
    return key


def fit_question_key(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, layers: Sequence[str]
) -> QuestionKey:
    """Fit the key of a model. The same model gives the same key.

    Args:
        model: with or without memory layers, which are switched off.
        layers: as from `key_layers`.
    """
    width = sum(_input_width(_base(model), path) for path in layers)
    names = min(MOST_NAMES, max(LEAST_NAMES, width // PER_NAME))
    relations = max(LEAST_RELATIONS, width // PER_RELATION)
    samples = form_samples(tokenizer, names=names, relations=relations)
    states = answer_starts(model, samples, layers)
    labels, about = [sample.relation for sample in samples], [sample.name for sample in samples]
    mean, projection = discriminant(states, labels)
    least = least_cosine(states, labels, about, [sample.variant == "bare" for sample in samples])
    return QuestionKey(mean, projection, least)


def answer_starts(model: nn.Module, samples: Sequence[Form], layers: Sequence[str]) -> Tensor:
    """The base's states [len(samples), width] float32 at the last token of each sample, on the CPU.

    What all samples with the same system prompt begin with is read once.
    """
    base, ids, seen = _base(model), [sample.ids for sample in samples], {}
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.system, []).append(index)
    found: list[Tensor] = [torch.empty(0)] * len(samples)
    memories = [module for module in base.modules() if isinstance(module, SparseMemoryLayer)]
    handles = [
        base.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kw, path=path: seen.__setitem__(path, first_input(args, kw)),
            with_kwargs=True,
        )
        for path in layers
    ]
    progress = tqdm(total=len(samples), desc="what is asked", leave=False, delay=5)
    try:
        with torch.no_grad(), precise(base), memory_off(memories), evaluating(base):
            for group in groups.values():
                shared, read = read_beginning(base, [ids[index] for index in group], precision=None)
                for batch in by_length([ids[index] for index in group], BATCH_SIZE):
                    rows = [group[place] for place in batch]
                    tails = [torch.tensor(ids[index][shared:]) for index in rows]
                    ends = torch.tensor([len(tail) - 1 for tail in tails])
                    # padding is on the right, where no earlier token sees it
                    padded = nn.utils.rnn.pad_sequence(tails, batch_first=True).to(device_of(base))
                    with autocast(base):
                        past = accepted(base, past_key_values=rows_of(read, [0] * len(rows)))
                        base(input_ids=padded, **past, **few_logits(base))
                    # some blocks flatten the batch
                    whole = [seen[path].reshape(*padded.shape, -1) for path in layers]
                    last = [states[torch.arange(len(rows)), ends].float().cpu() for states in whole]
                    for index, state in zip(rows, torch.cat(last, -1), strict=True):
                        found[index] = state
                    progress.update(len(rows))
    finally:
        progress.close()
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _input_width(base: Any, path: str) -> int:
    return widths(base.get_submodule(path), path, hidden_size(base))[0]
