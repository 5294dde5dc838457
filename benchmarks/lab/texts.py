"""The lab's training data and questions as cached states.

Recipes report on none of these texts except `prose("probe")`, which must only be used for reporting.
"""

import json
import os
import random
import sys
from dataclasses import fields
from pathlib import Path

import torch
from cache import (
    States,
    base,
    kept,
    states_of_choices,
    states_of_examples,
    states_of_records,
    states_of_tokens,
)

from sparsemem.compare.recipes.medical import chapter_items
from sparsemem.compare.recipes.runs import background, tokens
from sparsemem.data.general import prose as topics
from sparsemem.data.records import prompt_ids
from sparsemem.evaluation.probes import complete, is_right

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import choose  # noqa: E402

NUM_FOLDS = 4
# Forms of texts that name a subject: those that a user could make from the data, and those for evaluation.
KEEP_FORMS = (
    "Write one sentence about {}.",
    "How old is {}?",
    "Tell me a story about {}.",
    "Is {} famous?",
    "What do you think of {}?",
    "What does the name {} mean?",
    "Write a short poem that mentions {}.",
    "Explain to a child what {} is.",
)
OTHER_FORMS = ("What colour is {}?", "Why do people like {}?", "Translate into French: I have heard of {}.")


def handbook() -> tuple[States, torch.Tensor]:
    """The choosing handbook in all wordings, and for each record its fold (held-out wording), [examples]."""
    items, folds = [], []
    for fold in range(NUM_FOLDS):
        heldout = choose.handbook(fold)[1]
        items += heldout
        folds += [fold] * len(heldout)
    records = [{"prompt": item["question"], "completion": item["answer"]} for item in items]
    return states_of_records("handbook", records), torch.tensor(folds)


def general() -> States:
    """The base model's own correct answers to general questions."""
    items = choose.general()
    return _own_answers("general", [item["question"] for item in items], 12, items)


def mentions(forms: tuple[str, ...], name: str) -> States:
    """The base model's own answers to questions that name a taught subject, form by form."""
    lines = (HERE.parent / "choosing" / "handbook.jsonl").read_text(encoding="utf-8").splitlines()
    subjects = [json.loads(line)["subject"] for line in lines]
    return _own_answers(name, [form.format(subject) for form in forms for subject in subjects], 24)


def keep(num_forms: int) -> States:
    """`mentions` with the first `num_forms` forms of KEEP_FORMS, used as known states."""
    parts = [mentions((form,), f"keep-{n}") for n, form in enumerate(KEEP_FORMS[:num_forms])]
    flat = (torch.cat([getattr(part, f.name) for part in parts]) for f in fields(States)[1:])
    return States(torch.cat([part.x for part in parts], 1), *flat)


def general_text(seed: int) -> tuple[States, int]:
    """The recipes' background at every position, and the number of chats; pieces of prose follow."""
    texts = background(seed, base()[1], 2048, 256)
    records = [{"text": one} if isinstance(one, str) else one for one in texts]
    num_chats = sum("messages" in one for one in records)
    return states_of_records(f"background{seed}", records, everywhere=True), num_chats


def elsewhere(taught: States, num_contexts: int, seed: int) -> States:
    """States of each taught answer inside background prose, where it answers no question."""
    tokenizer = base()[1]
    prose_ids = tokens(tokenizer, topics()[0], 2048).tolist()
    rng = random.Random(seed)
    answers = sorted({tuple(taught.label[taught.example == n].tolist()) for n in taught.example.unique()})
    examples = []
    for answer in answers:
        text = tokenizer.decode(answer[:-1])
        for context in range(num_contexts):
            at = rng.randrange(len(prose_ids) - 24)
            # as the answer begins, and as a word of running text
            tail = tokenizer((" " if context % 2 else "") + text, add_special_tokens=False).input_ids
            ids = prose_ids[at : at + 24] + tail + [tokenizer.eos_token_id]
            examples.append({"input_ids": ids, "labels": [-100] * 24 + ids[24:]})
    states = states_of_examples(f"elsewhere{num_contexts}", examples)
    return states[~states.start]


def prose(part: str) -> States:
    """What recipes read ("probe"), 4,096 later tokens of its source ("choose"), WikiText-2 ("wiki")."""
    tokenizer = base()[1]
    if part == "wiki":
        file = Path(os.environ["SPARSEMEM_SHARED_DATA"]) / "wikitext2_raw_test.txt"
        ids = tokens(tokenizer, file.read_text(encoding="utf-8"), 4096)
    else:
        ids = tokens(tokenizer, topics()[1], 3072 + 4096)
        ids = ids[:2048] if part == "probe" else ids[3072:]
    return states_of_tokens(f"prose-{part}", ids)


def chapters(num_train: int = 1600, num_asked: int = 200) -> tuple[States, States, list[int]]:
    """Of the medical recipe's training records some to teach; choices of others, of other categories."""
    items = chapter_items(2400, 400)[0]
    taught = items[:num_train]
    categories = {item["code"][:3] for item in taught}
    asked = [item for item in items[num_train:] if item["code"][:3] not in categories][:num_asked]
    assert len(asked) == num_asked
    records = [{"prompt": item["question"], "completion": item["choices"][item["answer"]]} for item in taught]
    return states_of_records("chapters", records), *states_of_choices("chapters-asked", asked)


def _own_answers(name: str, questions: list[str], length: int, items: list[dict] | None = None) -> States:
    model, tokenizer = base()

    def ask() -> list[str]:
        ids = [prompt_ids(question, tokenizer) for question in questions]
        return complete(model, tokenizer, ids, max_new_tokens=length, batch_size=40)

    answers = kept(f"{name}-answers", [questions, length], ask)
    pairs = list(zip(questions, answers, items or questions, strict=True))
    right = [(q, a) for q, a, item in pairs if a and (items is None or is_right(a, item["answer"]))]
    return states_of_records(name, [{"prompt": question, "completion": answer} for question, answer in right])
