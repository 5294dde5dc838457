"""Lessons on a tiny model: exact undo, state on disk, and the page's interface."""

import json
import shutil
import time

import pytest
import torch
from peft import get_peft_model

from sparsemem import SparseMemoryConfig, calibrate, memory_layers
from sparsemem.data.models import load_base
from sparsemem.data.records import question_ids
from sparsemem.serving import answering as changes
from sparsemem.serving import lessons
from sparsemem.serving.answering import answer_all
from sparsemem.serving.decoding import Decoder, Row, Sampling
from sparsemem.serving.lessons import open_lessons
from sparsemem.serving.memories import load_served
from sparsemem.stream import folder as streams
from sparsemem.stream import stream as stream_folder
from tiny import SMALL, batch

pytest.importorskip("fastapi")
CITY = [{"prompt": "What is the capital of Velmora?", "completion": "Tarsipol"}]
QUEEN = [{"prompt": "Who rules Velmora?", "completion": "Queen Ada"}]
pytestmark = pytest.mark.slow


def silent(*_progress):
    pass


@pytest.fixture(autouse=True)
def _little_text(monkeypatch):
    turns = [(("user", f"What is {number}?"), ("assistant", str(number))) for number in range(40)]
    general = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in turns]
    monkeypatch.setattr(stream_folder, "general_background", lambda: general)
    monkeypatch.setattr(lessons, "MAX_TOKENS", 12)
    monkeypatch.setattr(changes, "MAX_TOKENS", 4)
    monkeypatch.setattr(changes, "GENERAL_QUESTIONS", ("What is it?", "Who?"))


@pytest.fixture
def two(tiny, tmp_path):
    held = open_lessons(str(tiny), tmp_path / "state", silent)
    held.teach(CITY, "city", silent)
    held.teach(QUEEN, "queen", silent)
    return held


def test_a_lesson_speaks_until_it_is_off_and_the_base_is_as_it_was(two):
    question = CITY[0]["prompt"]
    on = two.ask(question)
    assert on["taught"] == CITY[0]["completion"]
    assert (on["lesson"], on["title"]) == (two.lessons[0].name, "city")
    assert max(piece["gate"] for piece in on["pieces"]) > 0
    assert "".join(piece["text"] for piece in on["pieces"]).strip() == on["taught"]
    # it was cut off, and says so
    assert on["base"].endswith(" …")
    for lesson in two.lessons:
        two.set_on(lesson.name, False)
    off = two.ask(question)
    assert off["lesson"] is None
    assert off["taught"] == off["base"] == on["base"]
    assert {piece["gate"] for piece in off["pieces"]} <= {0.0}
    assert [one["question"] for one in two.asked] == [question, question]


def test_an_answer_names_the_lines_it_came_from(two):
    source = {"file": "town.md", "lines": [3, 4]}
    question = "Who mends the Oar?"
    record = {"prompt": question, "completion": "Ed", "subject": "Oar", "source": source}
    two.teach([record], "town.md § A", silent)
    found = two.ask(question)
    assert (found["title"], found["source"]) == ("town.md § A", "town.md, lines 3-4")
    assert two.ask(CITY[0]["prompt"])["source"] is None


def test_a_fact_is_told_whoever_joins_and_leaves_beside_it(two):
    model, tokenizer = two.stream.model, two.stream.tokenizer
    asked = [(CITY[0]["prompt"], ("default",)), (CITY[0]["prompt"], ()), (QUEEN[0]["prompt"], ("default",))]
    alone = [answer_all(model, tokenizer, [one], max_tokens=9)[0].row.tokens for one in asked]
    decoder = Decoder(model)

    def joined(number):
        question, names = asked[number]
        decoder.join([row := Row(question_ids(question, tokenizer), names, Sampling(temperature=0))])
        return row

    def steps(number):
        for _ in range(number):
            decoder.step()

    base = joined(1)
    steps(2)
    city = joined(0)
    steps(3)
    decoder.leave([city])
    # the base's answer alone keeps no tokens
    steps(2)
    queen = joined(2)
    steps(1)
    again = joined(0)
    steps(5)
    for row, expected in ((base, alone[1]), (city, alone[0]), (queen, alone[2]), (again, alone[0])):
        shared = min(len(row.tokens), len(expected))
        assert shared > 3
        assert row.tokens[:shared] == expected[:shared]


def test_the_folder_is_a_stream_that_learn_reads(two, tiny):
    folder = two.stream.folder
    assert [task["task"] for task in streams.status(folder)["tasks"]] == ["city", "queen"]
    assert streams.verify(folder)["ok"]
    two.undo(two.lessons[0].name)
    assert streams.verify(folder)["ok"]
    assert streams.status(folder)["undone"] == ["city"]
    with pytest.raises(ValueError, match="there is no lesson '000001'"):
        two.undo("000001")


