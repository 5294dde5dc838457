"""Answers to look at: several at once, token by token, and how far in scope each token was."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..adapter.layers import BASE_ROW, tail_of
from ..background.states import layer_inputs
from ..data.conversations import QUESTION, end_tokens
from ..data.general import prose
from ..data.known import prose_texts
from ..data.shapes import Turns, as_turns
from ..data.subjects import asked as question_of
from ..data.subjects import subjects_of
from ..evaluation.answers import is_right
from ..evaluation.neighbours import Asked, context_questions, neighbour_questions, turn_ids
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

    def __init__(
        self, asked: str | Turns, memories: tuple[str, ...], tokenizer: Any, begun: Sequence[int] = ()
    ) -> None:
        """Args:
        begun: tokens of the answer that are there already, to be continued.
        """
        self._begun = list(begun)
        self._prompt = turn_ids(as_turns(asked), tokenizer)
        self.row = Row([*self._prompt, *begun], memories, Sampling(temperature=0))
        # a model without a chat template goes on with the next question
        self._text = AnswerText(tokenizer, [] if tokenizer.chat_template else [f"\n{QUESTION}"])
        self.pieces = [self._text.add(token) for token in begun]
        self.cut = self.ended = False

    @property
    def shown(self) -> str:
        """The text, with a mark where it was cut off."""
        return f"{self.text} …" if self.cut else self.text

    @property
    def text(self) -> str:
        return "".join(self.pieces).strip()

    @property
    def tokens(self) -> list[int]:
        return [*self._begun, *self.row.tokens]

    def advance(self, ends: set[int], max_tokens: int) -> None:
        """Take the row's last token."""
        token = self.row.tokens[-1]
        if token in ends:
            self.ended = True
            if self.pieces:
                self.pieces[-1] += self._text.rest()
            return
        self.pieces.append(self._text.add(token))
        self.ended = self._text.stopped
        self.cut = len(self.row.tokens) >= max_tokens and not self.ended

    def gates(self, model: PeftModel) -> tuple[Tensor, Tensor]:
        """As `gates` of the text, for each token of the answer: the state in front of a token decides it."""
        inside, places = gates(model, [*self._prompt, *self.tokens], self.row.memories)
        return inside[:, len(self._prompt) - 1 : -1], places[:, len(self._prompt) - 1 : -1]


def answering(model: Any, tokenizer: Any, answers: Sequence[Answer], *, max_tokens: int) -> Iterator[None]:
    """Answers side by side, at most MAX_BATCH; each has one token more whenever this yields."""
    decoder, ends = Decoder(model), end_tokens(model, tokenizer)
    decoder.join([answer.row for answer in answers])
    running = list(answers)
    while running:
        for answer in running:
            answer.advance(ends, max_tokens)
        done = [answer for answer in running if answer.ended or answer.cut]
        decoder.leave([answer.row for answer in done])
        running = [answer for answer in running if answer not in done]
        yield
        if running:
            decoder.step()


def answer_all(
    model: Any, tokenizer: Any, asked: Sequence[tuple[str | Turns, tuple[str, ...]]], *, max_tokens: int
) -> list[Answer]:
    """Greedy answers to questions, or to conversations that end with one, each with its memories."""
    answers = [Answer(one, memories, tokenizer) for one, memories in asked]
    for start in range(0, len(answers), MAX_BATCH):
        for _ in answering(model, tokenizer, answers[start : start + MAX_BATCH], max_tokens=max_tokens):
            pass
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
NUM_SUBJECTS, NUM_IN_CONTEXTS, MAX_TOKENS, PROSE_TOKENS = 4, 2, 20, 256
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
        `{"questions", "neighbours", "contexts", "prose"}`: lists of `{"question", "base", "taught"}`, and of
        `{"name", "base", "taught", "in_scope"}` with perplexities and the share of tokens in scope. Contexts
        are taught questions behind system prompts, in later turns and in longer texts; they have `"right"`.
    """
    subjects = subjects_of(records)[:NUM_SUBJECTS] if records else []
    near = neighbour_questions(records, NUM_SUBJECTS) if subjects else []
    inside = context_questions(records, NUM_IN_CONTEXTS) if any(map(question_of, records)) else []
    general = [Asked("general", tuple(as_turns(text))) for text in GENERAL_QUESTIONS]
    asked = [*general, *near, *inside]
    pairs: list[dict[str, Any]] = []
    for start in range(0, len(asked), AT_ONCE):
        progress("Asking other questions", start, len(asked))
        some = asked[start : start + AT_ONCE]
        rows = [(one.turns, names) for one in some for names in ((), memories)]
        answers = answer_all(model, tokenizer, rows, max_tokens=MAX_TOKENS)
        for one, base, taught in zip(some, answers[::2], answers[1::2], strict=True):
            pair: dict[str, Any] = {"question": _shown(one.turns), "base": base.shown, "taught": taught.shown}
            if one.answer is not None:
                begun = taught.cut and one.answer.startswith(taught.text)
                pair["right"] = begun or is_right(taught.text, one.answer)
            pairs.append(pair)
    progress("Reading prose", len(asked), len(asked))
    texts = [("Prose about other things", tokenizer(prose()[1]).input_ids[:PROSE_TOKENS])]
    texts += [
        (f"Prose that names {subject}", tokenizer(text).input_ids)
        for subject, text in zip(subjects, prose_texts(subjects), strict=True)
    ]
    read = [_read(model, name, ids, memories) for name, ids in texts]
    parts = iter(pairs)
    found = {
        name: list(islice(parts, len(of_part)))
        for name, of_part in (("questions", general), ("neighbours", near), ("contexts", inside))
    }
    return {**found, "prose": read}


def _shown(turns: Turns) -> str:
    """A conversation on one line."""
    marks = {"system": "[{}] ", "user": "{}", "assistant": " → {} → "}
    return "".join(marks[turn["role"]].format(turn["content"]) for turn in turns)


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
