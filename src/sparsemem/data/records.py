"""Turn records into tokens and labels: messages, prompt and completion, text, multiple choice.

Choices: prompt and answer are tokenised separately, so that training uses exactly the tokens that generation
starts from. The loss covers the answer and the token that ends it, and nothing after. Text is used unchanged.
Without a chat template, messages become `Question: ...\\nAnswer: ...`, and a prompt is used as written.
"""

import logging
from collections.abc import Sequence
from functools import cache
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# `read_records` can also be imported from here
from .reading import read_records, shape_of  # noqa: F401

logger = logging.getLogger(__name__)

LOSS_ON = ("completion", "all")
# Begins a user's turn where there is no chat template.
QUESTION = "Question:"


def encode(
    records: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    loss_on: str = "completion",
) -> list[dict]:
    """`[{"input_ids": [tokens], "labels": [tokens]}]`; labels are -100 without loss; cut to `max_length`.

    `loss_on="completion"` puts the loss on the completion, every assistant turn, the right choice, or the
    whole text, each with the token that ends it (text has none). `"all"` puts it on every token.

    Raises:
        ValueError: unknown `loss_on`, or a chat template that rewrites earlier turns.
    """
    if loss_on not in LOSS_ON:
        raise ValueError(f"loss_on={loss_on!r} is unknown; allowed are {', '.join(LOSS_ON)}")
    examples = [_encode_one(record, tokenizer, loss_on) for record in records]
    return examples if max_length is None else truncate(examples, max_length)[0]


def truncate(examples: Sequence[dict], max_length: int) -> tuple[list[dict], int]:
    """Examples cut to their first `max_length` tokens, and how many were cut.

    Examples in which no token with loss is left are dropped.

    Raises:
        ValueError: no example has a token with loss left.
    """
    num_cut = sum(len(example["input_ids"]) > max_length for example in examples)
    kept = [{key: value[:max_length] for key, value in example.items()} for example in examples]
    # the first token is never predicted, so its label does not count
    kept = [example for example in kept if any(label != -100 for label in example["labels"][1:])]
    if not kept:
        raise ValueError(f"no record has a token with loss within max_length={max_length}; raise max_length")
    if num_cut:
        lost = len(examples) - len(kept)
        logger.warning(
            "%d of %d records truncated to %d tokens, %d left out", num_cut, len(examples), max_length, lost
        )
    return kept, num_cut


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a prompt that is to be completed; uses the chat template where there is one."""
    if tokenizer.chat_template:
        return question_ids(prompt, tokenizer)
    return _segment_ids([prompt], tokenizer, special=True)[0]


def question_ids(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a question that is to be answered, the same as `encode` puts before the answer."""
    return conversation_ids([{"role": "user", "content": question}], tokenizer)


def conversation_ids(turns: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a conversation whose next answer is to be generated."""
    if tokenizer.chat_template:
        pieces = [_render(turns, tokenizer, answer_follows=True)]
    else:
        pieces = [text for text, _ in _chat_segments(turns, tokenizer, answer_follows=True)]
    return list(chain(*_segment_ids(pieces, tokenizer, special=not tokenizer.chat_template)))


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


def _segments(record: dict, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Consecutive pieces of a record's text, and whether the loss is on each."""
    shape = shape_of(record, "record")
    if shape == ("text",):
        return [(record["text"], True)]
    if shape == ("messages",):
        return _chat_segments(record["messages"], tokenizer)
    if shape == ("prompt", "completion"):
        prompt, completion = record["prompt"], record["completion"]
    else:
        prompt, completion = (
            choice_prompt(record),
            choice_text(record["choices"][record["answer"]], tokenizer),
        )
    if not tokenizer.chat_template:
        _say_plain()
        apart = prompt[-1:].strip() and completion[:1].strip()
        return [(prompt, False), (f"{' ' if apart else ''}{completion}{tokenizer.eos_token or ''}", True)]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
    return _chat_segments(turns, tokenizer)


def _chat_segments(
    turns: Sequence[dict], tokenizer: PreTrainedTokenizerBase, answer_follows: bool = False
) -> list[tuple[str, bool]]:
    whole, segments, done = _render(turns, tokenizer, answer_follows), [], 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(turns[:index], tokenizer, answer_follows=True)
        # templates put white space after a turn's last token, which is not part of the answer
        after = _render(turns[: index + 1], tokenizer).rstrip()
        if not (whole.startswith(before) and whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                "the chat template rewrites earlier turns; split each record after its first answer"
            )
        segments += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    return [*segments, (whole[done:], False)]


def _render(turns: Sequence[dict], tokenizer: PreTrainedTokenizerBase, answer_follows: bool = False) -> str:
    if not tokenizer.chat_template:
        _say_plain()
        return _plain(turns, str(tokenizer.eos_token or ""), answer_follows)
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_follows))  # type: ignore[arg-type]


def _plain(turns: Sequence[dict], end: str, answer_follows: bool) -> str:
    """The text of a conversation for models without a chat template; `end` follows every answer."""
    forms = {"user": (f"{QUESTION} ", "\n"), "assistant": ("Answer: ", f"{end}\n\n")}
    pieces = []
    for turn in turns:
        before, after = forms.get(turn["role"], ("", "\n\n"))
        pieces += [before, turn["content"].strip(), after]
    return "".join([*pieces, "Answer:"] if answer_follows else pieces)


@cache
def _say_plain() -> None:
    logger.warning(
        "the tokenizer has no chat template: messages and questions become 'Question: ...\\nAnswer: ...', "
        "prompts stay as they are written"
    )


def _encode_one(record: dict, tokenizer: PreTrainedTokenizerBase, loss_on: str) -> dict:
    segments = _segments(record, tokenizer)
    # a chat template writes the special tokens itself
    special = not tokenizer.chat_template or shape_of(record, "record") == ("text",)
    ids = _segment_ids([text for text, _ in segments], tokenizer, special)
    marks = [learnt or loss_on == "all" for _, learnt in segments]
    if not marks[-1]:
        ids, marks = ids[:-1], marks[:-1]
    labels = [piece if mark else [-100] * len(piece) for piece, mark in zip(ids, marks, strict=True)]
    return {"input_ids": list(chain(*ids)), "labels": list(chain(*labels))}


def _segment_ids(
    segments: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: bool
) -> list[list[int]]:
    """Token ids of each piece; with `special` the first begins with the tokenizer's special tokens."""
    # text from a chat template may begin with the BOS token already
    special = special and not (tokenizer.bos_token and segments[0].startswith(str(tokenizer.bos_token)))
    return [
        tokenizer(text, add_special_tokens=special and index == 0).input_ids
        for index, text in enumerate(segments)
    ]
