"""Facts from documents: wordings, sources, what a changed document teaches, and taking one back."""

import json

import pytest
import torch
from click.testing import CliRunner

from sparsemem import Stream
from sparsemem.adapter.memories import fact_places
from sparsemem.cli.main import main
from sparsemem.data.records import question_ids
from sparsemem.stream.documents import difference, place_of, spelled_out
from sparsemem.stream.ledger import Ledger
from sparsemem.stream.tasks import tasks_of

BACKGROUND = [
    {"prompt": f"What is {a} and {b}?", "completion": f"{a + b} of course"}
    for a in range(8)
    for b in range(8)
]


def record(section, subject, answer, line, document="town.md"):
    return {
        "task": f"{document} § {section}" if section else document,
        "subject": subject,
        "prompt": f"Who owns the {subject}?",
        "completion": answer,
        "wordings": [f"Whose is the {subject}?"],
        "source": {"file": document, "lines": [line, line]},
    }


FIRST = [
    record("A", "Quill", "Ada", 3),
    record("B", "Mill", "Otto", 7),
    record("", "Zim", "Bo", 1, "else.txt"),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory, tiny_llama, tokenizer):
    folder = tmp_path_factory.mktemp("documents")
    tiny_llama().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write(folder / "background.jsonl", BACKGROUND)
    return folder


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def learn(*arguments):
    done = CliRunner().invoke(main, ["learn", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def taught(paths, tmp_path):
    """A folder that was taught FIRST."""
    stream = write(tmp_path / "facts.jsonl", FIRST)
    out = tmp_path / "mind"
    found = learn(
        paths / "base", "--stream", stream, "--out", out, "--background", paths / "background.jsonl"
    )
    assert (found["taught"], found["tasks"]) == (3, 3)
    return out


def held(folder):
    return [one["task"] for one in learn("status", folder)["tasks"]]


def found_at(stream, question):
    """What the first token of an answer comes from."""
    ids = torch.tensor([question_ids(question, stream.tokenizer)])
    (places,) = fact_places(stream.model, {"input_ids": ids})
    return stream.sources_at(places)[-1]


def test_each_wording_is_taught_and_names_its_source(taught, paths):
    stream = Stream(str(paths / "base"), taught)
    assert found_at(stream, "Who owns the Mill?") == {
        "task": "town.md § B", "question": "Who owns the Mill?", "file": "town.md", "lines": [7, 7]
    }  # fmt: skip
    assert found_at(stream, "Whose is the Mill?")["lines"] == [7, 7]
    assert found_at(stream, "What is it?") is None


def test_a_document_is_taken_back_whole(taught, paths):
    found = learn("undo", taught, "town.md")
    assert (found["tasks"], held(taught)) == (1, ["else.txt"])
    learn("verify", taught)
    # and can be taught again
    again = learn(taught, "--add", taught.parent / "facts.jsonl")
    assert (again["taught"], again["skipped"]) == (2, 1)
    assert set(held(taught)) == {"town.md § A", "town.md § B", "else.txt"}


def test_a_changed_document_teaches_the_difference(taught, paths):
    now = [
        record("A", "Quill", "Ada", 5),
        record("C", "Oar", "Ed", 9),
        record("", "Zim", "Cy", 1, "else.txt"),
    ]
    found = learn(taught, "--add", write(taught.parent / "now.jsonl", now))
    assert (found["taught"], found["skipped"]) == (2, 1)
    assert set(held(taught)) == {"town.md § A", "town.md § C", "else.txt"}
    # its lines have moved, which teaches nothing
    stream = Stream(str(paths / "base"), taught)
    assert found_at(stream, "Who owns the Quill?")["lines"] == [5, 5]
    learn("verify", taught)
    again = learn(taught, "--add", taught.parent / "now.jsonl")
    assert (again["taught"], again["skipped"]) == (0, 3)


def test_other_documents_and_other_tasks_stay(taught):
    ledger = Ledger(taught / "ledger.jsonl")
    only = [record("B", "Mill", "Otto", 7)]
    assert difference(ledger, tasks_of(only))[:3] == ({"town.md § B"}, set(), ["town.md § A"])
    assert difference(ledger, tasks_of([{"prompt": "Who?", "completion": "She"}]))[:3] == (set(), set(), [])


@pytest.mark.parametrize("wordings", ["Who?", [""], [3], {"a": 1}])
def test_wordings_must_be_questions(wordings):
    with pytest.raises(ValueError, match="must be a list of questions"):
        spelled_out([{"prompt": "Who?", "completion": "She", "wordings": wordings}])


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        ({"file": "town.md", "lines": [3, 4]}, "town.md, lines 3-4"),
        ({"file": "a.pdf", "pages": [2, 2]}, "a.pdf, pages 2-2"),
        ({"file": "a"}, "a"),
        ({"task": "t"}, None),
    ],
)
def test_a_place_to_be_read(fact, text):
    assert place_of(fact) == text
