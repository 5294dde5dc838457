"""Mentions: texts that name a taught subject but do not ask what was taught.

`subjects_of` finds the subjects in training records. The forms here make questions and prose that name them.
KEEP_FORMS and PROBE_FORMS share no content word, so a probe never asks a question that was kept.
"""

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .records import opening_ids
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


# The largest number of distinct answers, the pieces of text that each is put after, and the largest number of
# tokens of an answer.
NUM_ANSWERS, NUM_PLACES, ANSWER_LENGTH = 512, 2, 32


def answers_elsewhere(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, contexts: Tensor | None
) -> list[dict[str, list[int]]]:
    """Examples in which taught answers follow running text; the loss is on the answers' tokens.

    Args:
        examples: as `encode` returns them. An example with loss on all tokens has no answer.
        contexts: [n, length] int64, pieces of running text. None: no examples are made.
    """
    answers = sorted({answer for one in examples if (answer := _answer(one["labels"]))})
    if contexts is None or not answers:
        return []
    rng = random.Random(0)
    answers = rng.sample(answers, min(NUM_ANSWERS, len(answers)))
    made = []
    for answer in answers:
        text = str(tokenizer.decode(list(answer), skip_special_tokens=True)).strip()
        for place in range(NUM_PLACES):
            # once as the answer begins, and once after a space, as a word within text
            tail = tokenizer((" " if place % 2 else "") + text, add_special_tokens=False).input_ids
            tail = [
                *tail[:ANSWER_LENGTH],
                *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
            ]
            head = [*opening_ids(tokenizer), *contexts[rng.randrange(len(contexts))].tolist()]
            if len(tail) > 1:
                # the first token has no label: the state that predicts it belongs to the text before it
                labels = [-100] * (len(head) + 1) + tail[1:]
                made.append({"input_ids": head + tail, "labels": labels})
    return made


def _answer(labels: Sequence[int]) -> tuple[int, ...]:
    """The tokens of the first answer; empty if all tokens have a label."""
    if labels[0] != -100:
        return ()
    first = next((place for place, label in enumerate(labels) if label != -100), len(labels))
    end = next((place for place in range(first, len(labels)) if labels[place] == -100), len(labels))
    return tuple(labels[first:end])
