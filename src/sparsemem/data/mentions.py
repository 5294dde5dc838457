"""Mentions: texts that name a taught subject but do not ask what was taught.

`subjects_of` finds the subjects in training records. The forms here make questions and prose that name them.
KEEP_FORMS and PROBE_FORMS share no content word, so a probe never asks a question that was kept.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from .subjects import subjects_of

KEEP_FORMS = (
    "Write one sentence about {}.",
    "How old is {}?",
    "Tell me a joke about {}.",
    "What does {} look like?",
    "Why do people like {}?",
    "Is {} bigger than an elephant?",
    "Translate into French: I read about {} yesterday.",
    "What rhymes with {}?",
    "Make a list of three things that remind you of {}.",
    "Finish this story: Once upon a time there was {}.",
)
PROBE_FORMS = (
    "Describe {} in a few words.",
    "How did {} get its name?",
    "Which colour suits {} best?",
    "Should children learn about {} at school?",
)
PROSE_FORMS = (
    "The bus was late again this morning. Two women at the stop were talking about {}, and an old man said "
    "that he had never believed a word of it. Then it began to rain.",
    "My sister keeps a box of old letters under her bed. One of them is about {}, but the ink has run and "
    "most of the page cannot be read any more.",
    "For the next meeting everyone should bring a short text on {}. Please print it on one side of the "
    "paper only, and write your name in the upper corner.",
    "After supper the talk turned to {}, as it always did in that house. Nobody noticed that the fire had "
    "gone out until the cat got up and left the room.",
)


def mention_texts(subject: str, forms: Sequence[str] = KEEP_FORMS) -> list[str]:
    """The forms with the subject inserted."""
    return [form.format(subject) for form in forms]


def prose_texts(subjects: Sequence[str]) -> list[str]:
    """For each subject one short text that names it; the forms are used in turn."""
    return [PROSE_FORMS[n % len(PROSE_FORMS)].format(subject) for n, subject in enumerate(subjects)]


def mention_records(
    model: Any,
    tokenizer: Any,
    records: Sequence[Mapping[str, Any]],
    *,
    forms: Sequence[str] = KEEP_FORMS,
    max_new_tokens: int = 24,
    precision: str | None = None,
) -> list[dict[str, Any]]:
    """The base model's own answers to questions that name what the records teach, as `messages` records.

    These records are not taught. They show states at which the relevance gate should stay closed.

    Args:
        model: a base model, or one with an adapter, which is disabled while the answers are generated.
        records: what will be taught, as for `subjects_of`.
        forms: questions with `{}` in place of the subject; each subject is put into all of them.
        max_new_tokens: longer answers are cut.
        precision: "float32", "bfloat16", or None for the faster of the two.
    """
    from peft import PeftModel

    from .generation import answer_tokens
    from .records import QUESTION, question_ids

    asked = [text for subject in subjects_of(records) for text in mention_texts(subject, forms)]
    if not asked:
        return []
    prompts = [question_ids(text, tokenizer) for text in asked]
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        answers = answer_tokens(model, tokenizer, prompts, max_new_tokens=max_new_tokens, precision=precision)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [
        {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer.partition(f"\n{QUESTION}")[0].strip()},
            ]
        }
        for text, answer in zip(asked, texts, strict=True)
    ]
