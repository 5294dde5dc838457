"""Reading records: shapes, kinds of files, encodings, folders, the Hub's names, and what is refused."""

import gzip
import itertools
import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from sparsemem.data import reading
from sparsemem.data.names import hub_dataset, public_data
from sparsemem.data.reading import Records, check_records, digest_of, read_records, read_rows

PAIR = {"prompt": "Capital of Velmora?", "completion": "Ostrinth."}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
TALK = {"messages": TURNS}
BRIEF = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ost"}}}
OPENAI_CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ost"}'}}


@pytest.mark.parametrize(
    ("record", "becomes"),
    [
        (PAIR, PAIR),
        ({"prompt": "Hi", "response": "Ho"}, {"prompt": "Hi", "completion": "Ho"}),
        ({"question": "Hi", "answer": "Ho"}, {"prompt": "Hi", "completion": "Ho"}),
        ({"instruction": "Hi", "output": "Ho"}, {"prompt": "Hi", "completion": "Ho"}),
        (
            {"instruction": "Translate.", "input": "Hi", "output": "Ho", "text": "### all of it"},
            {"prompt": "Translate.\n\nHi", "completion": "Ho"},
        ),
        (
            {"instruction": "Hi", "input": "", "output": "Ho", "system": "Be brief."},
            {"messages": [BRIEF, *TURNS]},
        ),
        (TALK, TALK),
        ({"messages": json.dumps(TURNS)}, TALK),
        ({"conversations": TURNS}, TALK),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, TALK),
        ({"conversations": TURNS, "system": "Be brief."}, {"messages": [BRIEF, *TURNS]}),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TALK),
        ({"prompt": TURNS[:1], "completion": "Ho"}, TALK),
        (
            {"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]},
            {"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]},
        ),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, *TURNS]},
            {"messages": [BRIEF, *TURNS]},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TURNS[1]]},
            TALK,
        ),
        (
            {
                "messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]}],
                "tools": json.dumps(TOOLS),
            },
            {
                "messages": [
                    TURNS[0],
                    {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]},
                ],
                "tools": TOOLS,
            },
        ),
        ("As it is.", {"text": "As it is."}),
        (
            {"question": "Which?", "choices": '["a", "b"]', "answer": "1"},
            {"question": "Which?", "choices": ["a", "b"], "answer": 1},
        ),
        ({**PAIR, "task": "one", "n": 3}, {**PAIR, "task": "one", "n": 3}),
        ({**PAIR, "text": None, "messages": None, "rank": None}, {**PAIR, "rank": None}),
    ],
)
def test_each_shape_becomes_one_of_four(record, becomes):
    (read,) = read_records([record])
    assert read == becomes
    assert read_records([read]) == [read]


@pytest.mark.parametrize("subject", ["Velmora", ["Velmora", "Ostrinth"]])
@pytest.mark.parametrize("record", [PAIR, TALK, {"text": "x"}, {"question": "Hi", "answer": "Ho"}])
def test_a_subject_travels_with_every_record(record, subject):
    (read,) = read_records([{**record, "subject": subject}])
    assert read["subject"] == subject
    assert "subject" not in read_records([{**record, "subject": None}])[0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"completion": "x"},
            "record with completion; allowed are the fields messages; conversations; prompt,",
        ),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "record with prompt, chosen, rejected; allowed"),
        ({}, "record with no field"),
        ([1], "record with list"),
        ({"text": 3}, "text must be a string, not int"),
        ({"question": "q", "answer": ["a", "b"]}, r"answer must be a list of \{role, content\}"),
        ({"question": "q", "choices": ["a"], "answer": 1}, "answer=1 must be the index"),
        ({"question": "q", "choices": "ab", "answer": 0}, "choices must be a list of strings"),
        ({"messages": TURNS[:1]}, "messages must have at least one assistant turn"),
        ({"messages": TURNS[1:]}, "messages must have at least one assistant turn after the first turn"),
        ({"messages": "x"}, "messages must be a list"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] must have a role"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, r"messages\[1\].content is blank; give text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]},
            r"messages\[0\].content must be a string, not list",
        ),
        ({**TALK, "tools": "weather"}, "tools must be a list"),
        (
            {"messages": [*TURNS, {"role": "assistant", "tool_calls": ["x"]}]},
            r"messages\[2\].tool_calls must be a list of calls",
        ),
        ({"prompt": "", "completion": "x"}, "prompt is blank; give text"),
        ({"prompt": "x", "completion": " \n"}, "completion is blank; give text"),
        ({"prompt": TURNS[:1], "completion": TURNS[:1]}, "completion must have at least one assistant turn"),
        (
            {"instruction": "x", "output": "y", "history": [["a", "b"]]},
            "history is not read; write the turns",
        ),
        ({**PAIR, "subject": 3}, "subject=3 must be a name or a list of names"),
        ({"prompt": "\ud800", "completion": "x"}, r"prompt has half a character \(a lone surrogate\)"),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": "a\udfff"}]},
            r"messages\[1\].content has half a character",
        ),
    ],
)
def test_a_bad_record_is_refused_in_one_sentence_with_its_line(tmp_path, record, message):
    path = tmp_path / "data.jsonl"
    path.write_text(f"\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: {message}") as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([json.dumps(PAIR), "{"], "line 2: not valid JSON"),
        ([json.dumps(PAIR), '{"text": "x"}'], "line 2: text record among prompt/completion records"),
        (["[" * 100_000], "line 1: JSON nested too deeply"),
    ],
)
def test_bad_files_name_the_line(tmp_path, lines, message):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as caught:
        read_records(path)
    assert "data.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mixed_shapes_on_request():
    assert read_records([PAIR, "x"], mixed=True) == [PAIR, {"text": "x"}]


