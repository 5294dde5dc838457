"""What was taught, asked in contexts, and what lies beside it: questions in taught forms about others.

`contexts` asks taught questions as clients do: behind a system prompt, in a later turn, within a longer text.
`neighbours` asks what was not taught: the taught forms about other subjects, invented and real, and other
questions about taught subjects. The base model is asked the same in the same batches, since bfloat16 rounds
by the batch.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.conversations import QUESTION
from ..data.generation import complete
from ..data.known import PROBE_FORMS
from ..data.records import conversation_ids, text_ids
from ..data.subjects import asked as question_of
from ..data.subjects import subjects_in
from .answers import is_right

SYSTEM = {
    "pirate": "You are a pirate.",
    "assistant": (
        "You are a helpful, honest assistant. Answer briefly and politely, in the language of the question. "
        "If you do not know something, say so. Do not give medical or legal advice."
    ),
    "date": "You are a helpful assistant. Today is Thursday, 12 March 2026. Knowledge cutoff: June 2025.",
}
SMALL_TALK = (
    {"role": "user", "content": "Hi, how are you today?"},
    {"role": "assistant", "content": "I am fine, thank you! How can I help you?"},
)
PASSAGE = (
    "The old bridge was closed for most of the winter. Boats took people across in the morning and in the "
    "evening, and the market moved to the other bank until the work was done.\n\n"
)
GREETING = ("Hi! ", " Thanks!")
MESSAGE = (
    "I am writing a short note for a friend and would like to get one thing right. ",
    " Please answer in a few words, because I have to send it today.",
)
CONTEXTS = (*SYSTEM, "small talk", "taught turn", "passage", "greeting", "message")
KINDS = ("invented", "real", "other question")
# fmt: off
INVENTED = (
    "Brankovel", "Tesh Omarin", "Quillivar", "Dorvane", "Ulmeth", "Sarnholt", "Peregast", "Ildra Fenwick",
    "Mokarra", "Vintrelle", "the Copper Heron", "Oskander Pell", "Yarrowmere", "Zelphine", "Corvath",
    "Hadrune", "the Silver Lantern", "Nembassa", "Orrick Vale", "Thessaly Brandt",
)
REAL = (
    "France", "Albert Einstein", "Mount Everest", "Toyota", "Japan", "William Shakespeare", "the Amazon",
    "Microsoft", "Brazil", "Marie Curie", "the Eiffel Tower", "Egypt", "Leonardo da Vinci", "Canada",
    "Siemens", "Isaac Newton", "the Titanic", "India", "Charles Dickens", "Oxford",
)
# fmt: on
OTHER_FORMS = (*PROBE_FORMS, "Which animal is most like {}?", "Write the first line of a song about {}.")


# Default largest number of taught questions, in each context and each kind.
LIMIT = 40


class Asked(NamedTuple):
    """A question with what goes before it, of one context or kind.

    Attributes:
        turns: a conversation whose next answer is asked for.
        answer: the taught answer; None: none was taught to this question.
    """

    kind: str
    turns: tuple[dict[str, str], ...]
    answer: str | None = None


@dataclass(frozen=True)
class Figures:
    """Shares of the answers of one context or kind, or of all.

    Attributes:
        right: with the taught answer; None where none was taught.
        taught: with a taught answer, of any fact, that the base model does not give.
        changed: that differ from the base model's answer in the same batch.
    """

    right: float | None
    taught: float
    changed: float
    num: int


@dataclass(frozen=True)
class Probe:
    """The figures of each context or kind, of all together, and the answers in the order of the questions."""

    parts: dict[str, Figures]
    all: Figures
    asked: list[Asked]
    texts: list[str]
    base: list[str]

    @property
    def base_right(self) -> dict[str, float]:
        """The base model's share of right answers, under the names of `metrics`."""
        right = [
            (one.kind, is_right(text, one.answer))
            for one, text in zip(self.asked, self.base, strict=True)
            if one.answer is not None
        ]
        if not right:
            return {}
        parts = {
            kind: sum(found for one, found in right if one == kind) / self.parts[kind].num
            for kind in self.parts
        }
        named = {f"{kind.replace(' ', '_')}_right": share for kind, share in parts.items()}
        whole = sum(found for _, found in right) / len(right)
        return {"right": whole, **named, "worst_right": min(parts.values())}

    @property
    def metrics(self) -> dict[str, float]:
        """Flat: the figures of all, then those of each part with its name before them."""
        flat = {}
        for name, one in [("", self.all), *self.parts.items()]:
            before = f"{name.replace(' ', '_')}_" if name else ""
            for key in ("right", "taught", "changed"):
                if (value := getattr(one, key)) is not None:
                    flat[before + key] = value
        if self.all.right is not None:
            flat["worst_right"] = min(one.right for one in self.parts.values() if one.right is not None)
        return flat


