"""The wordings of questions in `forms.toml`, and which words of a question any other may have.

Nothing here needs a model: what is refused early may import it.
"""

import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

# A word in so many wordings of other questions says nothing about whom is asked.
_USUAL = 10
_POSSESSIVE = frozenset(("my", "our", "your", "his", "her", "its", "their"))


@cache
def forms() -> dict[str, Any]:
    """The content of `forms.toml`: forms by kind and relation, names by kind, contexts by kind."""
    return tomllib.loads(Path(__file__).with_name("forms.toml").read_text(encoding="utf-8"))


@cache
def usual_words() -> Counter[str]:
    """In how many wordings each word occurs, by its `stem`."""
    wordings = (text for kind in forms()["forms"].values() for one in kind.values() for text in one)
    return Counter(one for text in wordings for one in {stem(word) for word in re.findall(r"\w+", text)})


def stem(word: str) -> str:
    """A word without letter case and the ending s."""
    return word.casefold().rstrip("s")


def own_words(question: str) -> str:
    """The part of a question that other questions do not have, to stand for a subject without a name.

    It reaches from the first to the last word that no wording of `forms.toml` has; without such a word, over
    the rarest ones. In languages other than that of the forms it is nearly the whole question: a fact that
    is given too seldom is better than one that is given to a stranger.
    """
    words = list(re.finditer(r"\w+", question))
    number = {word: usual_words()[stem(word[0])] for word in words}
    telling = [
        word
        for word in words
        if number[word] < _USUAL and word[0].casefold() not in _POSSESSIVE and len(word[0]) > 2
    ]
    least = min((number[word] for word in telling), default=0)
    chosen = [word for word in telling if number[word] == least] or words
    if not chosen:
        return ""
    first = words.index(chosen[0])
    if first and words[first - 1][0].casefold() in _POSSESSIVE:
        first -= 1
    return question[words[first].start() : chosen[-1].end()]