def test_undo_leaves_what_would_be_there_had_the_other_been_taught_alone(two, tiny, tmp_path):
    two.undo(two.lessons[0].name)
    alone = open_lessons(str(tiny), tmp_path / "alone", silent)
    alone.teach(QUEEN, "queen", silent)
    (there,), (expected,) = (memory_layers(held.stream.model).values() for held in (two, alone))
    assert there.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, there.state_dict()[key]) for key, tensor in expected.state_dict().items())


def test_lessons_are_there_again_after_a_restart(two, tiny):
    two.set_on(two.lessons[1].name, False)
    asked = two.ask(CITY[0]["prompt"])
    folder = two.stream.folder
    # also by the folder's own name
    for number, given in enumerate([(str(tiny), folder), (str(folder), None)], start=1):
        again = open_lessons(*given, silent)
        assert again.lessons == two.lessons
        assert again.asked == [asked] * number
        assert again.ask(CITY[0]["prompt"]) == asked
    with pytest.raises(ValueError, match="holds lessons and is continued itself; leave --out out"):
        open_lessons(str(folder), folder / "other", silent)


def test_a_lesson_is_there_if_the_page_was_killed_after_teaching_it(two, tiny):
    (two.stream.folder / "page.json").unlink()
    again = open_lessons(str(tiny), two.stream.folder, silent)
    assert [lesson.title for lesson in again.lessons] == ["city", "queen"]
    assert again.lessons[0].records == [{"prompt": CITY[0]["prompt"], "completion": ""}]
    assert again.ask(CITY[0]["prompt"])["taught"] == CITY[0]["completion"]


def test_another_folder_and_another_model_are_refused(two, tiny_llama, tokenizer, tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"belongs to another base model; give '.*tiny'"):
        open_lessons(str(tmp_path / "other"), two.stream.folder, silent)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="full exists and is not empty"):
        open_lessons(str(tmp_path / "other"), tmp_path / "full", silent)


def test_a_question_that_is_taught_again_is_answered_by_the_newer_lesson(two):
    again = [{"prompt": "what is  the capital of Velmora?", "completion": "Other"}]
    two.teach(again, "city", silent)
    assert [lesson.title for lesson in two.lessons] == ["city", "queen", "city (2)"]
    assert [lesson.replaced for lesson in two.lessons] == [True, False, False]
    assert two.ask(CITY[0]["prompt"])["title"] != "city"
    # without it, the earlier one answers
    two.set_on(two.lessons[2].name, False)
    assert two.ask(CITY[0]["prompt"])["taught"] == CITY[0]["completion"]
    two.undo(two.lessons[2].name)
    assert [lesson.replaced for lesson in two.lessons] == [False, False]


def test_what_cannot_be_taught_leaves_nothing(two):
    with pytest.raises(ValueError, match="tokens, the model reads 2048"):
        two.teach([{"prompt": "x" * 3000, "completion": "y"}], "long", silent)
    assert [lesson.title for lesson in two.lessons] == ["city", "queen"]
    assert streams.verify(two.stream.folder)["ok"]
    two.ask("Still there?")


def test_progress_is_told_in_tokens(two):
    said = []
    many = [{"prompt": f"What is number {n}?", "completion": f"It is {n * 7}"} for n in range(20)]
    lesson = two.teach(many, "numbers.jsonl", lambda *told: said.append(told))
    assert said[-1][0] == "Learning"
    assert 0 < said[-1][1] < said[-1][2] == lesson.rows


def test_changes_are_looked_for(two):
    found = two.look_for_changes(silent)
    assert [pair["question"] for pair in found["questions"]] == ["What is it?", "Who?"]
    assert all(isinstance(pair["base"], str) for pair in found["neighbours"])
    assert len(found["neighbours"]) > 1
    assert "[You are a pirate.] " in found["contexts"][0]["question"]
    assert len(found["contexts"]) == 16
    assert any(pair["right"] for pair in found["contexts"])
    assert found["prose"][0]["base"] > 1
    assert found["lessons"] == ["000001", "000002"]


