"""What else changed: general questions, mentions and prose, answered and read before and after."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel

from ..adapter.tail import BASE_ROW
from ..data.general import prose
from ..data.mentions import PROBE_FORMS, mention_texts, prose_texts
from ..data.subjects import subjects_of
from ..precision import autocast, device_of
from .answering import answer_all, gates, read_states

# Asked of every model; none of them is in the shipped background.
GENERAL_QUESTIONS = (
    "What is the capital of Sweden?",
    "Who wrote Romeo and Juliet?",
    "What is the largest ocean on Earth?",
    "How many legs does a spider have?",
    "What gas do plants take in from the air?",
    "What is the opposite of hot?",
    "Name a fruit that is yellow.",
    "What is 7 plus 5?",
    "Which language is spoken in Brazil?",
    "Write one sentence about the sea.",
    "How do I boil an egg?",
    "Give me a tip for better sleep.",
)
NUM_SUBJECTS, MAX_TOKENS, PROSE_TOKENS = 4, 20, 256
# questions that are answered together, by the base and with memories
AT_ONCE = 8


def changes(
    model: PeftModel,
    tokenizer: Any,
    records: Sequence[dict[str, str]],
    memories: tuple[str, ...],
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Compare the base with the model in which memories speak.

    Args:
        records: what was taught; its subjects are mentioned in other questions and in prose.

    Returns:
        `{"questions", "mentions", "prose"}`: lists of `{"question", "base", "taught"}`, and of `{"name",
        "base", "taught", "in_scope"}` with perplexities and the share of tokens in scope.
    """
    subjects = subjects_of(records)[:NUM_SUBJECTS] if records else []
    named = [text for subject in subjects for text in mention_texts(subject, PROBE_FORMS[:2])]
    asked = [*GENERAL_QUESTIONS, *named]
    pairs = []
    for start in range(0, len(asked), AT_ONCE):
        progress("Asking other questions", start, len(asked))
        some = asked[start : start + AT_ONCE]
        rows = [(question, names) for question in some for names in ((), memories)]
        answers = answer_all(model, tokenizer, rows, max_tokens=MAX_TOKENS)
        for question, base, taught in zip(some, answers[::2], answers[1::2], strict=True):
            pairs.append({"question": question, "base": base.shown, "taught": taught.shown})
    progress("Reading prose", len(asked), len(asked))
    texts = [("Prose about other things", tokenizer(prose()[1]).input_ids[:PROSE_TOKENS])]
    texts += [
        (f"Prose that names {subject}", tokenizer(text).input_ids)
        for subject, text in zip(subjects, prose_texts(subjects), strict=True)
    ]
    read = [_read(model, name, ids, memories) for name, ids in texts]
    split = len(GENERAL_QUESTIONS)
    return {"questions": pairs[:split], "mentions": pairs[split:], "prose": read}


@torch.inference_mode()
def _read(model: PeftModel, name: str, tokens: list[int], memories: tuple[str, ...]) -> dict[str, Any]:
    """Perplexity of a text before and after, and the share of its tokens that are in scope."""
    ids = torch.tensor([tokens, tokens], device=device_of(model))
    with autocast(model):
        logits = model(input_ids=ids, use_cache=False, adapter_names=[BASE_ROW, memories or BASE_ROW]).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
    ).mean(1)
    base, taught = losses.exp().tolist()
    inside = 0.0
    if memories:
        inside = gates(model, read_states(model, tokens), memories).gt(0).any(0).float().mean().item()
    return {"name": name, "base": base, "taught": taught, "in_scope": inside}
