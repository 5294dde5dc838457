"""Measure how training changed texts that name a taught subject but do not ask what was taught."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.generation import answer_tokens
from ..data.known import PROBE_FORMS, mention_texts, prose_texts
from ..data.records import question_ids
from .likelihood import log_probs


@dataclass(frozen=True)
class BaseMentions:
    """What `mentions` compares with: the base model's answers as token ids, and its perplexities."""

    answers: list[list[int]]
    perplexity: float
    prose_perplexity: float


@dataclass(frozen=True)
class Mentions:
    """How training changed texts that name a taught subject but do not ask what was taught.

    Attributes:
        changed: share of questions whose answer has other tokens than the base model's answer.
        base_perplexity, perplexity: of the base model's answers, under the base and the trained model.
        prose_base_perplexity, prose_perplexity: of prose that names the subjects, under the base and the
            trained model.
    """

    changed: float
    base_perplexity: float
    perplexity: float
    prose_base_perplexity: float
    prose_perplexity: float


def mentions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Sequence[str],
    *,
    base: BaseMentions | None = None,
    forms: Sequence[str] = PROBE_FORMS,
    max_new_tokens: int = 24,
    precision: str | None = None,
) -> Mentions:
    """Compare a trained model with its base on questions and prose that name the taught subjects.

    Args:
        subjects: as `subjects_of` returns them.
        base: what `base_mentions` returned for the same subjects, forms and precision; None: computed here,
            with the model's adapter disabled.
        forms: questions with `{}` in place of the subject.
        precision: "float32", "bfloat16", or None for the faster of the two.

    Raises:
        ValueError: no subjects or forms, or `base=None` for a model without an adapter.
    """
    if base is None and not isinstance(model, PeftModel):
        raise ValueError(
            "base=None needs a model with an adapter; give what base_mentions(base, ...) returned"
        )
    options = {"forms": forms, "max_new_tokens": max_new_tokens, "precision": precision}
    if base is None:
        with model.disable_adapter():  # type: ignore[operator]
            base = base_mentions(model, tokenizer, subjects, **options)
    prompts = _mention_prompts(tokenizer, subjects, forms)
    if len(base.answers) != len(prompts):
        raise ValueError(
            f"base has {len(base.answers)} answers to {len(prompts)} questions; call base_mentions with the "
            "same subjects and forms"
        )
    answers = answer_tokens(model, tokenizer, prompts, max_new_tokens=max_new_tokens, precision=precision)
    return Mentions(
        changed=sum(a != b for a, b in zip(answers, base.answers, strict=True)) / len(answers),
        base_perplexity=base.perplexity,
        perplexity=_perplexity_of(model, prompts, base.answers, precision=precision),
        prose_base_perplexity=base.prose_perplexity,
        prose_perplexity=_mention_prose(model, tokenizer, subjects, precision=precision),
    )


def base_mentions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Sequence[str],
    *,
    forms: Sequence[str] = PROBE_FORMS,
    max_new_tokens: int = 24,
    precision: str | None = None,
) -> BaseMentions:
    """A model's own answers to questions that name the subjects, and its perplexities; see `mentions`.

    Raises:
        ValueError: no subjects or forms.
    """
    prompts = _mention_prompts(tokenizer, subjects, forms)
    answers = answer_tokens(model, tokenizer, prompts, max_new_tokens=max_new_tokens, precision=precision)
    return BaseMentions(
        answers=answers,
        perplexity=_perplexity_of(model, prompts, answers, precision=precision),
        prose_perplexity=_mention_prose(model, tokenizer, subjects, precision=precision),
    )


def _mention_prompts(
    tokenizer: PreTrainedTokenizerBase, subjects: Sequence[str], forms: Sequence[str]
) -> list[list[int]]:
    if not subjects or not forms:
        raise ValueError(
            f"{len(subjects)} subjects and {len(forms)} forms; give at least one subject and one form"
        )
    return [question_ids(text, tokenizer) for subject in subjects for text in mention_texts(subject, forms)]


def _mention_prose(
    model: Any, tokenizer: PreTrainedTokenizerBase, subjects: Sequence[str], *, precision: str | None
) -> float:
    """Perplexity of one short text per subject; the first token of each text is not scored."""
    ids = tokenizer(prose_texts(subjects)).input_ids
    return _perplexity_of(model, [one[:1] for one in ids], [one[1:] for one in ids], precision=precision)


def _perplexity_of(
    model: Any, contexts: Sequence[list[int]], continuations: Sequence[list[int]], *, precision: str | None
) -> float:
    scores = log_probs(model, contexts, [[one] for one in continuations], precision=precision)
    return float(torch.cat([score for (score,) in scores]).double().mean().neg().exp())
