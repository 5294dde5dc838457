"""What a teacher typed or dropped becomes records, or one sentence that says what is wrong."""

import json

import pytest

from sparsemem.serving.page import NUM_RECORDS, dropped_records, typed_records

RECORD = {"prompt": "Where?", "completion": "Here"}


def test_phrasings_share_the_answer():
    found = typed_records(" What? ", " That ", ["Which one?", "", "What?"])
    assert found == [
        {"prompt": "What?", "completion": "That"},
        {"prompt": "Which one?", "completion": "That"},
    ]


@pytest.mark.parametrize(
    "line",
    [
        RECORD,
        {"question": "Where?", "answer": "Here"},
        {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here"}]},
    ],
)
def test_each_form_of_record(line):
    assert dropped_records(f"{json.dumps(line)}\n\n", "facts.jsonl") == [RECORD]


def test_a_file_of_study_is_taught_with_its_wordings_and_sources():
    kept = {"subject": "Quill", "source": {"file": "town.md", "lines": [3, 4]}}
    line = {
        "task": "t",
        "prompt": "Who owns the Quill?",
        "completion": "Ada",
        "wordings": ["Whose is the Quill?"],
    }
    found = dropped_records(json.dumps({**line, **kept}), "facts.jsonl")
    assert [one["prompt"] for one in found] == ["Who owns the Quill?", "Whose is the Quill?"]
    assert all(one == {"prompt": one["prompt"], "completion": "Ada", **kept} for one in found)
    with pytest.raises(ValueError, match="line 1: wordings must be a list"):
        dropped_records(json.dumps({**line, "wordings": "Who?"}), "facts.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "facts.jsonl is empty"),
        ("{", "facts.jsonl, line 1: not valid JSON"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "facts.jsonl, line 2: must have the fields"),
        ('{"prompt": "a", "completion": " "}', "line 1: must have the fields"),
        ('{"question": 1, "answer": "b"}', "line 1: must have the fields"),
        ("[]", "line 1: must have the fields"),
        (f"{json.dumps(RECORD)}\n" * (NUM_RECORDS + 1), "more than 2,000 records"),
    ],
)
def test_bad_files(text, message):
    with pytest.raises(ValueError, match=message):
        dropped_records(text, "facts.jsonl")


@pytest.mark.parametrize(
    "typed",
    [("", "b", []), ("a", " ", []), ("", "b", ["a"])],
)
def test_empty_fields(typed):
    with pytest.raises(ValueError, match="fill in both"):
        typed_records(*typed)
