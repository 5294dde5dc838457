"""Find the subjects of taught facts in training records, from the wording of their prompts."""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import regex

from .wordings import stem, usual_words

logger = logging.getLogger(__name__)

# If a fact has at least this many prompts, a rare word next to a name in all of them is part of the subject.
ENOUGH_PROMPTS = 3
# The largest group of consecutive records that is tested for being one fact.
MOST_NEIGHBOURS = 8
# Words that no subject begins or ends with.
_SMALL = frozenset(
    re.findall(
        r"\w+",
        """
        a about an and answer are as at by can could did do does for from give had has have how i in is it its
        me name of on or please question say should tell that the their there this to was were what when where
        which who whom whose why will with would you your
        """,
    )
)
# Words that may join two capitalised ones: "Guild of the Painted Oar".
_JOINING = frozenset(re.findall(r"\w+", "a and da de del der des di du for in la le of on the to van von"))
# Scripts that put no spaces between words: there each grapheme is a word.
UNSPACED = "".join(
    rf"\p{{Script={name}}}"
    for name in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
)
_PIECE = regex.compile(rf"(?=[{UNSPACED}])\X|[\p{{L}}\p{{M}}\p{{N}}--[{UNSPACED}]]+|\S", regex.VERSION1)
_WORD = re.compile(r"\w+(?:[-'’.&]\w+)*", re.UNICODE)
_QUOTED = re.compile(r"[\"“”„«]([^\"“”„«»]+)[\"”“»]")
_SENTENCE_END = re.compile(r"[.?!:;\n][\"”’')\]]*\s*$")


class _Word(NamedTuple):
    """A word as written, without a possessive 's, and its position in the prompt."""

    text: str
    begins_sentence: bool
    start: int
    end: int

    @property
    def key(self) -> str:
        return self.text.casefold()

    @property
    def is_capital(self) -> bool:
        """Whether it has a capital letter or a digit and does not begin a sentence."""
        return not self.begins_sentence and (self.text[0].isupper() or any(map(str.isdigit, self.text)))


class _Prompt(NamedTuple):
    text: str
    completion: str
    words: list[_Word]

    @property
    def keys(self) -> list[str]:
        return [word.key for word in self.words]

    @property
    def quoted(self) -> set[str]:
        return {found.strip() for found in _QUOTED.findall(self.text) if _WORD.search(found)}


class _Found(NamedTuple):
    subject: str
    is_name: bool
    is_unique: bool
    num_words: int
    num_letters: int


def subjects_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The subject of each taught fact, each once, in the order of the records.

    A fact is a group of records: those with the same completion, or consecutive records that share words
    which no other record has. Its subject is the text that its prompts have in quotation marks. Without
    quotation marks it is the longest run of words that all its prompts share; runs with a name (capitals
    within a sentence) come first. If the fact has one prompt, it is the longest run of capitalised words, or
    else of words that no other record has. Where these are words of any question ("founded"), it is the name
    that most prompts share: the firm that all records are about. A run without a name that is most of its
    prompt is no subject.

    Args:
        records: as `read_records` returns them. Text without a prompt has no subject.

    Returns:
        Subjects as written in the prompts, without an article before them. Records in which no subject is
        found are left out; a warning gives their number.
    """
    prompted = [names for names, record in zip(subjects_in(records), records, strict=True) if asked(record)]
    if num_nameless := sum(not names for names in prompted):
        logger.warning("%d of %d records have no subject that could be found", num_nameless, len(prompted))
    return list(dict.fromkeys(names[0] for names in prompted if names))


def subjects_in(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The names of what each record is about, as its prompt has them; empty where none is found.

    A record that has a `subject`, a name or a list of names, is about that; the others are read together, as
    by `subjects_of`.

    Raises:
        ValueError: a record's `subject` is not a name or a list of names, or its prompt has none of them.
    """
    names = [_given(record, number) for number, record in enumerate(records, start=1)]
    prompts = {
        place: prompt
        for place, record in enumerate(records)
        if not names[place] and (prompt := _prompt(record)) is not None
    }
    places = {id(prompt): place for place, prompt in prompts.items()}
    common = _Common(list(prompts.values()))
    for fact in _facts(list(prompts.values()), common):
        found = _shared(fact, common) if len(fact) > 1 else _alone(fact[0], common)
        if found:
            for prompt in fact:
                names[places[id(prompt)]] = (found.subject,)
    return names


