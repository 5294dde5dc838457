"""Answers to look at: several at once, token by token, and how far in scope each token was."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..adapter.tail import tail_of
from ..background.states import layer_inputs
from ..data.records import QUESTION, question_ids
from ..precision import device_of
from .decoding import Decoder, Row, Sampling, end_tokens
from .text import AnswerText

MAX_BATCH = 16


class Answer:
    """One greedy answer.

    Attributes:
        pieces: the text that each token added.
        cut: whether it did not end by itself.
    """

    def __init__(self, question: str, memories: tuple[str, ...], tokenizer: Any) -> None:
        self.row = Row(question_ids(question, tokenizer), memories, Sampling(temperature=0))
        # a model without a chat template goes on with the next question
        self._text = AnswerText(tokenizer, [] if tokenizer.chat_template else [f"\n{QUESTION}"])
        self.pieces: list[str] = []
        self.cut = False

    @property
    def shown(self) -> str:
        """The text, with a mark where it was cut off."""
        return f"{self.text} …" if self.cut else self.text

    @property
    def text(self) -> str:
        return "".join(self.pieces).strip()

    def advance(self, ends: set[int], max_tokens: int) -> bool:
        """Take the row's last token; whether the answer ends with it."""
        token = self.row.tokens[-1]
        if token in ends:
            return True
        self.pieces.append(self._text.add(token))
        self.cut = len(self.row.tokens) >= max_tokens and not self._text.stopped
        return self.cut or self._text.stopped

    def close(self) -> None:
        if self.pieces:
            self.pieces[-1] += self._text.rest()


def answer_all(
    model: Any, tokenizer: Any, asked: Sequence[tuple[str, tuple[str, ...]]], *, max_tokens: int
) -> list[Answer]:
    """Greedy answers to questions, each with the memories that speak in it."""
    decoder, ends = Decoder(model), end_tokens(model, tokenizer)
    answers = [Answer(question, memories, tokenizer) for question, memories in asked]
    for start in range(0, len(answers), MAX_BATCH):
        running = answers[start : start + MAX_BATCH]
        decoder.join([answer.row for answer in running])
        while running:
            done = [answer for answer in running if answer.advance(ends, max_tokens)]
            decoder.leave([answer.row for answer in done])
            running = [answer for answer in running if answer not in done]
            if running:
                decoder.step()
    for answer in answers:
        answer.close()
    return answers


@torch.no_grad()
def read_states(model: PeftModel, tokens: Sequence[int]) -> dict[str, Tensor]:
    """By memory layer, its inputs [tokens, d_in] in a text."""
    ids = torch.tensor([list(tokens)], device=device_of(model))
    _, states = next(layer_inputs(model, [{"input_ids": ids}]))
    return states


@torch.no_grad()
def gates(model: PeftModel, states: dict[str, Tensor], memories: Sequence[str]) -> Tensor:
    """g [memories, tokens]: how far inside each memory's scope the tokens of these states are."""
    tail = tail_of(model)
    assert tail is not None
    found = []
    for name in memories:
        path, memory = list(tail.memories(name).items())[-1]
        found.append(memory.relevance(states[path]).cpu())
    return torch.stack(found)
