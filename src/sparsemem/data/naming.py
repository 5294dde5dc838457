"""How names are found in tokens: token classes, the ways a name is split, and where a user's turn begins.

Two tokens have one class if they are one word piece in different spelling: " Peter", "peter", "PETER".
"""

import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .records import prompt_ids

# A run of tokens that begins a turn, or ends a prompt, is compared up to this length.
TURN_LENGTH, OPENING_LENGTH = 3, 2
BEGINS_IN_WORD, ENDS_IN_WORD = 1, 2


class TokenClasses(NamedTuple):
    """Attributes:
    classes: [vocabulary] int64, the class of each token.
    edges: [vocabulary] int64, BEGINS_IN_WORD if its first character belongs to a word that may have begun
        before it, plus ENDS_IN_WORD if its last one belongs to a word that may go on.
    """

    classes: Tensor
    edges: Tensor


def token_classes(tokenizer: PreTrainedTokenizerBase) -> TokenClasses:
    """The classes of a tokenizer's tokens."""
    (anchor,) = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    # some tokenizers drop a space at the beginning of a text, so each token is decoded behind another one
    pairs = [[anchor, token] for token in range(len(tokenizer))]
    begin = str(tokenizer.decode([anchor], clean_up_tokenization_spaces=False))
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    number: dict[str, int] = {}
    classes, edges = [], []
    texts = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
    for text, piece in zip(texts, pieces, strict=True):
        text = text.removeprefix(begin)
        whole = bool(text) and "�" not in text
        # parts of a character, and tokens that decode to nothing, are compared as they are
        key = (text.strip() or text).casefold() if whole else f"token {piece}"
        classes.append(number.setdefault(key, len(number)))
        begins, ends = (in_spaced_word(text[place]) if whole else False for place in (0, -1))
        edges.append(BEGINS_IN_WORD * begins + ENDS_IN_WORD * ends)
    return TokenClasses(torch.tensor(classes), torch.tensor(edges))


def name_runs(names: Iterable[str], tokenizer: PreTrainedTokenizerBase, classes: Tensor) -> list[list[int]]:
    """The different runs of token classes that the names are written with, in the order found.

    A tokenizer splits a name in other ways behind a space, in lower case and in capitals.
    """
    runs = []
    for name in names:
        written = dict.fromkeys((name, name.lower(), name.upper(), name[:1].upper() + name[1:]))
        for text in (spaced for one in written for spaced in (f" {one}", one)):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            run = classes[torch.tensor(ids, dtype=torch.int64)].tolist()
            # a space of its own before the name is not part of it
            if len(ids) > 1 and not str(tokenizer.decode(ids[:1])).strip():
                run = run[1:]
            if run and run not in runs:
                runs.append(run)
    return runs


def turn_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[n] int64, the tokens with which each user's turn begins; none without a chat template."""
    none = torch.zeros(0, dtype=torch.int64)
    if not tokenizer.chat_template:
        return none
    said = ("Zq one.", "Zq two.", "Zq three.")
    chat = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant", "user"), said, strict=True)
    ]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, TypeError, ValueError, IndexError, KeyError):
        return none
    if any(text.count(one) != 1 for one in said):
        return none
    first, rest = text.split(said[0])
    between = rest.split(said[1])[1].split(said[2])[0]
    heads = [tokenizer(part, add_special_tokens=False).input_ids for part in (first, between)]
    return torch.tensor(_common_end(*heads)[-TURN_LENGTH:], dtype=torch.int64)


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last tokens that a chat template puts before an answer, OPENING_LENGTH at most, else none."""
    if not tokenizer.chat_template:
        return []
    return _common_end(*(prompt_ids(text, tokenizer) for text in ("Zq one", "Is it so?")))[-OPENING_LENGTH:]


def in_spaced_word(character: str) -> bool:
    """Whether a character belongs to a word of a script that puts spaces between words."""
    if not character.isalnum():
        return unicodedata.category(character).startswith("M")
    name = unicodedata.name(character, "")
    return not name.startswith(_UNSPACED)


_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def _common_end(a: list[int], b: list[int]) -> list[int]:
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return a[len(a) - length :]
