"""Turn records into tokens and labels.

Choices: prompt and answer are tokenised separately, so that training uses exactly the tokens that generation
starts from. The loss covers the answer and the token that ends it, and nothing after. Text is used unchanged.
Without a chat template a prompt is used as written; `conversations` says what becomes of messages.
"""

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..choices import LOSS_ON
from .conversations import QUESTION, conversation_text, exchanges, prompt_text, refusals, say_plain

# these can also be imported from here
from .reading import read_records  # noqa: F401
from .shapes import as_turns, form_of

logger = logging.getLogger(__name__)

__all__ = ["QUESTION"]
# Consecutive pieces of an example's text, and whether each is learnt.
Pieces = list[tuple[str, bool]]


def encode(
    records: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    loss_on: str = "completion",
) -> list[dict]:
    """`[{"input_ids": [tokens], "labels": [tokens]}]`; labels are -100 without loss; cut to `max_length`.

    `loss_on="completion"` puts the loss on the completion, every assistant turn, the right choice, or the
    whole text, each with the token that ends it (text has none). `"all"` puts it on every token. A record
    becomes one example, or one for each answer where the chat template rewrites earlier turns.

    Args:
        records: as `read_records` returns them.

    Raises:
        ValueError: unknown `loss_on`, or a record that the tokenizer or its chat template refuses.
    """
    if loss_on not in LOSS_ON:
        raise ValueError(f"loss_on={loss_on!r} is unknown; allowed are {', '.join(LOSS_ON)}")
    opening, examples = opening_ids(tokenizer), []
    for number, record in enumerate(records, start=1):
        try:
            examples += [
                _example(pieces, tokenizer, opening if _is_bare(record, tokenizer) else [], loss_on)
                for pieces in _pieces(record, tokenizer, loss_on)
            ]
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
    return examples if max_length is None else truncate(examples, max_length)[0]


def truncate(examples: Sequence[dict], max_length: int, limit: str = "max_length") -> tuple[list[dict], int]:
    """Examples cut to their first `max_length` tokens, and how many were cut.

    Examples in which no token with loss is left are dropped.

    Args:
        limit: what sets `max_length`, for error messages.

    Raises:
        ValueError: no example has a token with loss left.
    """
    num_cut = sum(len(example["input_ids"]) > max_length for example in examples)
    kept = [{key: value[:max_length] for key, value in example.items()} for example in examples]
    # the first token is never predicted, so its label does not count
    kept = [example for example in kept if any(label != -100 for label in example["labels"][1:])]
    if not kept:
        raise ValueError(
            f"no record has an answer to learn: {too_long(_shortest(examples), max_length, limit)}"
        )
    if num_cut:
        lost = len(examples) - len(kept)
        logger.warning(
            "%d of %d records truncated to %d tokens, %d left out", num_cut, len(examples), max_length, lost
        )
    return kept, num_cut


def too_long(num_tokens: int, room: int, limit: str = "this model's maximum context length") -> str:
    """The sentence about a prompt that leaves no room for an answer."""
    return f"the prompt has {num_tokens} tokens, and {limit} is {room}; shorten the prompt"


def _shortest(examples: Sequence[dict]) -> int:
    """The number of tokens before the first answer, where it is smallest."""
    return min(
        next(
            (place for place, label in enumerate(one["labels"]) if place and label != -100),
            len(one["labels"]),
        )
        for one in examples
    )


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a prompt that is to be completed; uses the chat template where there is one."""
    return question_ids(prompt, tokenizer) if tokenizer.chat_template else text_ids(prompt, tokenizer)


def question_ids(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a question that is to be answered, the same as `encode` puts before the answer."""
    return conversation_ids(as_turns(question), tokenizer)


