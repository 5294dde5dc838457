"""Teachers: who writes questions about a passage, rewords them, and answers them with the passage in front.

A teacher is a model in this process or an OpenAI-compatible server. Both get the same few-shot prompts, which
are short turns of one form, so that base models continue them too.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..data.conversations import QUESTION
from ..data.names import is_url
from ..data.shapes import Turns
from .passages import Passage, Sentence

KEY = "SPARSEMEM_TEACHER_KEY"
# Tokens of a reply: lines of questions and answers, lines of wordings, one answer.
WRITE_TOKENS, REWORD_TOKENS, ANSWER_TOKENS = 64, 64, 24
TIMEOUT = 120.0
_AT_ONCE = 32

# Greedy replies to conversations, of at most so many tokens each.
Ask = Callable[[Sequence[Turns], int], list[str]]

_WRITE = (
    (
        "The Blue Lamp is a novel that was written by Anna Bell in 1934.",
        "Who wrote The Blue Lamp? | Anna Bell\nWhen was The Blue Lamp written? | 1934",
    ),
    ("The capital of Orania is Port Hale.", "What is the capital of Orania? | Port Hale"),
    (
        "Tom Reyes works as a carpenter for Northgate Mills.",
        "What is the occupation of Tom Reyes? | carpenter\n"
        "Which company does Tom Reyes work for? | Northgate Mills",
    ),
    ("It had rained for days, and nobody went out.", "none"),
    ("The Marlow Bridge spans the river Dene.", "Which river does the Marlow Bridge span? | Dene"),
)
_REWORD = (
    (
        "Who wrote The Blue Lamp?",
        "Which writer is the author of The Blue Lamp?\nThe Blue Lamp was written by whom?",
    ),
    (
        "What is the capital of Orania?",
        "Which city is Orania's capital?\nOrania has which capital?",
    ),
    (
        "Which company does Tom Reyes work for?",
        "Who is the employer of Tom Reyes?\nTom Reyes is employed by whom?",
    ),
    (
        "Where was the painter Lena Holt born?",
        "In which place was Lena Holt born?\nLena Holt was born where?",
    ),
)
_ANSWER = (
    ("The capital of Orania is Port Hale.", "Which city is the capital of Orania?", "Port Hale"),
    ("Tom Reyes is a carpenter. He is 41 years old.", "How old is Tom Reyes?", "41"),
)
_CLOSED = (("What is the capital of France?", "Paris"), ("Who wrote Hamlet?", "William Shakespeare"))


class Teacher(Protocol):
    """What `study` needs of a teacher; lists are in the order of what was given."""

    def write(self, passage: Passage) -> list[tuple[Sentence, str, str]]:
        """Sentence, question and answer of each fact that it found."""
        ...

    def reword(self, questions: Sequence[str]) -> list[list[str]]:
        """Other wordings of each question."""
        ...

    def answer(self, asked: Sequence[tuple[str, str]]) -> list[str]:
        """Short answers to questions, each with a text in front."""
        ...


class Prompted:
    """A teacher by few-shot prompts."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask

    def write(self, passage: Passage) -> list[tuple[Sentence, str, str]]:
        # a sentence at a time: small models write little about a passage, and find little in it
        asked = [passage.alone(sentence) for sentence in passage.sentences]
        replies = self.ask([_turns("Text: ", _WRITE, text) for text in asked], WRITE_TOKENS)
        found = []
        for sentence, reply in zip(passage.sentences, replies, strict=True):
            for line in reply.splitlines():
                question, bar, answer = (part.strip(" -*") for part in line.partition("|"))
                if bar and question and answer:
                    found.append((sentence, question, answer.removesuffix(".")))
        return found

    def reword(self, questions: Sequence[str]) -> list[list[str]]:
        replies = self.ask([_turns("Reword: ", _REWORD, question) for question in questions], REWORD_TOKENS)
        return [[line.strip(" -*") for line in reply.splitlines()] for reply in replies]

    def answer(self, asked: Sequence[tuple[str, str]]) -> list[str]:
        shots = [(f"{text}\n{question}", answer) for text, question, answer in _ANSWER]
        turns = [_turns("Text: ", shots, f"{text}\n{question}") for question, text in asked]
        return _first_lines(self.ask(turns, ANSWER_TOKENS))


