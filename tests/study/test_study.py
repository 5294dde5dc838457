"""What is kept of what a teacher writes, what a stopped run leaves, and a changed document."""

import json
import re

import pytest

from sparsemem.study import study as studying
from sparsemem.study.study import study

DOCUMENT = """\
# Velmora

The mayor of Velmora is Ada Lindholm.
The river of Velmora is Tarsi. The founder of Velmora is Otto Brenk.

# Orania

The capital of Orania is Port Hale.
"""
FORM = re.compile(r"The (\w+) of (\w+) is (.+?)\.$")


class Rules:
    """Writes and answers "The X of Y is Z." by rule; `more` are (question, answer) beside each sentence's."""

    def __init__(self, more=(), stop_at=None):
        self.more, self.stop_at, self.written = more, stop_at, []

    def write(self, passage):
        self.written.append(passage.section)
        if len(self.written) == self.stop_at:
            raise ValueError("teacher: does not answer")
        found = [(one, FORM.match(one.text).groups()) for one in passage.sentences]
        own = [(one, f"What is the {x} of {y}?", z) for one, (x, y, z) in found]
        return own + [(passage.sentences[0], *pair) for pair in self.more]

    def reword(self, questions):
        return [
            [re.sub(r"What is the (\w+) of (\w+)\?", r"What is \2's \1?", q), "A sentence."]
            for q in questions
        ]

    def answer(self, asked):
        facts = {
            (x, y): z for _, text in asked for x, y, z in re.findall(r"The (\w+) of (\w+) is (.+?)\.", text)
        }
        forms = (r"What is the (?P<x>\w+) of (?P<y>\w+)\?", r"What is (?P<y>\w+)'s (?P<x>\w+)\?")
        asked = [next(filter(None, (re.match(form, q) for form in forms)), None) for q, _ in asked]
        return [facts.get((one["x"], one["y"]), "unknown") if one else "unknown" for one in asked]


def knows_nothing(conversations, _max_tokens):
    return ["I do not know."] * len(conversations)


def run(path, out, teacher=None, base=knows_nothing, **about):
    return study([str(path)], out, teacher or Rules(), base, lambda text: len(text.split()), about=about)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "town.md"
    path.write_text(DOCUMENT, encoding="utf-8")
    return path


def test_records_say_where_they_come_from(document, tmp_path):
    done = run(document, tmp_path / "facts.jsonl")
    assert (done["kept"], done["passages"], done["dropped"]) == (4, 2, {})
    found = lines(tmp_path / "facts.jsonl")
    assert "Tarsi" in found[1]["source"]["text"]
    assert found[1] == {
        "task": f"{document.as_posix()} § Velmora",
        "subject": "Velmora",
        "prompt": "What is the river of Velmora?",
        "completion": "Tarsi",
        "wordings": ["What is Velmora's river?"],
        "source": {"file": document.as_posix(), "lines": [4, 4], "text": found[1]["source"]["text"]},
    }


def test_what_is_wrong_is_dropped_by_reason(document, tmp_path):
    more = [
        ("What is the mayor of Velmora?", "Nobody"),
        ("What is the mayor of Velmora called Ada?", "Ada"),
        ("What primary employer is the river of Velmora?", "Tarsi"),
        ("What is the town?", "Tarsi"),
        ("Tell me the river of Velmora", "Tarsi"),
        ("What is the river of Velmora?", "Otto Brenk"),
    ]

    def knows_the_capital(conversations, _max_tokens):
        return ["It is Port Hale." if "Orania" in one[-1]["content"] else "?" for one in conversations]

    done = run(document, tmp_path / "facts.jsonl", Rules(more), knows_the_capital)
    assert [one["completion"] for one in lines(tmp_path / "facts.jsonl")] == [
        "Ada Lindholm",
        "Tarsi",
        "Otto Brenk",
    ]
    assert done["dropped"][studying.KNOWN] == 1
    assert done["dropped"][studying.NO_QUESTION] == 2
    assert done["dropped"][studying.NOT_ANSWERED] == 1
    assert done["dropped"][studying.NO_SUBJECT] == 1
    assert done["dropped"][studying.GIVEN_AWAY] == 1
    assert done["dropped"][studying.NOT_THERE] == 6
    assert done["dropped"][studying.STRANGE] == 1


def test_contradictions_and_repetitions_between_documents(tmp_path):
    (tmp_path / "a.txt").write_text("The mayor of Velmora is Ada. The river of Velmora is Tarsi.")
    (tmp_path / "b.txt").write_text("The mayor of Velmora is Otto. The river of Velmora is Tarsi.")
    done = run(tmp_path, tmp_path / "facts.jsonl")
    assert [one["completion"] for one in lines(tmp_path / "facts.jsonl")] == ["Tarsi"]
    assert done["dropped"] == {studying.CONTRADICTED: 2, studying.TWICE: 1}


def test_a_stopped_run_continues_to_the_same_file(document, tmp_path):
    run(document, tmp_path / "whole.jsonl")
    with pytest.raises(ValueError, match="does not answer; 1 passages are done and kept"):
        run(document, tmp_path / "facts.jsonl", Rules(stop_at=2))
    assert not (tmp_path / "facts.jsonl").exists()
    # what a kill leaves of a line
    with (tmp_path / "facts.jsonl.journal").open("ab") as file:
        file.write(b'{"passage": "half')
    again = Rules()
    done = run(document, tmp_path / "facts.jsonl", again)
    assert (again.written, done["done_before"]) == (["Orania"], 1)
    assert (tmp_path / "facts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_changed_document_costs_its_changed_sections(document, tmp_path):
    run(document, tmp_path / "facts.jsonl")
    text = DOCUMENT.replace("Port Hale", "New Hale")
    document.write_text("The king of Tarsia is Olaf.\n\n" + text, encoding="utf-8")
    again = Rules()
    run(document, tmp_path / "facts.jsonl", again)
    assert again.written == ["", "Orania"]
    found = lines(tmp_path / "facts.jsonl")
    assert [(one["completion"], one["source"]["lines"]) for one in found] == [
        ("Olaf", [1, 1]), ("Ada Lindholm", [5, 5]), ("Tarsi", [6, 6]), ("Otto Brenk", [6, 6]),
        ("New Hale", [10, 10]),
    ]  # fmt: skip


def test_an_edited_file_is_not_written_over(document, tmp_path):
    out = tmp_path / "facts.jsonl"
    run(document, out)
    run(document, out)
    out.write_text("{}\n")
    with pytest.raises(ValueError, match="was edited"):
        run(document, out)
    out.unlink()
    with pytest.raises(ValueError, match="belongs to other models"):
        run(document, out, teacher=Rules(), model="another")


def test_headings_that_come_twice_are_two_tasks(tmp_path):
    (tmp_path / "a.md").write_text("# N\nThe x of Y is Z.\n# M\nThe u of Y is V.\n# N\nThe s of Y is T.\n")
    run(tmp_path / "a.md", tmp_path / "facts.jsonl")
    tasks = [one["task"].rpartition(" § ")[2] for one in lines(tmp_path / "facts.jsonl")]
    assert tasks == ["N", "M", "N (2)"]