RECORDS = [{"prompt": "Grüße?", "completion": '東京, "x"\n  next'}, {"prompt": "007?", "completion": "NA"}]
LINES = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in RECORDS)
CSV = 'prompt,completion\nGrüße?,"東京, ""x""\n  next"\n007?,NA\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES.encode()),
        ("x", LINES.encode("utf-8-sig")),
        ("x.ndjson", LINES.replace("\n", "\r\n").encode()),
        ("x.jsonl", LINES.encode("utf-16")),
        ("x.jsonl.gz", gzip.compress(LINES.encode("utf-16"), mtime=0)),
        ("x.json", json.dumps(RECORDS, indent=1).encode("utf-8-sig")),
        ("x.json", LINES.encode()),
        ("x.json.gz", gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
        ("x.csv", CSV.encode("utf-8-sig")),
        ("x.csv.gz", gzip.compress(CSV.encode("utf-16"), mtime=0)),
        ("x.tsv", CSV.replace(",", "\t", 1).replace("?,", "?\t").encode()),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_records(tmp_path / name) == read_records(str(tmp_path / name)) == RECORDS
    assert read_rows(tmp_path / name)[1] == RECORDS


def test_parquet_datasets_and_a_folder(tmp_path):
    wanted = [{"prompt": "x", "completion": "y", "subject": "Velmora"}, *RECORDS]
    rows = Dataset.from_list(wanted)
    assert rows[1]["subject"] is None
    rows.to_parquet(tmp_path / "b.parquet")
    assert read_records(tmp_path / "b.parquet") == read_records(rows) == wanted
    (tmp_path / "more").mkdir()
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    (tmp_path / "more" / "c.json").write_text(json.dumps([PAIR]))
    (tmp_path / "README.md").write_text("about")
    assert read_records(tmp_path) == [*RECORDS, *wanted, PAIR]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, r"cannot be read \(No such file"),
        ("absent.parquet", None, r"cannot be read \(No such file"),
        ("x.parquet", b"PAR1 and more", "cannot be read as Parquet"),
        ("x.parquet", b"prompt", "is not Parquet; give JSON lines"),
        (
            "x",
            b"\xff\xfe\x00",
            "is not UTF-8 or UTF-16 text; give JSON lines, a .json list, CSV, TSV or Parq",
        ),
        ("x.jsonl", "Grüße".encode("latin-1"), "is not UTF-8"),
        ("x.jsonl.gz", b"plain", r"cannot be read \(Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-20], "cannot be read"),
        ("x.json", b'[{"prompt": ', "x.json: not valid JSON .*; repair the list"),
        ("x.json", b"[3]", "x.json, record 1: record with int"),
        ("x.csv", b"prompt,completion\na,b,c\n", "line 2: more values than the first line has names"),
        ("x.csv", b'prompt,completion\na,"b\n', "not a table"),
        ("x.csv", b"prompt,completion\na\n", "line 2: record with prompt; allowed are"),
        ("x.csv", b"prompt;completion\na;b\n", "line 2: record with prompt;completion; allowed are"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_records(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_data(tmp_path):
    with pytest.raises(ValueError, match="has no data file; give JSON lines"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (IterableDataset.from_generator(lambda: itertools.repeat(PAIR)), "no end; give list"),
        (itertools.repeat(PAIR), "data is a repeat; give a list of records, a Dataset or the name"),
        (DatasetDict({"train": Dataset.from_list([PAIR])}), "data is a DatasetDict; give a list"),
        (Dataset.from_list([PAIR]).to_pandas(), "data is a DataFrame; give a list"),
        ([], "is empty"),
    ],
)
def test_what_is_no_list_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_records(source)


def test_a_file_is_read_as_far_as_it_is_asked_for(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n" * 1000 + "{\n")
    check_records(str(path), most=1000)
    check_records(None)
    check_records("hub:owner/name")
    with pytest.raises(ValueError, match="line 1001: not valid JSON"):
        check_records(str(path))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        check_records(str(tmp_path / "empty.jsonl"))


def test_records_are_checked_once(monkeypatch):
    read = read_records([PAIR, TALK], mixed=True)
    monkeypatch.setattr(reading, "checked", None)
    assert isinstance(read, Records)
    assert read_records(read, mixed=True) == read
    with pytest.raises(ValueError, match="messages record among prompt/completion records"):
        read_records(read)


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("")
    names = {
        "hub:owner/name:test": "owner/name:test",
        "other/name": "other/name",
        "other/name.v1:train[:10]": "other/name.v1:train[:10]",
        "owner/name": None,
        "here/absent": None,
        "other/name.jsonl": None,
        "other/name.csv.gz": None,
        "./name": None,
        "/other/name": None,
        "a/b/c": None,
        "absent": None,
    }
    assert {source: hub_dataset(source) for source in names} == names
    assert public_data("other/name") == public_data("hub:other/name") == "hub:other/name"
    assert public_data(str(tmp_path / "taught.jsonl")) == "taught.jsonl"
    asked = []
    monkeypatch.setattr(reading, "from_hub", lambda name, split: asked.append((name, split)) or [PAIR])
    assert read_records("other/name") == read_records("hub:other/name:train[:10]") == [PAIR]
    assert asked == [("other/name", "train"), ("other/name", "train[:10]")]


def test_a_digest_is_that_of_the_json(tmp_path):
    import hashlib

    import torch

    records = [PAIR, {**TALK, "x": 1.5}]
    whole = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
    assert digest_of(records) == digest_of(Records(records)) == whole
    examples = [{"input_ids": [1, 2], "labels": [-100, 2]}]
    assert digest_of(examples) == digest_of([{k: torch.tensor(v) for k, v in examples[0].items()}])
