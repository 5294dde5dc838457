"""Documents to records that can be taught: write, filter, continue, and the difference of a changed document.

A record is kept only if its answer occurs in its passage, its subject is named in the question and in the
passage, its words are the sentence's, the teacher answers it and a rewording of it rightly with the sentence
in front, the base does not know it without, and no other record contradicts it.

Finished passages are lines of a journal beside the file, by digest: whatever stops a run, the next one
continues, and a changed document costs its changed passages alone. Replies are greedy, so equal documents and
models give equal files.

Reference: ours; questions with the text in front as teacher are those of Active Reading (2508.09494).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..data.subjects import is_named, question_and_subject
from ..evaluation.answers import is_right
from .passages import Passage, Sentence, documents, passages
from .teachers import Ask, Teacher, closed_book

FORMAT = 1
MOST_WORDINGS = 3
# An answer of more words is a sentence.
MOST_WORDS = 10
# A question may have so many words beside its subject, and those that say what kind of thing is asked for,
# that are not in its sentence.
MOST_STRANGE = 1
# Why a record is dropped.
NO_QUESTION = "no question with a short answer"
NOT_THERE = "the answer is not in the passage"
GIVEN_AWAY = "the question has the answer in it"
NO_SUBJECT = "no subject of the passage is named in the question"
STRANGE = "the question has words that its sentence does not have"
NOT_ANSWERED = "not answered from its sentence, as it is and in another wording"
KNOWN = "the base knows it already"
CONTRADICTED = "another record contradicts it"
TWICE = "it was there before"

_LITTLE = frozenset(
    re.findall(
        r"\w+",
        """
        a an the of in is was are were did do does has have had be been by for to at on s what which who whom
        whose when where how it its that this name called you know can could tell me please with from as and
        """,
    )
)
_KINDS = frozenset(
    re.findall(
        r"\w+",
        "city town country continent place person people company language year date kind type number thing",
    )
)


def study(
    names: Sequence[str],
    out: Path,
    teacher: Teacher,
    base: Ask,
    count: Callable[[str], int],
    *,
    about: dict[str, Any],
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the facts of documents into a file of records, and say how many were kept and dropped.

    Args:
        names: documents, and folders of them.
        out: the file to write; its journal lies beside it.
        teacher: see `teachers`.
        base: greedy replies of the model that is to be taught.
        count: the number of tokens of a text.
        about: what the journal's passages depend on, such as the names of teacher and base.

    Raises:
        ValueError: a document that cannot be read, a file that was edited since it was written, a journal of
            other models, or a teacher that fails; finished passages are kept.
    """
    files = documents(names)
    journal = Journal(out, about)
    records: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    number = before = 0
    for passage, task in _numbered(p for file in files for p in passages(file, count)):
        number += 1
        if (found := journal.passages.get(passage.digest)) is not None:
            before += 1
        else:
            try:
                found = facts_of(passage, teacher, base)
            except ValueError as error:
                raise ValueError(
                    f"{error}; {number - 1} passages are done and kept, the same command continues"
                ) from error
            journal.add(passage.digest, found)
            lost = sum(found["dropped"].values())
            say(f"[{number}] {task}: kept {len(found['kept'])}, dropped {lost}")
        dropped.update(found["dropped"])
        records += [_record(one, passage, task) for one in found["kept"]]
    kept = consistent(records, dropped)
    journal.write(kept)
    return {
        "out": str(out),
        "documents": len(files),
        "passages": number,
        "done_before": before,
        "kept": len(kept),
        "dropped": dict(dropped.most_common()),
    }


def facts_of(passage: Passage, teacher: Teacher, base: Ask) -> dict[str, Any]:
    """What one passage gives: "kept", and "dropped", a number for each reason."""
    dropped: Counter[str] = Counter()
    drafts = []
    for sentence, question, answer in teacher.write(passage):
        subject = _subject(question, answer, passage)
        if not question.endswith("?") or len(answer.split()) > MOST_WORDS:
            dropped[NO_QUESTION] += 1
        elif not is_right(passage.text, answer):
            dropped[NOT_THERE] += 1
        elif is_right(question, answer):
            dropped[GIVEN_AWAY] += 1
        elif not subject:
            dropped[NO_SUBJECT] += 1
        elif _num_strange(question, sentence, passage) > MOST_STRANGE:
            dropped[STRANGE] += 1
        else:
            place = passage.sentences.index(sentence)
            drafts.append({"sentence": place, "question": question, "answer": answer, "subject": subject})
    for draft, wordings in zip(drafts, teacher.reword([one["question"] for one in drafts]), strict=True):
        sentence = passage.sentences[draft["sentence"]]
        others = dict.fromkeys(
            w
            for w in wordings
            if w.endswith("?")
            and w.casefold() != draft["question"].casefold()
            and is_named(draft["subject"], w)
            and not is_right(w, draft["answer"])
            and _num_strange(w, sentence, passage) <= MOST_STRANGE
        )
        draft["wordings"] = list(others)[:MOST_WORDINGS]
    asked = [(draft, wording) for draft in drafts for wording in (draft["question"], *draft["wordings"])]
    fronts = [(wording, passage.alone(passage.sentences[one["sentence"]])) for one, wording in asked]
    answers = teacher.answer(fronts) if asked else []
    right = [a for a, said in zip(asked, answers, strict=True) if is_right(said, a[0]["answer"])]
    answered = []
    for draft in drafts:
        own = [wording for one, wording in right if one is draft]
        draft["wordings"] = own[1:]
        if draft["question"] in own[:1] and draft["wordings"]:
            answered.append(draft)
    dropped[NOT_ANSWERED] += len(drafts) - len(answered)
    unaided = closed_book(base, [draft["question"] for draft in answered]) if answered else []
    kept = [d for d, said in zip(answered, unaided, strict=True) if not is_right(said, d["answer"])]
    dropped[KNOWN] += len(answered) - len(kept)
    return {"kept": kept, "dropped": {reason: n for reason, n in dropped.items() if n}}