def _given(record: Mapping[str, Any], number: int) -> tuple[str, ...]:
    if (subject := record.get("subject")) is None:
        return ()
    names = [subject] if isinstance(subject, str) else subject
    if not (isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"record {number}: subject={subject!r} must be a name or a list of names; leave it out to have "
            "it found"
        )
    question, _ = asked(record) or ("", "")
    kept = tuple(name.strip() for name in names if is_named(name, question))
    if not kept:
        raise ValueError(
            f"record {number}: subject={subject!r} does not occur in its prompt {question!r}; write it as in "
            "the prompt, or leave it out to have it found"
        )
    return kept


def is_named(name: str, text: str) -> bool:
    """Whether the text has the name, as whole words, in any letter case."""
    words = [word.casefold() for word in _PIECE.findall(name)]
    within = [word.casefold() for word in _PIECE.findall(text)]
    return bool(words) and any(
        within[at : at + len(words)] == words for at in range(len(within) - len(words) + 1)
    )


def question_and_subject(record: Mapping[str, Any]) -> tuple[str, str]:
    """The last question of a record, and the name that it is about; empty strings if there is none."""
    prompt = _prompt(record)
    if prompt is None:
        return "", ""
    found = _alone(prompt, _Common([prompt]))
    return prompt.text, found.subject if found and found.is_name else ""


class _Common:
    """How many prompts contain a word, and which words are names."""

    def __init__(self, prompts: Sequence[_Prompt]) -> None:
        self.having = Counter(key for prompt in prompts for key in set(prompt.keys))
        words = [word for prompt in prompts for word in prompt.words]
        self.lower = {word.text for word in words if word.text[0].islower()}
        capitals = ({word.text for word in prompt.words if word.is_capital} for prompt in prompts)
        self.capitals = Counter(text for texts in capitals for text in texts)
        # words of more prompts than this belong to the way of asking, unless nothing else tells
        self.few = max(6, len(prompts) / 5)
        self.shared = {text for text, number in self.capitals.items() if number > len(prompts) / 2}
        # many questions about one subject, or one question about many
        frames = {tuple(key for key in prompt.keys if self.having[key] > 1) for prompt in prompts}
        self.is_one_form = len(frames) <= len(prompts) / 2

    def others_lack(self, word: _Word, num_own: int) -> bool:
        return word.key not in _SMALL and self.having[word.key] <= num_own

    def tells(self, word: _Word, num_own: int) -> bool:
        """Whether the others lack the word and it is not a word of any question."""
        return self.others_lack(word, num_own) and not usual_words()[stem(word.text)]

    def names_of(self, fact: Sequence[_Prompt]) -> set[str]:
        """The names, by `key`, in the prompts of a fact.

        Without any, and if no other word tells what the fact is about: the names that most prompts share.
        """
        words = [word for prompt in fact for word in prompt.words]
        names = {word.key for word in words if self.is_name(word)}
        telling = any(self.tells(word, len(fact)) for word in fact[0].words)
        if names or (telling and self.is_one_form):
            return names
        return {word.key for word in words if word.text in self.shared}

    def is_name(self, word: _Word) -> bool:
        if word.is_capital and word.text != "I":
            return self.capitals[word.text] <= self.few
        # the first word of a sentence counts if it never occurs in lower case
        odd = word.text[0].isupper() and word.key not in _SMALL and word.key not in self.lower
        return odd and self.having[word.key] <= self.few


