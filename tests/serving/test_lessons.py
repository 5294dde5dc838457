"""Lessons on a tiny model: exact undo, state on disk, and the page's interface."""

import json
import time

import pytest
import torch
from peft import get_peft_model

from sparsemem import RowPatch, SparseMemoryConfig, calibrate, memory_layers
from sparsemem.data.models import load_base
from sparsemem.layer.scope import Scope
from sparsemem.serving import changes, lessons, opening
from sparsemem.serving.lessons import Lessons
from sparsemem.serving.opening import open_lessons
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
    monkeypatch.setattr(opening, "general_background", lambda: general)
    monkeypatch.setattr(lessons, "LEAST_STEPS", 6)
    monkeypatch.setattr(lessons, "MAX_TOKENS", 8)
    monkeypatch.setattr(changes, "MAX_TOKENS", 4)
    monkeypatch.setattr(changes, "GENERAL_QUESTIONS", ("What is it?", "Who?"))


@pytest.fixture
def two(tiny, tmp_path):
    held = open_lessons(str(tiny), tmp_path / "state", silent)
    held.teach(CITY, "city", silent)
    held.teach(QUEEN, "queen", silent)
    return held


def tensors(held: Lessons, name: str):
    """An adapter's rows, and its scopes' tensors."""
    held.model.set_adapter(name)
    found = {key: memory.values.detach().clone() for key, memory in memory_layers(held.model).items()}
    for key, memory in memory_layers(held.model).items():
        if isinstance(memory.scope, Scope):
            found |= {f"{key}.{part}": value.clone() for part, value in vars(memory.scope).items()}
    held.model.set_adapter("default")
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_lesson_speaks_until_it_is_off_and_the_base_is_as_it_was(two, tiny):
    question = CITY[0]["prompt"]
    on = two.ask(question)
    assert on["lesson"] == "lesson-1"
    assert on["title"] == "city"
    assert max(piece["gate"] for piece in on["pieces"]) > 0
    assert "".join(piece["text"] for piece in on["pieces"]).strip() == on["taught"]
    # it was cut off, and says so
    assert on["base"].endswith(" …")
    two.set_on("lesson-1", False)
    two.set_on("lesson-2", False)
    off = two.ask(question)
    assert off["lesson"] is None
    assert off["taught"] == off["base"] == on["base"]
    assert {piece["gate"] for piece in off["pieces"]} <= {0.0}
    assert [one["question"] for one in two.asked] == [question, question]


def test_undo_leaves_the_other_lesson_as_if_it_were_alone(two):
    beside = tensors(two, "lesson-2")
    two.undo("lesson-1")
    alone = tensors(two, "lesson-2")
    # beside another lesson it knew that one's centres
    assert not same(beside, alone)
    patch = RowPatch.load(two.file_of("lesson-2"))
    for name, layer in patch.layers.items():
        table = torch.zeros_like(alone[name])
        table[layer.slots] = layer.after
        assert torch.equal(alone[name], table)
        if layer.scope is not None:
            assert all(
                torch.equal(alone[f"{name}.{part}"], value) for part, value in vars(layer.scope).items()
            )
    assert not two.file_of("lesson-1").exists()
    with pytest.raises(ValueError, match="there is no lesson 'lesson-1'"):
        two.undo("lesson-1")


def test_lessons_are_there_again_after_a_restart(two, tiny):
    two.set_on("lesson-2", False)
    asked = two.ask(CITY[0]["prompt"])
    again = open_lessons(str(tiny), two.folder, silent)
    assert again.lessons == two.lessons
    assert again.asked == two.asked
    assert all(same(tensors(again, name), tensors(two, name)) for name in ("lesson-1", "lesson-2"))
    assert again.ask(CITY[0]["prompt"]) == asked
    with pytest.raises(ValueError, match="holds lessons of tiny, not of other; give that model"):
        open_lessons("other", two.folder, silent)


def test_a_question_that_is_taught_again_replaces_the_earlier_lesson(two):
    two.teach([{"prompt": "what is  the capital of Velmora?", "completion": "Other"}], "other", silent)
    assert [lesson.on for lesson in two.lessons] == [False, True, True]


def test_what_cannot_be_taught_leaves_nothing(two):
    with pytest.raises(ValueError, match="max_length"):
        two.teach([{"prompt": "x" * 3000, "completion": "y"}], "long", silent)
    assert [lesson.name for lesson in two.lessons] == ["lesson-1", "lesson-2"]
    assert sorted(two.model.peft_config) == ["default", "lesson-1", "lesson-2"]
    two.ask("Still there?")


def test_changes_are_looked_for(two):
    found = two.look_for_changes(silent)
    assert [pair["question"] for pair in found["questions"]] == ["What is it?", "Who?"]
    assert all(isinstance(pair["base"], str) for pair in found["mentions"])
    assert len(found["mentions"]) > 1
    assert found["prose"][0]["base"] > 1
    assert found["lessons"] == ["lesson-1", "lesson-2"]


def test_what_an_adapter_was_taught_is_the_first_lesson(tiny, tmp_path):
    base, tokenizer = load_base(str(tiny))
    model = get_peft_model(base, SparseMemoryConfig(**SMALL))
    background = calibrate(model, [batch(seed) for seed in range(8)])
    for memory in memory_layers(model).values():
        memory.values.data[3] = 1.0
    model.save_pretrained(tmp_path / "taught")
    tokenizer.save_pretrained(tmp_path / "taught")
    with pytest.raises(ValueError, match=r"has no background\.safetensors"):
        open_lessons(str(tmp_path / "taught"), tmp_path / "state", silent)
    background.save(tmp_path / "taught" / "background.safetensors")
    held = open_lessons(str(tmp_path / "taught"), tmp_path / "state", silent)
    assert [(lesson.title, lesson.rows) for lesson in held.lessons] == [("taught", len(memory_layers(model)))]
    assert not any(table.any() for key, table in tensors(held, "default").items())
    again = open_lessons(str(tmp_path / "taught"), tmp_path / "state", silent)
    assert same(tensors(again, "lesson-1"), tensors(held, "lesson-1"))


@pytest.fixture
def client(tiny, tmp_path):
    from fastapi.testclient import TestClient

    from sparsemem.serving.page import build_page

    app = build_page(lambda progress: open_lessons(str(tiny), tmp_path / "state", progress), "tiny")
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def finished(client):
    end = time.monotonic() + 120
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
    assert client.post("/api/lessons/lesson-1", json={"on": False}).json()["lessons"][0]["on"] is False
    answer = client.post("/api/ask", json={"question": "Who?"}).json()
    assert answer["taught"] == answer["base"]
    assert client.delete("/api/lessons/lesson-1").json()["lessons"] == []
    assert client.delete("/api/lessons/lesson-1").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/teach", {"question": "a"}, 400, "must be text"),
        ("/api/teach", {"file": "{", "name": "facts.jsonl"}, 400, "facts.jsonl, line 1: not valid JSON"),
        ("/api/ask", {"question": " "}, 400, "a question of 1 to 2,000 characters"),
        ("/api/lessons/lesson-9", {"on": True}, 404, "there is no lesson 'lesson-9'"),
        ("/api/lessons/lesson-9", {"on": 1}, 400, "on must be true or false"),
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
    assert client.delete("/api/lessons/lesson-1", headers={"origin": "null"}).status_code == 403
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
