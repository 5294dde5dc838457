"""Answers to look at: several at once, token by token, and how far in scope each token was."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..adapter.layers import BASE_ROW, tail_of
from ..background.states import layer_inputs
from ..data.conversations import QUESTION, end_tokens
from ..data.general import prose
from ..data.known import prose_texts
from ..data.records import question_ids
from ..data.subjects import subjects_of
from ..evaluation.neighbours import neighbour_questions
from ..precision import autocast, device_of
from .decoding import Decoder, Row, Sampling
from .engine import AnswerText

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
def gates(model: PeftModel, tokens: Sequence[int], memories: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """How far inside each memory's scope the tokens of a text are, and which taught answers are given there.

    Returns:
        g [memories, tokens] float32, and [memories, tokens] int64, the places as from `places_of`.
    """
    tail = tail_of(model)
    assert tail is not None
    ids = torch.tensor([list(tokens)], device=device_of(model))
    _, states = next(layer_inputs(model, [{"input_ids": ids}]))
    with tail.recording() as given, autocast(model):
        model(input_ids=ids, use_cache=False, adapter_names=[memories])
    inside, places = [], []
    for name in memories:
        path, memory = list(tail.memories(name).items())[-1]
        there = given[name][0].cpu() if name in given else torch.full((len(tokens),), -1)
        inside.append(torch.where(there >= 0, 1.0, memory.relevance(states[path]).cpu()))
        places.append(there)
    return torch.stack(inside), torch.stack(places)


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
        records: what was taught; its subjects are named in prose, its neighbours asked about.

    Returns:
        `{"questions", "neighbours", "prose"}`: lists of `{"question", "base", "taught"}`, and of `{"name",
        "base", "taught", "in_scope"}` with perplexities and the share of tokens in scope.
    """
    subjects = subjects_of(records)[:NUM_SUBJECTS] if records else []
    near = neighbour_questions(records, NUM_SUBJECTS) if subjects else []
    asked = [*GENERAL_QUESTIONS, *(one.turns[-1]["content"] for one in near)]
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
    return {"questions": pairs[:split], "neighbours": pairs[split:], "prose": read}


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
        inside = gates(model, tokens, memories)[0].gt(0).any(0).float().mean().item()
    return {"name": name, "base": base, "taught": taught, "in_scope": inside}
