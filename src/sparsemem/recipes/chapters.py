"""Diagnoses and their ICD-10 chapters: a medical task that a small model can learn without a download.

The titles are from ICD-10-CM in the package simple_icd_10_cm (MIT). Each question asks for the chapter of a
title, one of four. The three-character categories are split first, so no test category is in the training
data.
"""

import random
import re
from typing import Any

from .questions import require

_TITLES_PER_CATEGORY = 2
_SPLIT_SEED = 0


def chapter_items(num_train: int, num_test: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training items and test items: `question`, `choices` (four chapters), `answer` (index) and `code`.

    The items are the same on every machine with the same version of the data package.

    Raises:
        ValueError: there are not enough titles, or simple_icd_10_cm is not installed.
    """
    icd = require("simple_icd_10_cm")
    rng = random.Random(_SPLIT_SEED)
    # the last chapter, for special purposes, has only a few codes
    chapters = [code for code in icd.get_all_codes(True) if icd.is_chapter(code)][:-1]
    names = {code: re.sub(r" \([A-Z0-9]+-[A-Z0-9]+\)$", "", icd.get_description(code)) for code in chapters}
    by_category: dict[str, list[str]] = {}
    for code in icd.get_all_codes(True):
        if icd.is_leaf(code) and icd.get_ancestors(code)[-1] in names:
            by_category.setdefault(code[:3], []).append(code)
    categories = sorted(by_category)
    rng.shuffle(categories)
    drawn = []
    for category in categories:
        codes = by_category[category]
        drawn.append(rng.sample(codes, min(_TITLES_PER_CATEGORY, len(codes))))
    num_codes = sum(map(len, drawn))
    if num_train + num_test > num_codes:
        raise ValueError(
            f"num_train={num_train} and num_test={num_test} together are more than the "
            f"{num_codes} titles; lower one of them"
        )
    test: list[str] = []
    while len(test) < num_test:
        test += drawn.pop()
    train = [code for codes in drawn for code in codes]
    rng.shuffle(train)

    def item(code: str) -> dict[str, Any]:
        right = names[icd.get_ancestors(code)[-1]]
        choices = [right, *rng.sample([name for name in names.values() if name != right], 3)]
        rng.shuffle(choices)
        question = f'Which chapter of ICD-10 does the diagnosis "{icd.get_description(code)}" belong to?'
        return {"question": question, "choices": choices, "answer": choices.index(right), "code": code}

    return [item(code) for code in train[:num_train]], [item(code) for code in test[:num_test]]


def held_out_categories(
    items: list[dict[str, Any]], num_test: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split training items into items to learn and about `num_test` items of other categories."""
    held_out: set[str] = set()
    for item in items:
        if sum(one["code"][:3] in held_out for one in items) >= num_test:
            break
        held_out.add(item["code"][:3])
    learnt = [item for item in items if item["code"][:3] not in held_out]
    return learnt, [item for item in items if item["code"][:3] in held_out]