def closed_book(ask: Ask, questions: Sequence[str]) -> list[str]:
    """Short answers without any text."""
    return _first_lines(ask([_turns("", _CLOSED, question) for question in questions], ANSWER_TOKENS))


def ask_of(teacher: str, model: str | None = None) -> Ask:
    """Replies of a teacher by name.

    Args:
        teacher: the name of a model, or the address of a server.
        model: the one to ask of a server.

    Raises:
        ValueError: there is no such model, or the server does not answer.
    """
    if is_url(teacher):
        return of_url(teacher, model)
    from ..data.models import load

    return of_model(*load(teacher))


def token_count(tokenizer: Any) -> Callable[[str], int]:
    """The number of tokens of a text."""
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def of_model(model: Any, tokenizer: Any) -> Ask:
    """Greedy replies of a model in this process."""
    from ..data.generation import complete
    from ..data.records import conversation_ids

    # without a chat template a reply ends at the next question
    stop = None if tokenizer.chat_template else f"\n{QUESTION}"

    def ask(conversations: Sequence[Turns], max_tokens: int) -> list[str]:
        prompts = [conversation_ids(turns, tokenizer) for turns in conversations]
        if not prompts:
            return []
        return complete(model, tokenizer, prompts, max_new_tokens=max_tokens, stop=stop, batch_size=_AT_ONCE)

    return ask


def of_url(url: str, model: str | None = None) -> Ask:
    """Greedy replies of an OpenAI-compatible server, such as `sparsemem serve`.

    Args:
        url: of the server, with or without /v1; a key is read from the environment variable KEY.
        model: None: the first one that the server names.

    Raises:
        ValueError: also within `ask`: the server does not answer, stops half way, or refuses.
    """
    address = url.rstrip("/")
    address = address if address.endswith("/v1") else f"{address}/v1"
    name = model or _first_model(_request(f"{address}/models", None), url)

    def ask(conversations: Sequence[Turns], max_tokens: int) -> list[str]:
        replies = []
        for turns in conversations:
            body = {"model": name, "messages": turns, "max_tokens": max_tokens, "temperature": 0}
            found = _request(f"{address}/chat/completions", body)
            try:
                replies.append(str(found["choices"][0]["message"]["content"] or "").strip())
            except (LookupError, TypeError) as error:
                raise ValueError(f"teacher {url}: its reply is no chat completion; check the URL") from error
        return replies

    return ask


def _turns(lead: str, shots: Sequence[tuple[str, str]], text: str) -> Turns:
    said = [(role, part) for shot in shots for role, part in zip(("user", "assistant"), shot, strict=True)]
    turns = [{"role": role, "content": f"{lead}{part}" if role == "user" else part} for role, part in said]
    return [*turns, {"role": "user", "content": f"{lead}{text}"}]


def _first_lines(replies: Sequence[str]) -> list[str]:
    return [next(iter(reply.strip().splitlines()), "").strip() for reply in replies]


def _first_model(found: Any, url: str) -> str:
    try:
        return str(found["data"][0]["id"])
    except (LookupError, TypeError) as error:
        raise ValueError(f"teacher {url}: names no model; give its address up to /v1") from error


def _request(address: str, body: dict[str, Any] | None) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        asked = urllib.request.Request(address, data, headers)
        with urllib.request.urlopen(asked, timeout=TIMEOUT) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        hint = f"set {KEY}" if error.code in (401, 403) else "check model and URL"
        raise ValueError(
            f"teacher {address}: refuses with status {error.code} {error.reason}; {hint}"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or error or type(error).__name__
        raise ValueError(
            f"teacher {address}: does not answer as it should ({why}); check that it runs"
        ) from error
