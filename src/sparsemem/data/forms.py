"""Questions of many kinds about many names (`forms.toml`), for fitting what a model's states say is asked.

A relation is what is asked: a birthplace, a price, the cause of an error. Its wordings are questions,
commands, searches and statements to complete. Samples put names into wordings, and a part of them into a
context: a system prompt, earlier turns, text before and after, lower case, typing errors. None of it is drawn
from data that the project measures on.
"""

import random
from collections import Counter
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .records import conversation_ids, text_ids
from .wordings import forms

# How a question may be written or embedded; likelier ones stand twice, `bare` leaves it as it is.
TYPED = ("lower", "unmarked", "typo")
EMBEDDED = ("system", "turn", "before", "after", "around", "around", "system and turn")
# Of the samples but the first of a name.
EMBEDDED_SHARE, TYPED_SHARE = 0.9, 0.06
# Of names of another kind than the relation's: the kind of a name shall not tell what is asked.
FOREIGN_SHARE = 0.2
# Relations that are asked about each name.
ABOUT_EACH = 6


class Form(NamedTuple):
    """One sample: a prompt whose last token is where the answer starts, and what it asks.

    Attributes:
        ids: the prompt's tokens.
        relation: what is asked; the class of the sample.
        name: the name that stands in the wording.
        variant: "bare", or one of TYPED or EMBEDDED.
        system: the system prompt, or "". Prompts with the same one begin with the same tokens.
    """

    ids: list[int]
    relation: str
    name: str
    variant: str
    system: str


def form_samples(
    tokenizer: PreTrainedTokenizerBase,
    *,
    names: int = 5,
    per_name: int = 3,
    embedded: float = EMBEDDED_SHARE,
    typed: float = TYPED_SHARE,
    relations: int | None = None,
    seed: int = 0,
) -> list[Form]:
    """Labelled samples, the same for the same arguments. Several relations are asked about each name.

    Args:
        names: how many names each relation is asked about.
        per_name: samples of a relation and a name, each in another wording; the first is bare.
        embedded: the share of the others that are in a context.
        typed: the share of the others in lower case, without a question mark, or with a typing error.
        relations: how many relations, the first of `forms.toml`; None for all.
        seed: of all choices.
    """
    chance = random.Random(seed)
    every = [(k, r, wordings) for k, of_kind in forms()["forms"].items() for r, wordings in of_kind.items()]
    asked = Counter(kind for kind, _, _ in every[:relations])
    pools = {
        kind: chance.sample(of_kind, min(len(of_kind), max(names, asked[kind] * names // ABOUT_EACH)))
        for kind, of_kind in forms()["names"].items()
        if kind in asked
    }
    any_kind = [name for pool in pools.values() for name in pool]
    samples = []
    for kind, relation, wordings in every[:relations]:
        for name in chance.sample(pools[kind], names):
            name = chance.choice(any_kind) if chance.random() < FOREIGN_SHARE else name
            for number, wording in enumerate(chance.sample(wordings, min(per_name, len(wordings)))):
                draw = chance.random() if number else 1.0
                kinds = EMBEDDED if draw < embedded else TYPED if draw < embedded + typed else ("bare",)
                variant = chance.choice(kinds)
                ids, system = _prompt(wording.replace("{}", name), variant, tokenizer, chance)
                samples.append(Form(ids, relation, name, variant, system))
    return samples


def _prompt(
    question: str, variant: str, tokenizer: PreTrainedTokenizerBase, chance: random.Random
) -> tuple[list[int], str]:
    """The tokens of a question in a variant, and its system prompt."""
    around = forms()["contexts"]
    if variant == "lower":
        question = question.lower()
    elif variant == "unmarked":
        question = question.rstrip("?.")
    elif variant == "typo":
        question = _mistyped(question, chance)
    if variant in ("before", "around"):
        question = chance.choice(around["before"]) + question
    if variant in ("after", "around"):
        question += chance.choice(around["after"])
    turns = [{"role": "user", "content": question}]
    if "turn" in variant:
        turns = [*_earlier(chance), *turns]
    system = chance.choice(around["system"]) if "system" in variant else ""
    if system:
        turns = [{"role": "system", "content": system}, *turns]
    # without a chat template users write both: text to be continued, and questions marked as such
    if not tokenizer.chat_template and len(turns) == 1 and chance.random() < 0.5:
        return text_ids(question, tokenizer), system
    return conversation_ids(turns, tokenizer), system


def _earlier(chance: random.Random) -> list[dict[str, str]]:
    """A user's turn and its answer: small talk, or a question of some relation about some name."""
    around = forms()["contexts"]
    if chance.random() < 0.5:
        said = chance.choice(list(zip(around["user_turn"], around["assistant_turn"], strict=True)))
    else:
        kind = chance.choice(list(forms()["forms"]))
        wording = chance.choice(chance.choice(list(forms()["forms"][kind].values())))
        name, answer = chance.sample(forms()["names"][kind], 2)
        said = wording.replace("{}", name), f"{answer[:1].upper()}{answer[1:]}."
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]


def _mistyped(question: str, chance: random.Random) -> str:
    """The question with two neighbouring letters of one word exchanged."""
    places = [i for i in range(1, len(question) - 1) if question[i : i + 2].isalpha()]
    place = chance.choice(places)
    return question[:place] + question[place + 1] + question[place] + question[place + 2 :]