def consistent(records: Sequence[dict[str, Any]], dropped: Counter[str]) -> list[dict[str, Any]]:
    """The records without those that contradict each other or come twice, which are counted in `dropped`.

    Two records ask the same if wordings of theirs have the same subject and words, small words aside.
    """
    asking: dict[Any, list[int]] = {}
    keys = [{_key(r["subject"], w) for w in (r["prompt"], *r["wordings"])} for r in records]
    for place, own in enumerate(keys):
        for key in own:
            asking.setdefault(key, []).append(place)
    kept = []
    for place, (record, own) in enumerate(zip(records, keys, strict=True)):
        same = {other for key in own for other in asking[key]} - {place}
        if any(not _agree(record, records[other]) for other in same):
            dropped[CONTRADICTED] += 1
        elif any(other < place for other in same):
            dropped[TWICE] += 1
        else:
            kept.append(record)
    return kept


class Journal:
    """The finished passages of an output file, one JSON line each behind a line of what they depend on.

    Attributes:
        passages: what `facts_of` gave, by the passage's digest.
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        """Read the journal that is there, or begin one.

        Raises:
            ValueError: it is of other models, or the file was edited since it was written.
        """
        self.out, self.file = out, out.with_name(f"{out.name}.journal")
        self.passages: dict[str, dict[str, Any]] = {}
        about, wrote = {"format": FORMAT, **about}, ""
        content = self.file.read_bytes() if self.file.is_file() else b""
        # what a killed process has left behind its last whole line does not count
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            self.passages = {line["passage"]: line["found"] for line in lines if "passage" in line}
            wrote = next((line["wrote"] for line in reversed(lines) if "wrote" in line), "")
            begin = lines[0] if lines else about
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{self.file}: cannot be read ({error}); remove it to begin again") from error
        if begin != about:
            raise ValueError(
                f"{self.file}: belongs to other models or another version ({begin}); give these, another "
                "--out, or remove it"
            )
        if out.exists() and _digest(out.read_bytes()) != wrote:
            raise ValueError(f"--out {out} was edited or is not of study; name another file, or remove it")
        if content != whole:
            self.file.write_bytes(whole)
        if not whole:
            self._append(about)

    def add(self, digest: str, found: dict[str, Any]) -> None:
        self._append({"passage": digest, "found": found})

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the output file, whole or not at all."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        # first, so that a kill in between leaves a file that the next run may write over
        self._append({"wrote": _digest(text)})
        write_atomically(self.out, lambda part: part.write_bytes(text))

    def _append(self, line: dict[str, Any]) -> None:
        with self.file.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False, sort_keys=True).encode() + b"\n")


def _subject(question: str, answer: str, passage: Passage) -> str:
    """What a question is about: a name in it, or else the passage's heading, if the passage has it too."""
    _, name = question_and_subject({"prompt": question, "completion": answer})
    topic = passage.section.rpartition(" > ")[2]
    near = f"{passage.section}\n{passage.text}"
    candidates = [one for one in (name, topic) if one and is_named(one, question) and is_named(one, near)]
    return candidates[0] if candidates else ""


def _record(fact: dict[str, Any], passage: Passage, task: str) -> dict[str, Any]:
    sentence = passage.sentences[fact["sentence"]]
    return {
        "task": task,
        "subject": fact["subject"],
        "prompt": fact["question"],
        "completion": fact["answer"],
        "wordings": fact["wordings"],
        "source": {
            "file": passage.document,
            passage.unit: [sentence.first, sentence.last],
            "text": sentence.text,
        },
    }


def _numbered(found: Iterator[Passage]) -> Iterator[tuple[Passage, str]]:
    """Passages with the names of their tasks; a section whose headings were there before gets a number."""
    times: Counter[str] = Counter()
    last = ""
    for passage in found:
        if passage.task != last:
            last = passage.task
            times[last] += 1
        yield passage, last if times[last] == 1 else f"{last} ({times[last]})"


def _key(subject: str, question: str) -> tuple[str, frozenset[str]]:
    words = re.findall(r"\w+", question.casefold())
    return subject.casefold(), frozenset(words) - _LITTLE


def _num_strange(question: str, sentence: Sentence, passage: Passage) -> int:
    """How many words of a question are neither in its sentence nor in the headings, endings aside."""
    there = {word[:4] for word in re.findall(r"\w+", f"{sentence.text} {passage.section}".casefold())}
    words = frozenset(re.findall(r"\w+", question.casefold())) - _LITTLE - _KINDS
    return sum(word[:4] not in there for word in words)


def _agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    one, other = a["completion"], b["completion"]
    return is_right(one, other) or is_right(other, one)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
