import json

import pytest

from sparsemem.compare.results import collect, run_name


def write_run(out, method, seed, row, **more):
    folder = out / "runs" / run_name(method, seed)
    folder.mkdir(parents=True)
    known = {"recipe": "toy", "model": "tiny", "about": "A toy.", "settings": {"of": method}}
    where = {"versions": {"python": "3"}, "machine": "m", "commit": None}
    result = {**known, "method": method, "seed": seed, "row": row, **where, **more}
    (folder / "result.json").write_text(json.dumps(result))


def methods(out):
    return [row["method"] for row in collect(out)["rows"]]


def test_several_seeds_become_mean_and_sample_deviation(tmp_path):
    for seed, share in enumerate((0.5, 0.6, 0.7)):
        write_run(tmp_path, "smf", seed, {"recall_train": share, "note": "same", "other": f"{seed}"})
    (smf,) = collect(tmp_path)["rows"]
    assert smf["recall_train"] == pytest.approx(0.6)
    assert smf["spread"] == {"recall_train": pytest.approx(0.1)}
    assert (smf["note"], smf["other"]) == ("same", None)
    assert len(collect(tmp_path)["runs"]) == 3


def test_one_seed_keeps_its_own_figures(tmp_path):
    write_run(tmp_path, "smf", 3, {"steps": 3})
    results = collect(tmp_path)
    assert results["seed"] == 3
    assert results["rows"] == [{"method": "smf", "seeds": [3], "steps": 3}]
    assert isinstance(results["rows"][0]["steps"], int)


def test_examples_carry_each_methods_answer(tmp_path):
    asked = {"question": "What?", "expected": "That."}
    write_run(tmp_path, "base", None, {}, examples=[{**asked, "answer": "Eh?", "right": False}])
    write_run(tmp_path, "smf", 0, {}, examples=[{**asked, "answer": "That!", "right": True}])
    (example,) = collect(tmp_path)["examples"]
    assert example["answers"] == {"base": "Eh?", "smf": "That!"}
    assert example["right"] == {"base": False, "smf": True}


def test_rows_follow_the_recipes_order_and_the_base_comes_first(tmp_path):
    for method, seed in (("full", 1), ("smf", 1), ("lora", 1), ("base", None), ("unlisted", 1)):
        write_run(tmp_path, method, seed, {}, order=["lora", "full", "smf"])
    assert methods(tmp_path) == ["base", "lora", "full", "smf", "unlisted"]


def test_runs_that_say_nothing_of_it_are_the_demos(tmp_path):
    for method, seed in (("full", 1), ("smf", 1), ("lora", 1), ("base", None)):
        write_run(tmp_path, method, seed, {})
    results = collect(tmp_path)
    assert methods(tmp_path) == ["base", "smf", "lora", "full"]
    assert results["learnt"] == ["recall_heldout", "recall_train"]
    assert results["lost"] == ["knowledge", "perplexity", "drift"]


def test_what_is_learnt_and_lost_comes_from_the_runs(tmp_path):
    write_run(tmp_path, "base", None, {}, learnt=["medmcqa"], lost=["wikitext", "triviaqa"])
    results = collect(tmp_path)
    assert (results["learnt"], results["lost"]) == (["medmcqa"], ["wikitext", "triviaqa"])


def test_methods_are_held_against_the_base_on_the_same_questions(tmp_path):
    write_run(tmp_path, "base", None, {}, items={"medmcqa": [True, False, False, False], "capitals": [True]})
    write_run(tmp_path, "smf", 1, {}, items={"medmcqa": [True, True, False, False], "capitals": [True]})
    write_run(tmp_path, "smf", 2, {}, items={"medmcqa": [True, True, True, False]})
    write_run(tmp_path, "lora", 1, {})
    compared = collect(tmp_path)["against_base"]
    assert set(compared) == {"smf"}
    assert set(compared["smf"]) == {"medmcqa"}
    assert compared["smf"]["medmcqa"]["difference"] == 0.375
    assert compared["smf"]["medmcqa"]["n"] == 4


def test_other_questions_than_the_bases_are_refused(tmp_path):
    write_run(tmp_path, "base", None, {}, items={"medmcqa": [True, False]})
    write_run(tmp_path, "smf", 1, {}, items={"medmcqa": [True]})
    with pytest.raises(
        ValueError, match=r"medmcqa of smf cannot be compared with the base model: .* the base has 2"
    ):
        collect(tmp_path)


def test_without_a_base_nothing_is_held_against_it(tmp_path):
    write_run(tmp_path, "smf", 1, {}, items={"medmcqa": [True]})
    assert collect(tmp_path)["against_base"] == {}


def test_nothing_to_collect_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        collect(tmp_path)


def test_a_broken_result_names_its_file(tmp_path):
    write_run(tmp_path, "smf", 1, {})
    (tmp_path / "runs/smf-seed1/result.json").write_text("{")
    with pytest.raises(ValueError, match=r"smf-seed1/result\.json as JSON"):
        collect(tmp_path)