def conversation_ids(turns: Sequence[dict], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """Tokens of a conversation whose next answer is to be generated; the options are those of `prompt_text`.

    Raises:
        ValueError: the tokenizer or its chat template refuses the turns.
    """
    text = prompt_text(turns, tokenizer, **options)
    return _ids(text, tokenizer) if tokenizer.chat_template else text_ids(text, tokenizer)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text that may be continued: after the tokenizer's opening, and without its end."""
    return [*_opening(text, tokenizer, opening_ids(tokenizer)), *_ids(text, tokenizer)]


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before text, such as BOS; often none."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    return ids[: ids.index(bare[0])]


def choice_prompt(item: dict) -> str:
    """A multiple-choice record's question and lettered options."""
    options = [f"{chr(ord('A') + index)}. {choice}" for index, choice in enumerate(item["choices"])]
    return "\n".join([item["question"], *options, "Answer:"])


def choice_text(choice: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an option after `choice_prompt`: with a space before it unless there is a chat template."""
    return choice if tokenizer.chat_template else f" {choice}"


def choice_tokens(item: dict, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[list[int]]]:
    """Token ids of a multiple-choice record's prompt, and of each option after it."""
    options = [choice_text(choice, tokenizer) for choice in item["choices"]]
    return prompt_ids(choice_prompt(item), tokenizer), tokenizer(options, add_special_tokens=False).input_ids


def collate(examples: Sequence[dict], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels`, each int64 [batch, seq], padded on the right."""
    length = max(len(example["input_ids"]) for example in examples)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([value + [fill] * (length - len(value)) for value in values])

    ids = [list(example["input_ids"]) for example in examples]
    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([[1] * len(value) for value in ids], 0),
        "labels": padded([list(example["labels"]) for example in examples], -100),
    }


def batches(examples: Sequence[dict], batch_size: int, pad_token_id: int) -> list[dict[str, Tensor]]:
    """Collated batches of `batch_size` examples in the given order."""
    starts = range(0, len(examples), batch_size)
    return [collate(examples[start : start + batch_size], pad_token_id) for start in starts]


def _pieces(record: dict, tokenizer: PreTrainedTokenizerBase, loss_on: str) -> list[Pieces]:
    """The examples that a record becomes."""
    form = form_of(record)
    if form == ("text",):
        return [[(record["text"], True)]]
    if form == ("messages",):
        return _conversation(record["messages"], tokenizer, record.get("tools"), loss_on)
    if form == ("prompt", "completion"):
        prompt, completion = record["prompt"], record["completion"]
    else:
        prompt = choice_prompt(record)
        completion = choice_text(record["choices"][record["answer"]], tokenizer)
    if not tokenizer.chat_template:
        say_plain()
        apart = prompt[-1:].strip() and completion[:1].strip()
        return [[(prompt, False), (f"{' ' if apart else ''}{completion}{tokenizer.eos_token or ''}", True)]]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _conversation(turns, tokenizer, None, loss_on)


def _conversation(
    turns: Sequence[dict], tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict] | None, loss_on: str
) -> list[Pieces]:
    """An answer continues the example before it, unless the template has rewritten that one's turns."""
    examples: list[Pieces] = []
    done = ""
    for prompt, answer in exchanges(turns, tokenizer, tools):
        if not examples or not prompt.startswith(done):
            examples.append([])
            done = ""
        examples[-1] += [(prompt[len(done) :], False), (answer, True)]
        done = prompt + answer
    if loss_on == "all" and (whole := conversation_text(turns, tokenizer, tools)).startswith(done):
        examples[-1].append((whole[len(done) :], False))
    return examples


def _example(
    pieces: Pieces, tokenizer: PreTrainedTokenizerBase, opening: list[int], loss_on: str
) -> dict[str, list[int]]:
    ids = [_ids(text, tokenizer) for text, _ in pieces]
    ids[0] = [*_opening(pieces[0][0], tokenizer, opening), *ids[0]]
    marks = [learnt or loss_on == "all" for _, learnt in pieces]
    labels = [piece if mark else [-100] * len(piece) for piece, mark in zip(ids, marks, strict=True)]
    return {"input_ids": list(chain(*ids)), "labels": list(chain(*labels))}


def _is_bare(record: dict, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's special tokens are still to come; a chat template writes them itself."""
    return not tokenizer.chat_template or form_of(record) == ("text",)


def _opening(text: str, tokenizer: PreTrainedTokenizerBase, opening: list[int]) -> list[int]:
    """The opening, or nothing where the text begins with the BOS token already."""
    return [] if tokenizer.bos_token and text.startswith(str(tokenizer.bos_token)) else opening


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    with refusals("tokenizer"):
        return tokenizer(text, add_special_tokens=False).input_ids
