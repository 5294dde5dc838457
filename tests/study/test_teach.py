"""Documents to a taught stream in one call, and what a changed one changes."""

import re

import pytest

from sparsemem import Stream, teach_documents
from sparsemem.data.generation import answer_tokens
from sparsemem.data.models import load_base
from sparsemem.data.records import question_ids

BACKGROUND = [
    {"prompt": f"What is {a} and {b}?", "completion": f"{a + b} of course"}
    for a in range(8)
    for b in range(8)
]
DOCUMENT = "# Velmora\n\nThe mayor of Velmora is Ada.\n\n# Orania\n\nThe capital of Orania is Port Hale.\n"
FORM = r"[Tt]he (\w+) of (\w+) is (.+?)\."


class Rules:
    """Knows "The X of Y is Z."."""

    def write(self, passage):
        known = [(one, re.match(FORM, one.text)) for one in passage.sentences]
        found = [(one, match.groups()) for one, match in known if match]
        return [(one, f"What is the {x} of {y}?", z) for one, (x, y, z) in found]

    def reword(self, questions):
        return [[question.replace("What is", "Do you know")] for question in questions]

    def answer(self, asked):
        return [re.match(FORM, text)[3] for _, text in asked]


@pytest.fixture
def stream(tmp_path, tiny):
    model, tokenizer = load_base(str(tiny))
    return Stream(model, tmp_path / "mind", tokenizer=tokenizer, background=BACKGROUND)


def answer(stream, question):
    (tokens,) = answer_tokens(
        stream.model, stream.tokenizer, [question_ids(question, stream.tokenizer)], max_new_tokens=12
    )
    return stream.tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_document_is_taught_and_its_change_too(stream, tmp_path):
    path = tmp_path / "town.md"
    path.write_text(DOCUMENT)
    name = path.as_posix()
    done = teach_documents(stream, [path], teacher=Rules())
    assert done["taught"] == stream.tasks == [f"{name} § Velmora", f"{name} § Orania"]
    assert answer(stream, "What is the capital of Orania?") == "Port Hale"
    assert answer(stream, "Do you know the mayor of Velmora?") == "Ada"

    path.write_text(DOCUMENT.replace("Port Hale", "New Hale"))
    done = teach_documents(stream, [path], teacher=Rules())
    assert (done["taught"], done["held"]) == ([f"{name} § Orania"], [f"{name} § Velmora"])
    assert answer(stream, "What is the capital of Orania?") == "New Hale"

    path.write_text(DOCUMENT.split("# Orania")[0])
    done = teach_documents(stream, [path], teacher=Rules())
    assert (done["taught"], done["taken_back"]) == ([], [f"{name} § Orania"])
    assert stream.tasks == [f"{name} § Velmora"]

    path.write_text("Nothing is known.")
    done = teach_documents(stream, [path], teacher=Rules())
    assert (done["kept"], done["taken_back"], stream.tasks) == (0, [f"{name} § Velmora"], [])


def test_the_base_is_its_own_teacher(stream, tmp_path):
    """A random model writes nothing that is kept."""
    (tmp_path / "town.txt").write_text("The mayor of Velmora is Ada.")
    done = teach_documents(stream, [tmp_path / "town.txt"])
    assert (done["kept"], done["taught"], stream.tasks) == (0, [], [])
