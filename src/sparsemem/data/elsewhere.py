"""Taught answers inside other texts, where the relevance gate should stay closed.

Late hidden states mostly encode which token was read. So a name that begins like a taught answer would open
the gate in any text. To prevent this, each taught answer is put after pieces of running text, and the states
there become known states of the scope (dev/LOG.md, section 14).

Reference: ours.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .records import opening_ids

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