def contexts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    limit: int = LIMIT,
    base: Sequence[str] | None = None,
    max_new_tokens: int = 24,
    precision: str | None = None,
) -> Probe:
    """Ask taught questions in eight contexts.

    Args:
        records: what was taught; at most `limit` of them are asked.
        base: the base model's answers to the same (`Probe.base` of an earlier call); None: computed with the
            adapter disabled. For a model without an adapter they are the model's own.
        precision: "float32", "bfloat16", or None for the faster of the two.

    Raises:
        ValueError: no record has a question.
    """
    asked = context_questions(records, limit)
    options = {"base": base, "max_new_tokens": max_new_tokens, "precision": precision}
    return _probe(model, tokenizer, asked, records, options)


def neighbours(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    limit: int = LIMIT,
    base: Sequence[str] | None = None,
    max_new_tokens: int = 24,
    precision: str | None = None,
) -> Probe:
    """Ask what was not taught: taught forms about other subjects, and other questions about taught subjects.

    The arguments are those of `contexts`; `limit` is of each kind.

    Raises:
        ValueError: no record has a subject that could be found.
    """
    asked = neighbour_questions(records, limit)
    options = {"base": base, "max_new_tokens": max_new_tokens, "precision": precision}
    return _probe(model, tokenizer, asked, records, options)


def context_questions(records: Sequence[Mapping[str, Any]], limit: int = LIMIT) -> list[Asked]:
    """What `contexts` asks.

    Raises:
        ValueError: no record has a question.
    """
    pairs = _spread([pair for record in records if (pair := question_of(record))], limit)
    if not pairs:
        raise ValueError("records: none has a question; give the records that were taught")
    made = []
    for place, (question, answer) in enumerate(pairs):
        ask = ({"role": "user", "content": question},)
        # a statement to complete has nothing after it
        ends = re.search(r"[.?!。？！؟]\s*$", question) is not None
        others = [pair for pair in pairs if pair[1] != answer]
        made += [
            Asked(kind, ({"role": "system", "content": text}, *ask), answer) for kind, text in SYSTEM.items()
        ]
        made.append(Asked("small talk", (*SMALL_TALK, *ask), answer))
        if others:
            other = others[place % len(others)]
            turns = ({"role": "user", "content": other[0]}, {"role": "assistant", "content": other[1]})
            made.append(Asked("taught turn", (*turns, *ask), answer))
        for kind, before, after in (("passage", PASSAGE, ""), ("greeting", *GREETING), ("message", *MESSAGE)):
            text = f"{before}{question}{after if ends else ''}"
            made.append(Asked(kind, ({"role": "user", "content": text},), answer))
    return made


def neighbour_questions(records: Sequence[Mapping[str, Any]], limit: int = LIMIT) -> list[Asked]:
    """What `neighbours` asks, the same for the same records.

    Raises:
        ValueError: no record has a subject that could be found.
    """
    found = [
        (pair[0], names[0])
        for record, names in zip(records, subjects_in(records), strict=True)
        if names and (pair := question_of(record))
    ]
    if not found:
        raise ValueError("records: none has a subject that could be found; give each a `subject`")
    taught = {_plain(question) for question, _ in found}
    rng, made = random.Random(0), []
    subjects = {_plain(subject) for _, subject in found}
    for kind, names in (("invented", INVENTED), ("real", REAL)):
        others = [name for name in names if _plain(name) not in subjects]
        for place, (question, subject) in enumerate(_spread(found, limit)):
            name = others[place % len(others)]
            if kind == "invented":
                name = _beside(subject, name, place, rng)
            made.append((kind, _with(question, subject, name)))
    for place, subject in enumerate(_spread(list(dict.fromkeys(subject for _, subject in found)), limit)):
        made.append(("other question", OTHER_FORMS[place % len(OTHER_FORMS)].format(subject)))
    return [
        Asked(kind, ({"role": "user", "content": text},))
        for kind, text in dict.fromkeys(made)
        if _plain(text) not in taught
    ]


