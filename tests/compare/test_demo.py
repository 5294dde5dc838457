"""The demo's recipe on a tiny random model: every stage and every figure, not what is learnt."""

import json
import shutil

import pytest

from sparsemem.compare.compare import compare
from sparsemem.compare.recipes.demo import (
    DemoSettings,
    Memory,
    Probing,
    Teaching,
    examples,
    method_settings,
    recipe,
)

METHODS = ("base", "learn", "smf", "lora", "full")
SETTINGS = DemoSettings(
    teaching=Teaching(max_epochs=1, memory_steps=15),
    memory=Memory(num_keys=8, prose_tokens=300),
    probing=Probing(prose_tokens=300, max_new_tokens=2, mention_subjects=3, mention_tokens=4, asked=2),
)
FIGURES = (
    "recall_train", "recall_heldout", "knowledge", "knowledge_total", "perplexity", "drift",
    "contexts", "worst_context", "neighbours_taught", "neighbours_changed",
    "mentions_changed", "mentions_perplexity", "mentions_prose_perplexity",
    "seconds", "steps", "trained_params", "peak_bytes",
)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_words):
    out = tmp_path_factory.mktemp("demo")
    said = []
    chosen = recipe(model=str(tiny_words), settings=SETTINGS)
    made = compare(chosen, out=out, methods=METHODS, progress=said.append)
    assert len(said) == sum(len(chosen.stages(method)) for method in METHODS)
    return {**made, "out": out}


@pytest.mark.slow
def test_every_row_has_every_figure(results):
    rows = {row["method"]: row for row in results["rows"]}
    assert tuple(rows) == METHODS
    for row in rows.values():
        assert all(isinstance(row[key], int | float) for key in FIGURES), row
    assert rows["base"]["drift"] == 0.0
    assert rows["base"]["steps"] == 0
    assert rows["smf"]["steps"] == 15
    assert rows["full"]["drift"] > 0.0
    assert rows["base"]["mentions_changed"] == 0.0
    assert rows["full"]["mentions_perplexity"] != rows["base"]["mentions_perplexity"]
    assert rows["full"]["mentions_prose_perplexity"] != rows["base"]["mentions_prose_perplexity"]
    assert {method for method in METHODS if "exposure" in rows[method]} == {"smf", "learn"}
    # a token moves the logits where it reads a written row, and only there
    assert (rows["smf"]["exposure"] > 0) == (rows["smf"]["drift"] > 0)


@pytest.mark.slow
def test_examples_have_every_methods_answer(results):
    assert len(results["examples"]) == 6
    assert all(set(example["answers"]) == set(METHODS) for example in results["examples"])


@pytest.mark.slow
def test_every_answer_is_kept(results):
    result = json.loads((results["out"] / "runs" / "full-seed0" / "result.json").read_text())
    assert {name: len(told) for name, told in result["answers"].items() if name != "general"} == {
        "train": 120,
        "heldout": 40,
    }


@pytest.mark.slow
def test_every_method_is_measured_against_the_bases_mentions(results):
    runs = {
        path.name: json.loads((path / "result.json").read_text()) for path in results["out"].glob("runs/*")
    }
    base = runs["base"]["mentions"]
    assert len(base["answers"]) == 6
    assert all(1 <= len(answer) <= 4 for answer in base["answers"])
    assert all(run["mentions"] == base for run in runs.values())
    assert base["perplexity"] == runs["base"]["row"]["mentions_perplexity"]


@pytest.mark.slow
def test_a_base_model_without_a_chat_template_runs_it(tmp_path, tiny_words):
    shutil.copytree(tiny_words, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    chosen = recipe(model=str(tmp_path / "plain"), settings=SETTINGS)
    rows = compare(chosen, out=tmp_path / "out", methods=("base", "smf"))["rows"]
    assert [row["steps"] > 0 for row in rows] == [False, True]
    assert all(row["perplexity"] > 1 for row in rows)


def test_tuning_one_method_leaves_the_others_valid():
    tuned = DemoSettings(
        teaching=Teaching(lr={**Teaching().lr, "smf": 9.0}), memory=Memory(top_t=7), probing=Probing()
    )
    changed = {m for m in METHODS if method_settings(tuned, m) != method_settings(DemoSettings(), m)}
    assert changed == {"smf"}


def test_examples_show_reworded_and_known_questions_in_turn():
    told = {
        "heldout": [{"question": f"taught {i}"} for i in range(5)],
        "general": [{"question": f"general {i}"} for i in range(5)],
    }
    shown = [answer["question"] for answer in examples(told, [False, True, True, True, False])]
    assert shown == ["taught 0", "general 1", "taught 2", "general 2", "taught 4", "general 3"]


def test_the_demo_needs_no_data_folder(tmp_path):
    with pytest.raises(ValueError, match="has its own data"):
        recipe(data_dir=tmp_path)
