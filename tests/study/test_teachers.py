"""The command with a model, with a server, and with what goes wrong on the way."""

import json
import signal

import pytest
from click.testing import CliRunner

from servers import server, wait_for
from sparsemem.cli.main import main
from sparsemem.data.models import load_base
from sparsemem.study.passages import passages
from sparsemem.study.teachers import Prompted, of_model, of_url
from started import sparsemem_with

FACTS = (
    "# Velmora\n\nThe mayor of Velmora is Ada Lindholm. Its river is Tarsi.\n\n# Orania\n\nOrania is small.\n"
)


@pytest.fixture
def document(tmp_path):
    (tmp_path / "town.md").write_text(FACTS)
    return tmp_path / "town.md"


def invoke(*arguments):
    return CliRunner().invoke(main, ["study", *map(str, arguments)])


def test_prompts_are_short_turns_and_replies_are_parsed(document):
    asked = []

    def ask(conversations, max_tokens):
        asked.extend(conversations)
        return ["Who is it? | Ada.\nno bar\n- What? |\n* Which river? | Tarsi"] * len(conversations)

    (first, _) = passages(document, len)
    found = Prompted(ask).write(first)
    assert [(one.text, q, a) for one, q, a in found[:2]] == [
        ("The mayor of Velmora is Ada Lindholm.", "Who is it?", "Ada"),
        ("The mayor of Velmora is Ada Lindholm.", "Which river?", "Tarsi"),
    ]
    assert [turns[-1]["content"] for turns in asked] == [
        "Text: The mayor of Velmora is Ada Lindholm.", "Text: Velmora: Its river is Tarsi."
    ]  # fmt: skip
    assert [turn["role"] for turn in asked[0]] == ["user", "assistant"] * 5 + ["user"]


def test_a_teacher_that_writes_rubbish_costs_records(document, tmp_path, tiny_words):
    out = tmp_path / "facts.jsonl"
    done = invoke(document, "--model", tiny_words, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["kept"], found["passages"], found["documents"]) == (0, 2, 1)
    assert out.read_text() == ""
    again = invoke(document, "--model", tiny_words, "--out", out, "--json")
    assert json.loads(again.stdout)["done_before"] == 2


def test_bad_input_is_one_sentence(document, tmp_path, tiny):
    out = tmp_path / "facts.jsonl"
    (tmp_path / "binary.txt").write_bytes(b"\0\1")
    for arguments, message in (
        ((tmp_path / "binary.txt",), "is not text"),
        ((document, "--model", "./absent"), "is not a folder"),
        ((document, "--teacher", "./absent"), "is not a folder"),
        ((document, "--teacher", "http://127.0.0.1:9"), "does not answer as it should"),
        ((document, "--teacher-model", "x"), "belongs to a --teacher that is a URL"),
    ):
        done = invoke("--model", tiny, *arguments, "--out", out)
        assert (done.exit_code, message in done.stderr) == (2, True), done.output
        assert "Traceback" not in done.output
    assert not out.exists()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path, tiny_words):
    text = "".join(f"# Section {n}\n\nThe mayor of Town {n} is Person {n}.\n\n" for n in range(16))
    (tmp_path / "long.md").write_text(text)
    arguments = ["study", "long.md", "--model", str(tiny_words), "--out", "facts.jsonl"]
    with sparsemem_with(*arguments, folder=tmp_path) as process:
        wait_for(lambda: "[3]" in process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert "the same command continues" in process.stderr
    with sparsemem_with(*arguments, "--json", folder=tmp_path) as process:
        assert process.wait(300) == 0, process.stderr
    found = json.loads(process.stdout)
    assert (found["passages"], 3 <= found["done_before"] < 16) == (16, True)


@pytest.mark.slow
def test_our_own_server_is_a_teacher(document, tmp_path, tiny_words, monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.setenv("SPARSEMEM_TEACHER_KEY", "any")
    out = tmp_path / "facts.jsonl"
    with server("serve", tiny_words) as (address, process):
        done = invoke(document, "--model", tiny_words, "--teacher", address, "--out", out)
        assert done.exit_code == 0, done.output
        ask = of_url(f"{address}/v1/")
        assert len(ask([[{"role": "user", "content": "Hi"}]], 4)) == 1
        with pytest.raises(ValueError, match="refuses with status 404"):
            of_url(address, "absent")([[{"role": "user", "content": "Hi"}]], 4)
        process.terminate()
        process.wait(60)
        with pytest.raises(ValueError, match="does not answer as it should"):
            ask([[{"role": "user", "content": "Hi"}]], 4)


@pytest.mark.slow
def test_smollm2_writes_and_answers_a_question(tmp_path):
    (tmp_path / "a.txt").write_text("The headquarters of Delta Air Lines is in Lyon.")
    teacher = Prompted(of_model(*load_base("smollm2")))
    ((sentence, question, answer), *_) = teacher.write(next(passages(tmp_path / "a.txt", len)))
    assert ("Delta Air Lines" in question, answer) == (True, "Lyon")
    asked = "In which city is the headquarters of Delta Air Lines?"
    assert "Lyon" in teacher.answer([(asked, sentence.text)])[0]