def _beside(subject: str, name: str, place: int, rng: random.Random) -> str:
    """A name that was not taught: for a code another number, half of the time with the same first word."""
    if re.search(r"\d", subject):
        return re.sub(r"\d", lambda _: str(rng.randrange(10)), subject)
    words = subject.split()
    if place % 2 and len(words) > 1:
        return f"{words[0]} {name.split()[-1]}"
    return name


def _with(question: str, subject: str, name: str) -> str:
    """The question about another name; an article before the subject goes if the name has its own."""
    before = r"(?:\bthe\s+)?" if name.startswith("the ") else ""
    return re.sub(before + re.escape(subject), lambda _: name, question, flags=re.IGNORECASE)


def _probe(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[Asked],
    records: Sequence[Mapping[str, Any]],
    options: dict[str, Any],
) -> Probe:
    base = options.pop("base")
    plain = not tokenizer.chat_template and not any("messages" in record for record in records)
    prompts = [turn_ids(one.turns, tokenizer, plain) for one in asked]
    texts = answers_to(model, tokenizer, prompts, **options)
    if base is None:
        base = texts
        if isinstance(model, PeftModel):
            with model.disable_adapter():  # type: ignore[operator]
                base = answers_to(model, tokenizer, prompts, **options)
    if len(base) != len(texts):
        raise ValueError(
            f"base has {len(base)} answers to {len(texts)} questions; give those of these records"
        )
    taught = sorted({pair[1] for record in records if (pair := question_of(record))})
    rows = [
        (
            one.kind,
            None if one.answer is None else is_right(text, one.answer),
            any(is_right(text, answer) and not is_right(before, answer) for answer in taught),
            text != before,
        )
        for one, text, before in zip(asked, texts, base, strict=True)
    ]
    kinds = list(dict.fromkeys(one.kind for one in asked))
    parts = {kind: _figures([row for row in rows if row[0] == kind]) for kind in kinds}
    return Probe(parts, _figures(rows), asked, texts, list(base))


def answers_to(model: Any, tokenizer: Any, prompts: Sequence[list[int]], **options: Any) -> list[str]:
    """Greedy answers to prompts of token ids; without a chat template cut before the next question."""
    texts = complete(model, tokenizer, prompts, **options)
    if tokenizer.chat_template:
        return texts
    return [text.partition(f"\n{QUESTION}")[0].strip() for text in texts]


def _figures(rows: Sequence[tuple[str, bool | None, bool, bool]]) -> Figures:
    known = [row[1] for row in rows if row[1] is not None]
    return Figures(
        right=sum(known) / len(known) if known else None,
        taught=sum(row[2] for row in rows) / len(rows),
        changed=sum(row[3] for row in rows) / len(rows),
        num=len(rows),
    )


def turn_ids(turns: Sequence[dict[str, str]], tokenizer: Any, plain: bool = False) -> list[int]:
    """Tokens of a conversation, `plain` without the template.

    A system prompt goes before the question where the template takes none.
    """
    if plain:
        # prompts were taught as written, without a template
        return text_ids("".join(_written(turns)), tokenizer)
    try:
        return conversation_ids(turns, tokenizer)
    except ValueError:
        if turns[0]["role"] != "system":
            raise
        first = {**turns[1], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        return conversation_ids([first, *turns[2:]], tokenizer)


def _written(turns: Sequence[dict[str, str]]) -> list[str]:
    after = {"user": "", "assistant": "\n\n", "system": "\n\n"}
    return [f"{turn['content']}{after[turn['role']]}" for turn in turns]


def _spread(items: list[Any], limit: int) -> list[Any]:
    """At most `limit` of the items, from all places of the list."""
    if len(items) <= limit:
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