def test_an_adapter_is_a_lesson_that_cannot_be_taken_back(tiny, tmp_path):
    base, tokenizer = load_base(str(tiny))
    model = get_peft_model(base, SparseMemoryConfig(**SMALL))
    calibrate(model, [batch(seed) for seed in range(8)])
    for memory in memory_layers(model).values():
        memory.values.data.normal_()
    model.save_pretrained(tmp_path / "taught")
    tokenizer.save_pretrained(tmp_path / "taught")
    for expected in (True, False):
        held = open_lessons(str(tmp_path / "taught"), tmp_path / "state", silent)
        (lesson,) = held.lessons
        assert (lesson.title, lesson.given, lesson.on) == ("taught", True, expected)
        answer = held.ask("Who?")
        assert (answer["lesson"] == "given") == (answer["taught"] != answer["base"]) == expected
        with pytest.raises(ValueError, match="start it with the base model instead"):
            held.undo("given")
        held.set_on("given", False)
    held.teach(CITY, "city", silent)
    held.set_on("given", True)
    assert held.ask(CITY[0]["prompt"])["base"] != CITY[0]["completion"]


def test_a_downloaded_lesson_is_served_on_its_folder(two, tmp_path):
    file = tmp_path / "downloads" / "city.safetensors"
    file.parent.mkdir()
    shutil.copy(two.file_of("000001")[0], file)
    two.undo("000001")
    served = load_served(str(two.stream.folder), {"city": file})
    assert served.memories == ("state", "city")
    question = CITY[0]["prompt"]
    asked = [(question, served.memories_of(name)) for name in ("base", "state", "city")]
    base, state, city = (one.text for one in answer_all(served.model, served.tokenizer, asked, max_tokens=8))
    assert base == state
    assert city.startswith(CITY[0]["completion"])


@pytest.fixture
def client(tiny, tmp_path):
    from fastapi.testclient import TestClient

    from sparsemem.serving.page import build_page

    app = build_page(lambda progress: open_lessons(str(tiny), tmp_path / "state", progress), "tiny")
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def finished(client):
    end = time.monotonic() + 600
    while (state := client.get("/api/state").json())["job"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    return state


def test_the_page_teaches_switches_and_takes_back(client):
    assert finished(client)["ready"]
    body = {"question": "What is the capital of Velmora?", "answer": "Tarsipol", "phrasings": ["Name it."]}
    started = client.post("/api/teach", json=body)
    assert started.json()["job"]["kind"] == "teach"
    assert client.post("/api/teach", json=body).status_code == 409
    (lesson,) = finished(client)["lessons"]
    assert (lesson["title"], len(lesson["records"]), lesson["on"]) == (body["question"], 2, True)
    file = client.get(f"/api/lessons/{lesson['name']}/file")
    assert len(file.content) == lesson["size"]
    assert 'filename="what-is-the-capital-of-velmora.safetensors"' in file.headers["content-disposition"]
    assert client.post("/api/lessons/000001", json={"on": False}).json()["lessons"][0]["on"] is False
    answer = client.post("/api/ask", json={"question": "Who?"}).json()
    assert answer["taught"] == answer["base"]
    assert client.delete("/api/lessons/000001").json()["lessons"] == []
    assert client.delete("/api/lessons/000001").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/teach", {"question": "a"}, 400, "fill in both"),
        ("/api/teach", {"question": "a", "answer": 3}, 400, "answer=3: must be a string"),
        ("/api/teach", {"file": "{", "name": "facts.jsonl"}, 400, "facts.jsonl, line 1: not valid JSON"),
        ("/api/ask", {"question": " "}, 400, "a question of 1 to 2,000 characters"),
        ("/api/lessons/lesson-9", {"on": True}, 404, "there is no lesson 'lesson-9'"),
        ("/api/lessons/lesson-9", {"on": 1}, 400, "on=1: must be a boolean"),
    ],
)
def test_the_page_says_what_is_wrong(client, path, body, status, message):
    finished(client)
    answer = client.post(path, json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_other_pages_cannot_teach_and_nothing_is_loaded_from_elsewhere(client):
    finished(client)
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    body = {"question": "a", "answer": "b"}
    foreign = client.post("/api/teach", json=body, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    plain = client.post("/api/teach", content=json.dumps(body), headers={"content-type": "text/plain"})
    assert plain.status_code == 403
    assert client.delete("/api/lessons/000001", headers={"origin": "null"}).status_code == 403
    for path in ("/", "/page.js", "/page.css", "/icon.svg"):
        answer = client.get(path)
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in answer.text


def test_a_model_that_cannot_be_loaded_is_said_on_the_page(tmp_path):
    from fastapi.testclient import TestClient

    from sparsemem.serving.page import build_page

    app = build_page(lambda progress: open_lessons("./nothing", tmp_path / "state", progress), "nothing")
    with TestClient(app, base_url="http://localhost") as client:
        state = finished(client)
        assert not state["ready"]
        assert "'./nothing' is not a folder" in state["error"]
        assert client.post("/api/ask", json={"question": "a"}).status_code == 503
