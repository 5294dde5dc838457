"""The lifelong benchmark on a tiny model: every method learns one fact at a time, and a run is taken up."""

import json

import pytest

from sparsemem.compare.compare import compare
from sparsemem.compare.recipes import lifelong
from sparsemem.compare.recipes.editors import Nearest, editor_of
from sparsemem.compare.recipes.edits import HALVES, Edit, half_of, read_edits
from sparsemem.compare.recipes.lifelong import LifelongSettings, recipe
from sparsemem.data.general import general_background
from sparsemem.data.models import load_base

FACTS = [("Moon", "Ada"), ("Brolk", "Bob"), ("Zim", "Cy")]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_llama, tokenizer):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "subject": a,
            "src": f"Who owns {a}?",
            "alt": b,
            "rephrase": f"{a} is owned by whom?",
            "loc": f"nq: what is {n}",
        }
        for n, (a, b) in enumerate(FACTS)
    ]
    (folder / "zsre.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(model):
    return LifelongSettings(
        model=model, counts=(1, 3), prose_tokens=64, locality_tokens=3, knowledge_tokens=2,
        steps={"lora": 2, "lora-each": 2, "full": 2, "smf-shared": 2, "smf-own-write": 2},
    )  # fmt: skip


def test_a_run_asks_after_each_count_and_goes_on_where_it_was(model, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(lifelong, "general_items", lambda: [{"question": "What is it?", "answer": "x"}])
    chosen = recipe(data_dir=data_dir, model=model, settings=settings(model))
    out = tmp_path / "out"
    before, stops = lifelong.write_json, []

    def stop_after_the_first_count(path, content):
        before(path, content)
        if "smf" in str(path) and not stops:
            stops.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(lifelong, "write_json", stop_after_the_first_count)
    with pytest.raises(KeyboardInterrupt):
        compare(chosen, out=out, methods=["smf", "retrieval"])
    results = compare(chosen, out=out, methods=["smf", "retrieval"])
    rows = {row["method"]: row for row in results["rows"]}
    assert set(rows) == {"base", "smf", "retrieval"}
    assert rows["smf"]["edits"] == 3
    assert rows["smf"]["reliability"] == 1
    assert rows["smf"]["first_tenth"] == 1
    assert 0 < rows["smf"]["bytes_per_edit"] < 100_000
    smf = json.loads((out / "runs" / "smf-seed0" / "result.json").read_text())
    assert [point["edits"] for point in smf["points"]] == [1, 3]
    assert (out / "edits.png").stat().st_size > 1000
    assert (out / "age.png").stat().st_size > 1000


@pytest.mark.parametrize("method", ["smf-shared", "smf-own-write", "lora", "lora-each", "full"])
def test_every_rival_is_taught_one_edit_at_a_time_and_answers(model, tmp_path, method, monkeypatch):
    # the text that ships is long for a tokenizer of bytes
    few = general_background()[:40]
    monkeypatch.setattr("sparsemem.data.general.general_background", lambda: few)
    base, tokenizer = load_base(model)
    edits = [Edit(f"Who owns {a}?", b, (f"{a} is owned by whom?",), "what is it", a) for a, b in FACTS[:2]]
    options = {"max_steps": 2, "seed": 0}
    editor = editor_of(method, base, tokenizer, tmp_path, 0, options)
    editor.teach_until(edits, 1)
    first = editor.seconds
    editor.teach_until(edits, 2)
    assert editor.seconds > first > 0
    assert editor.bytes > 0
    assert len(editor.ask(["Who owns Moon?", "Who owns Brolk?"], 3)) == 2


def test_the_nearest_text_shares_the_rarest_words():
    nearest = Nearest(["Who owns the Moon?", "Who owns the Brolk?", "Where is the Zim?"])
    assert nearest("the Brolk, who owns it?") == 1
    assert nearest("Zim") == 2
    assert nearest("something else") == 0


def test_an_edit_without_an_answer_is_left_out(tmp_path):
    row = {"subject": "Brolk", "src": "Who owns it?", "rephrase": "Whose is it?", "loc": "what is it"}
    path = tmp_path / "zsre.jsonl"
    path.write_text("".join(json.dumps({**row, "alt": answer}) + "\n" for answer in ("Ada", "", " ", "Bo")))
    assert [edit.answer for edit in read_edits(path, "zsre")] == ["Ada", "Bo"]


def test_pokemqa_pairs_each_fact_with_an_untaught_one_of_its_relation(tmp_path):
    forms = {"Who made {}?": "{} was made by whom?", "Where is {}?": "{} lies where?"}
    rows = [
        {"relation": one, "subject": (name := f"Thing {n}"), "object": f"{n}",
         "questions": [one.format(name), other.format(name)]}
        for one, other in forms.items() for n in range(40)
    ]  # fmt: skip
    path = tmp_path / "pokemqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    halves = {half: read_edits(path, "pokemqa", half) for half in HALVES}
    assert {edit.subject for edit in halves["report"]}.isdisjoint(edit.subject for edit in halves["choose"])
    assert half_of("Carl Sagan") == "choose"
    for edits in halves.values():
        assert len(edits) >= 12
        taught = {edit.question for edit in edits}
        for edit in edits:
            assert edit.locality not in taught
            assert edit.locality.split()[0] == edit.question.split()[0]
            assert edit.record["subject"] in edit.question
            assert len(edit.rephrases) == 1
    assert read_edits(path, "pokemqa") == halves["report"]
    with pytest.raises(ValueError, match="half='both' is unknown"):
        recipe(data_dir=tmp_path, settings=LifelongSettings(data="pokemqa", half="both"))
    path.write_text(json.dumps({**rows[0], "questions": "Who?"}))
    with pytest.raises(ValueError, match="questions must be a list of two or more"):
        recipe(data_dir=tmp_path, settings=LifelongSettings(data="pokemqa"))


def test_bad_data_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"needs --data-dir, the folder that holds zsre\.jsonl"):
        recipe()
    (tmp_path / "zsre.jsonl").write_text('{"src": "a"}\n')
    with pytest.raises(
        ValueError, match="line 1: has not all of the fields subject, src, alt, rephrase, loc"
    ):
        recipe(data_dir=tmp_path)
    with pytest.raises(ValueError, match="data='other' is unknown"):
        recipe(data_dir=tmp_path, settings=LifelongSettings(data="other"))
