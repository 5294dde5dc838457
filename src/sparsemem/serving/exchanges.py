"""Exchanges: questions to the base and to what was taught, side by side, in conversations.

Each side has its own history: the base goes on from the base's answers. An exchange is kept in the page's
file: {"number", "follows", "question", "base", "taught"}, with the number of the exchange before it in its
conversation or None; "cut" and "tokens", by side, to continue an answer; and for the taught side "pieces",
{"text", "gate", "lesson"} of each token, and the lesson that spoke most with its title and source.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

from ..data.models import context_length
from ..data.records import too_long
from ..data.shapes import Turns
from ..stream.documents import place_of
from .answering import Answer, answering
from .lessons import GIVEN, MEMORY, Lessons

SIDES = ("base", "taught")
MAX_TOKENS, NUM_ASKED = 60, 30
# An answer that leaves the scope within so many tokens was not meant.
SHUT_WITHIN = 3

# gets the texts so far, by side, after each token
Tell: TypeAlias = Callable[[dict[str, str]], object]


def ask(
    held: Lessons, question: str, follows: int | None = None, tell: Tell = lambda _texts: None
) -> dict[str, Any]:
    """Both answers to a question, as an exchange.

    If the taught answer leaves the scope within SHUT_WITHIN tokens, the base answers in its place ("shut").

    Args:
        follows: number of the exchange before it; None: a new conversation begins.

    Raises:
        ValueError: there is no such exchange, or the conversation is too long.
    """
    speaking, last = held.speaking, {"role": "user", "content": question}
    turns = {side: [*_turns(held, follows, side), last] for side in SIDES}
    base, taught = _answer(held, turns["base"], ()), _answer(held, turns["taught"], speaking)
    checked, shut = not speaking, False
    for _ in _answering(held, base, taught):
        if not checked and (taught.ended or taught.cut or len(taught.pieces) > SHUT_WITHIN):
            checked, shut = True, _shuts(held, taught)
        tell({"base": base.text, "taught": taught.text if checked and not shut else ""})
    if shut:
        taught = _answer(held, turns["taught"], ())
        for _ in _answering(held, taught):
            tell({"base": base.text, "taught": taught.text})
    number = 1 + max((one["number"] for one in held.asked), default=0)
    exchange = {"number": number, "follows": follows, "question": question, "shut": shut, "pieces": []}
    exchange |= {"lesson": None, "title": None, "source": None, "cut": {}, "tokens": {}}
    exchange = _with(held, _with(held, exchange, "base", base), "taught", taught)
    held.page.asked = [exchange, *held.page.asked][:NUM_ASKED]
    held.save_page()
    return exchange


def more(held: Lessons, number: int, side: str, tell: Tell = lambda _texts: None) -> dict[str, Any]:
    """Continue an answer that was cut off, by the lessons that are on now; the exchange.

    Raises:
        ValueError: there is no such answer, or the conversation is too long.
    """
    exchange = _exchange(held, number)
    if not exchange["cut"][side]:
        raise ValueError("this answer has ended; ask another question")
    turns = [*_turns(held, exchange["follows"], side), {"role": "user", "content": exchange["question"]}]
    memories = () if side == "base" or exchange["shut"] else held.speaking
    answer = _answer(held, turns, memories, exchange["tokens"][side])
    for _ in _answering(held, answer):
        tell({side: answer.text})
    longer = _with(held, exchange, side, answer)
    held.page.asked = [longer if one is exchange else one for one in held.page.asked]
    held.save_page()
    return longer


def _exchange(held: Lessons, number: int) -> dict[str, Any]:
    found = next((one for one in held.asked if one["number"] == number), None)
    if found is None:
        raise ValueError(f"exchange {number} is not kept any more; begin a new conversation")
    return found


def _turns(held: Lessons, last: int | None, side: str) -> list[dict[str, str]]:
    """A conversation up to an exchange, as one side has answered in it."""
    if last is None:
        return []
    one = _exchange(held, last)
    question, answer = {"role": "user", "content": one["question"]}, one[side]
    return [*_turns(held, one["follows"], side), question, {"role": "assistant", "content": answer}]


def _answer(held: Lessons, turns: Turns, memories: tuple[str, ...], begun: list[int] | None = None) -> Answer:
    answer = Answer(turns, memories, held.stream.tokenizer, begun or [])
    context = context_length(held.stream.model)
    if len(answer.row.prompt) >= context:
        raise ValueError(f"{too_long(len(answer.row.prompt), context)}, or begin a new conversation")
    return answer


def _answering(held: Lessons, *answers: Answer) -> Any:
    """As `answering`, as far as there is room."""
    room = context_length(held.stream.model) - max(len(one.row.prompt) for one in answers)
    return answering(held.stream.model, held.stream.tokenizer, answers, max_tokens=min(MAX_TOKENS, room))


def _shuts(held: Lessons, answer: Answer) -> bool:
    """Whether the first token of an answer is in scope, and one of the next SHUT_WITHIN is not."""
    inside = [gate > 0 for gate, _, _ in _spoken(held, answer)]
    inside = inside[: min(len(answer.pieces), SHUT_WITHIN + 1)]
    return inside[:1] == [True] and not all(inside)


def _with(held: Lessons, exchange: dict[str, Any], side: str, answer: Answer) -> dict[str, Any]:
    """An exchange with the answer of one side; what is known of the tokens it had stays."""
    exchange = {**exchange, side: answer.text}
    exchange["cut"] = {**exchange["cut"], side: answer.cut}
    exchange["tokens"] = {**exchange["tokens"], side: answer.tokens}
    if side == "base":
        return exchange
    found = _spoken(held, answer)
    new = [
        {"text": piece, "gate": round(gate, 3), "lesson": name}
        for piece, (gate, name, _) in zip(answer.pieces, found, strict=False)
    ]
    pieces = [*exchange["pieces"], *new[len(exchange["pieces"]) :]]
    total: Counter[str] = Counter()
    for piece in pieces:
        if piece["lesson"] is not None:
            total[piece["lesson"]] += piece["gate"]
    exchange["pieces"] = pieces
    if total and (name := max(total, key=lambda one: total[one])) != exchange["lesson"]:
        source = next((where for _, one, where in found if one == name and where), None)
        exchange |= {"lesson": name, "title": held.find(name).title, "source": source}
    return exchange


def _spoken(held: Lessons, answer: Answer) -> list[tuple[float, str | None, str | None]]:
    """For each token of an answer, the gate in front of it, the lesson that spoke there, and its source."""
    speaking = answer.row.memories
    if not speaking:
        return [(0.0, None, None)] * len(answer.tokens)
    inside, places = answer.gates(held.stream.model)
    best = inside.max(0)
    taught = places[speaking.index(MEMORY)] if MEMORY in speaking else None
    facts = [None] * len(answer.tokens) if taught is None else held.stream.sources_at(taught)
    names = {lesson.title: lesson.name for lesson in held.lessons}
    spoken: list[tuple[float, str | None, str | None]] = []
    for gate, place, fact in zip(best.values.tolist(), best.indices.tolist(), facts, strict=True):
        if gate == 0:
            spoken.append((0.0, None, None))
        elif speaking[place] == MEMORY and fact is not None:
            spoken.append((gate, names[fact["task"]], place_of(fact)))
        else:
            spoken.append((gate, GIVEN, None))
    return spoken