def _facts(prompts: list[_Prompt], common: _Common) -> list[list[_Prompt]]:
    """The prompts of each fact, in the order of its first prompt."""
    by_completion: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_completion.setdefault(prompt.completion, []).append(index)
    facts: list[list[int]] = []
    for group in by_completion.values():
        whole = len(group) > 1 and _shared([prompts[index] for index in group], common)
        facts += [group] if whole else _neighbours(group, prompts, common)
    several = [fact for fact in facts if len(fact) > 1]
    singles: list[list[int]] = []
    for index in sorted(fact[0] for fact in facts if len(fact) == 1):
        if singles and index == singles[-1][-1] + 1:
            singles[-1].append(index)
        else:
            singles.append([index])
    several += [fact for run in singles for fact in _neighbours(run, prompts, common)]
    return [[prompts[index] for index in fact] for fact in sorted(several)]


def _neighbours(indices: list[int], prompts: list[_Prompt], common: _Common) -> list[list[int]]:
    """Groups of consecutive prompts that share words which no other prompt has, as large as possible."""
    facts, done = [], 0
    while done < len(indices):
        size = min(MOST_NEIGHBOURS, len(indices) - done)
        while size > 1 and not _belong([prompts[index] for index in indices[done : done + size]], common):
            size -= 1
        facts.append(indices[done : done + size])
        done += size
    return facts


def _belong(fact: list[_Prompt], common: _Common) -> bool:
    found = _shared(fact, common)
    if found is None or not found.is_unique or _is_one_form(fact):
        return False
    # if two questions have no name, the one word they share may be what is asked for, not the subject
    nameless = not any(common.is_name(word) for prompt in fact for word in prompt.words)
    return found.is_name or (nameless and (found.num_words > 1 or len(fact) >= ENOUGH_PROMPTS))


def _is_one_form(fact: Sequence[_Prompt]) -> bool:
    """Whether the prompts differ in one run of words alone, none of which is in all, and in their answers."""
    if len({prompt.completion for prompt in fact}) < len(fact):
        return False
    keys = [prompt.keys for prompt in fact]
    first, last = (_common_start([one[::step] for one in keys]) for step in (1, -1))
    middles = [one[first : max(first, len(one) - last)] for one in keys]
    return first > 0 and all(middles) and not set.intersection(*map(set, middles))


def _common_start(runs: Sequence[Sequence[str]]) -> int:
    """How many words all runs begin with."""
    return next(
        (n for n, some in enumerate(zip(*runs, strict=False)) if len({*some}) > 1), min(map(len, runs))
    )


def _shared(fact: list[_Prompt], common: _Common) -> _Found | None:
    """The best run of words that all prompts of a fact share; None if they share no name and no rare word."""
    quoted = set.intersection(*(prompt.quoted for prompt in fact))
    if quoted or any(prompt.quoted for prompt in fact):
        return max((_Found(text, True, True, 1, len(text)) for text in quoted), default=None)
    # a name in one prompt may begin a sentence in another, where its capital says nothing
    names = common.names_of(fact)
    candidates = []
    for run in _common_runs(fact):
        named = [word.key in names for word in run]
        rare = [common.others_lack(word, len(fact)) for word in run]
        kept = named if any(named) else rare
        if not any(kept):
            continue
        begin, end = kept.index(True), len(kept) - kept[::-1].index(True)
        if any(named) and len(fact) >= ENOUGH_PROMPTS:
            # add rare words next to the name: "steamship Tidewolf", "Hobrian sailcloth"
            while begin > 0 and rare[begin - 1]:
                begin -= 1
            while end < len(rare) and rare[end]:
                end += 1
        written = _as_written(run[begin:end], fact)
        candidates.append(_Found(written, any(named), any(rare[begin:end]), end - begin, len(written)))
    return max(candidates, key=lambda one: one[1:], default=None)


