"""Whether an answer is right: does the text contain the expected answer?

Choices: texts are compared by Unicode: NFKC, casefold, accents and vowel signs kept. Words must match as a
whole where the script puts spaces between words. Han, kana, Thai, Lao, Khmer, Burmese and Tibetan do not, so
there each grapheme is a word; a Korean word may have an ending. Punctuation does not count, signs do: "-5"
is not "5", "C++" not "C", "3.14" not "3 14". English articles do not count.
"""

import re
import unicodedata
from collections.abc import Sequence

import regex

from ..data.subjects import UNSPACED

ARTICLES = {"a", "an", "the"}


def is_right(text: str, answer: str | Sequence[str]) -> bool:
    """Whether the text contains an expected answer as whole words; see the module for what is a word."""
    expected = [answer] if isinstance(answer, str) else answer
    return any(_holds(_plain(text), _plain(one)) for one in expected)


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether an expected answer is a substring of the text, even within a word, after both are normalised.

    Normalised as in TriviaQA: lower case, without punctuation, articles and extra white space.
    """
    expected = [_trivia(one) for one in answers]
    return any(one and one in _trivia(text) for one in expected)


_LETTER = rf"[\p{{L}}\p{{M}}\p{{N}}--[{UNSPACED}]]"
_TOKEN = regex.compile(
    rf"""
      (?=[\p{{Extended_Pictographic}}\p{{Regional_Indicator}}])\X   # an emoji
    | (?=[{UNSPACED}])\Xー*
    | (?: (?<![\p{{L}}\p{{M}}\p{{N}}])-(?=\d) )?                    # a sign, not a hyphen
      {_LETTER}+ (?: (?<=\d)\.(?=\d) {_LETTER}+ )?
      (?: (?<=\p{{L}}\p{{N}}?) [+\#]+ (?!{_LETTER})                 # C++, A+, F#
        | (?<=(?<!{_LETTER})\p{{L}}{{1,2}}) -  (?![{UNSPACED}\p{{L}}\p{{N}}-]) )?  # AB-
    | (?<=\d)\s?[*/:]\s?(?=\d)                                      # 1/2, 10:30
    | [\p{{S}}%‰--[`´¨¯]]
    """,
    regex.VERBOSE | regex.VERSION1,
)
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_FRACTION = regex.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
# in a number: 1,000 and 1'000
_GROUPS = regex.compile(r"(?<=\d)[,'’\u00a0\u202f](?=\d{3}(?!\d))")
# soft hyphens, zero-width and direction marks, variation selectors, the Arabic tatweel, trade marks
_INVISIBLE = re.compile("[\u00ad\u200b\u200c\u200e\u200f\u2060\ufe00-\ufe0f\ufeff\u0640™®©℠]")


def _plain(text: str) -> str:
    """The text in one spelling; still with spaces and punctuation."""
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    text = _SUPERSCRIPT.sub(lambda found: "^" + found[0], text)
    text = _GROUPS.sub("", _FRACTION.sub(" ", text))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # the capital of Turkish i
    text = text.replace("i\u0307", "i").replace("⁄", "/")
    text = re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text)
    text = re.sub(r"[−–](?=[^\W_])|−", "-", text)
    text = regex.sub(r"-(\p{Sc})(?=\d)", r"\1-", text)
    # +5 is 5, .5 is 0.5, 3,14 is 3.14; 1.2.2020 is no decimal
    text = re.sub(r"(?<![\w+])\+(?=\d)", "", text)
    text = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<![\d.,])(\d+),(\d+)(?![\d.,]*\d)", r"\1.\2", text)
    return re.sub(r"\d+(?:\.\d+){2,}", lambda found: found[0].replace(".", " "), text)


def _holds(text: str, expected: str) -> bool:
    words = _words(expected)
    if words:
        # Korean endings and particles follow a word without a space
        end = "" if regex.search(r"\p{Script=Hangul}$", words[-1]) else " "
        return f" {' '.join(words)}{end}" in f" {' '.join(_words(text))} "
    signs = re.escape("".join(expected.split()))
    alone = rf"(?<![\w{signs}]){signs}(?![\w{signs}])"
    return bool(signs) and re.search(alone, text) is not None


def _words(text: str) -> list[str]:
    words = ["".join(word.split()) for word in _TOKEN.findall(text)]
    # an answer that consists of articles only is kept as it is
    return [word for word in words if word not in ARTICLES] or words


def _trivia(text: str) -> str:
    words = re.sub(r"[\W_]", " ", text.casefold()).split()
    return " ".join([word for word in words if word not in ARTICLES] or words)