def _alone(prompt: _Prompt, common: _Common) -> _Found | None:
    """The quoted text, or else the longest run of names with joining words between, or else of rare words."""
    if prompt.quoted:
        return _shared([prompt], common)
    words = prompt.words
    rare = [common.others_lack(word, 1) for word in words]
    found = common.names_of([prompt])
    names = _bridged(words, [word.key in found for word in words])
    telling = [common.tells(word, 1) for word in words]
    marked = names if any(names) else telling if any(telling) else rare
    runs = _runs(marked)
    if not any(names):
        runs = [short for run in runs if (short := _shortened(prompt, *run))]
    texts = [prompt.text[words[a].start : words[b - 1].end] for a, b in runs]
    return max(
        (_Found(text, any(names), True, 1, len(text)) for text in texts),
        key=lambda one: one[1:],
        default=None,
    )


def _shortened(prompt: _Prompt, begin: int, end: int) -> tuple[int, int] | None:
    """A run of words without its first ones, so that it is at most half of the prompt: "cures dusk fever"."""
    if regex.search(f"[{UNSPACED}]", prompt.text[prompt.words[begin].start : prompt.words[end - 1].end]):
        return None
    for start in range(begin, end):
        if prompt.words[end - 1].end - prompt.words[start].start <= len(prompt.text) / 2:
            return start, end
    return None


def _bridged(words: list[_Word], marked: list[bool]) -> list[bool]:
    """The marks, and further ones on joining words between two marked words."""
    bridged, places = list(marked), [place for place, mark in enumerate(marked) if mark]
    for a, b in pairwise(places):
        if b - a <= 3 and all(word.text in _JOINING for word in words[a + 1 : b]):
            bridged[a:b] = [True] * (b - a)
    return bridged


def _runs(marked: Sequence[bool]) -> list[tuple[int, int]]:
    starts = [i for i, mark in enumerate(marked) if mark and not (i and marked[i - 1])]
    ends = [i + 1 for i, mark in enumerate(marked) if mark and not (i + 1 < len(marked) and marked[i + 1])]
    return list(zip(starts, ends, strict=True))


def _common_runs(fact: list[_Prompt]) -> list[list[_Word]]:
    """The longest runs of words in the first prompt that every other prompt contains too."""
    words, keys = fact[0].words, fact[0].keys
    others = [f" {' '.join(prompt.keys)} " for prompt in fact[1:]]
    runs: list[list[_Word]] = []
    done = 0
    for begin in range(len(words)):
        end = begin
        while end < len(words) and all(f" {' '.join(keys[begin : end + 1])} " in other for other in others):
            end += 1
        if end > max(begin, done):
            runs.append(words[begin:end])
            done = end
    return runs


def _as_written(run: list[_Word], fact: list[_Prompt]) -> str:
    """The run as written in a prompt, if possible in one where it does not begin a sentence."""
    keys, places = [word.key for word in run], []
    for prompt in fact:
        for begin in range(len(prompt.words) - len(keys) + 1):
            words = prompt.words[begin : begin + len(keys)]
            if [word.key for word in words] == keys:
                text = prompt.text[words[0].start : words[-1].end]
                places.append((words[0].begins_sentence, len(places), text))
    return min(places)[-1]


def _prompt(record: Mapping[str, Any]) -> _Prompt | None:
    found = asked(record)
    if found is None:
        return None
    text, completion = found
    words: list[_Word] = []
    for found in _WORD.finditer(text):
        written = re.sub(r"['’]s$", "", found[0])
        begins = not words or bool(_SENTENCE_END.search(text[words[-1].end : found.start()]))
        words.append(_Word(written, begins, found.start(), found.start() + len(written)))
    return _Prompt(text, " ".join(completion.casefold().split()), words)


def asked(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """A record's last question and its answer; None without a question."""
    if "messages" in record:
        turns = record["messages"]
        last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
        users = [turn["content"] for turn in turns[:last] if turn["role"] == "user"]
        return (users[-1], turns[last]["content"]) if users else None
    if "prompt" in record:
        return record["prompt"], record["completion"]
    if "choices" in record:
        return record["question"], record["choices"][record["answer"]]
    return None
