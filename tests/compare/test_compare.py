import json
import signal

import pytest

from killing import killed
from sparsemem.compare.compare import Recipe, compare, dry_run
from sparsemem.compare.results import collect
from sparsemem.provenance import environment


def make_recipe(calls, *, rate=0.1, row=None, name="toy", **options):
    def settings(method, seed):
        return {} if method == "base" else {"rate": rate, "layers": (1, 2), "seed": seed}

    def run(method, seed, base, stage, folder):
        calls.append((method, seed, None if base is None else base["row"]["recall_train"]))
        stage("teach")
        stage("ask")
        answer = {
            "question": "What?",
            "expected": "That.",
            "answer": f"{method} {seed}",
            "right": method != "base",
        }
        figures = {"recall_train": 0.0 if method == "base" else 0.5 + 0.1 * seed, "steps": 3, "note": method}
        return {"row": {**figures, **(row or {})}, "examples": [answer]}

    methods, stages = ("base", "smf", "lora"), {"teach": 9, "ask": 1}
    return Recipe(name, "tiny", "A toy.", methods, settings, run, lambda method: stages, **options)


def test_runs_every_method_with_every_seed_in_a_folder_of_its_own(tmp_path):
    calls = []
    results = compare(make_recipe(calls), out=tmp_path, seeds=(0, 1))
    assert calls == [("base", None, None), *((m, s, 0.0) for s in (0, 1) for m in ("smf", "lora"))]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "base", "lora-seed0", "lora-seed1", "smf-seed0", "smf-seed1",
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [row["method"] for row in results["rows"]] == ["base", "smf", "lora"]
    assert results["seeds"] == [0, 1]
    assert results["versions"] == environment()["versions"]
    assert json.loads((tmp_path / "runs/smf-seed1/config.json").read_text())["settings"]["layers"] == [1, 2]


def test_finished_runs_are_taken_up(tmp_path):
    compare(make_recipe([]), out=tmp_path, methods=("base", "smf"))
    calls, said = [], []
    results = compare(make_recipe(calls), out=tmp_path, progress=said.append)
    assert calls == [("lora", 0, 0.0)]
    assert [row["method"] for row in results["rows"]] == ["base", "smf", "lora"]
    assert "already finished" in said[0]


def test_models_compute_in_the_recipes_precision(tmp_path, tiny_llama):
    from sparsemem.precision import precision_of

    model, seen = tiny_llama(), []
    recipe = make_recipe([], precision="bfloat16")

    def run(*given):
        seen.append(precision_of(model))
        return make_recipe([]).run(*given)

    recipe = Recipe(**{**vars(recipe), "run": run})
    compare(recipe, out=tmp_path, methods=("smf",))
    assert seen == ["bfloat16", "bfloat16"]
    config = json.loads((tmp_path / "runs/smf-seed0/config.json").read_text())
    assert config["settings"]["precision"] == "bfloat16"
    with pytest.raises(ValueError, match="run with other settings"):
        compare(make_recipe([]), out=tmp_path)


@pytest.mark.parametrize("name", ["demo", "medical", "paper"])
def test_a_recipes_precision_is_a_setting(name):
    from importlib import import_module

    from sparsemem.compare.recipes.overrides import changed

    room = import_module(f"sparsemem.compare.recipes.{name}")
    chosen = {word: changed(room.SETTINGS, [f"precision={word}"]) for word in ("auto", "float32", "x")}
    assert room.recipe(settings=chosen["auto"]).precision is None
    assert room.recipe(settings=chosen["float32"]).precision == "float32"
    with pytest.raises(ValueError, match="precision='x' is unknown"):
        room.recipe(settings=chosen["x"])


def test_an_unfinished_run_is_run_again(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    recipe = make_recipe([])
    compare(recipe, out=tmp_path, methods=("base",))
    with pytest.raises(KeyboardInterrupt):
        compare(Recipe(**{**vars(recipe), "run": stop}), out=tmp_path)
    assert [row["method"] for row in collect(tmp_path)["rows"]] == ["base"]
    assert (tmp_path / "runs/smf-seed0/config.json").exists()
    calls = []
    compare(make_recipe(calls), out=tmp_path)
    assert [call[0] for call in calls] == ["smf", "lora"]


def test_a_run_of_other_settings_is_refused_before_anything_runs(tmp_path):
    compare(make_recipe([]), out=tmp_path)
    calls = []
    with pytest.raises(
        ValueError, match=r"smf-seed0 holds a run with other settings \(settings.rate 0.1 there, 0.2 now\)"
    ):
        compare(make_recipe(calls, rate=0.2), out=tmp_path)
    assert calls == []


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    compare(make_recipe([]), out=tmp_path, methods=("base",))
    with pytest.raises(ValueError, match="recipe 'toy' there, 'other' now"):
        compare(make_recipe([], name="other"), out=tmp_path)


@pytest.mark.parametrize(
    ("methods", "seeds", "message"),
    [
        (("smf", "dora"), (0,), "method 'dora' is unknown in recipe 'toy'; use one of base, smf, lora"),
        ((), (0,), "at least one method"),
        (("smf", "smf"), (0,), "none of them twice"),
        (("smf",), (), "one seed"),
        (("smf",), (1, 1), "none of them twice"),
    ],
)
def test_bad_methods_and_seeds_are_refused(tmp_path, methods, seeds, message):
    with pytest.raises(ValueError, match=message):
        compare(make_recipe([]), out=tmp_path, methods=methods, seeds=seeds)
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_is_written_as_unknown(tmp_path):
    results = compare(make_recipe([], row={"perplexity": float("inf")}), out=tmp_path, seeds=(0, 1))
    assert results["rows"][1]["perplexity"] is None


def test_progress_names_run_stage_and_time_left(tmp_path):
    said = []
    compare(make_recipe([]), out=tmp_path, progress=said.append)
    assert said[0] == "[1/3] base: teach (about 30 s left)"
    assert said[1] == "[1/3] base: ask (about 16 s left)"
    assert said[-1] == "[3/3] lora-seed0: ask (about 1 s left)"


def test_seeds_are_the_recipes_where_none_are_named(tmp_path):
    calls = []
    compare(make_recipe(calls, seeds=(5, 6)), out=tmp_path, methods=("smf",))
    assert [call[:2] for call in calls] == [("base", None), ("smf", 5), ("smf", 6)]


def test_an_unfinished_run_goes_on_in_its_folder(tmp_path):
    def run(method, seed, base, stage, folder):
        step = folder / "partial" / "step"
        metrics = folder / "metrics.jsonl"
        if method == "smf" and not step.exists():
            step.parent.mkdir()
            step.write_text("7")
            metrics.write_text("kept")
            raise KeyboardInterrupt
        return {"row": {"steps": int(step.read_text()) if step.exists() else 0}}

    recipe = Recipe(**{**vars(make_recipe([])), "run": run})
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, out=tmp_path, methods=("smf",))
    assert (tmp_path / "runs/smf-seed0/partial/step").exists()
    results = compare(recipe, out=tmp_path, methods=("smf",))
    assert results["rows"][1]["steps"] == 7
    left = sorted(path.name for path in (tmp_path / "runs/smf-seed0").iterdir())
    assert left == ["config.json", "metrics.jsonl", "result.json"]


def test_what_a_kill_after_the_result_left_is_removed(tmp_path):
    compare(make_recipe([]), out=tmp_path)
    (tmp_path / "runs/base/partial").mkdir()
    compare(make_recipe([]), out=tmp_path)
    assert not (tmp_path / "runs/base/partial").exists()


def test_a_dry_run_says_every_runs_state_settings_and_plan(tmp_path):
    calls = []
    compare(make_recipe([]), out=tmp_path, methods=("smf",))
    (tmp_path / "runs/lora-seed0").mkdir()
    (tmp_path / "runs/lora-seed0/config.json").write_text('{"recipe": "old"}')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    recipe = make_recipe(calls, seeds=(0, 1), plan=lambda method: {"steps": 12, "data": {"train": method}})
    said = dry_run(recipe, out=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert calls == []
    lines = said.splitlines()
    assert lines[:5] == [
        "base: finished",
        '  plan: steps=12 data.train="base"',
        "smf-seed0: finished",
        "  settings: rate=0.1 layers=[1, 2] seed=0",
        '  plan: steps=12 data.train="smf"',
    ]
    assert lines[5].startswith("lora-seed0: other settings (recipe 'old' there, 'toy' now; ")
    assert lines[8] == "smf-seed1: to do"
    assert lines[-1] == "to do: about 20 s"


def test_a_dry_run_makes_no_folder_and_refuses_what_compare_refuses(tmp_path):
    assert dry_run(make_recipe([]), out=tmp_path / "new").startswith("base: to do\nsmf-seed0: to do\n")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="'dora' is unknown"):
        dry_run(make_recipe([]), out=tmp_path, methods=("dora",))


def _stopping(folder, stops):
    def run(method, seed, base, stage, at):
        stage("teach")
        if method == "lora" and stops:
            (folder / "started").touch()
            signal.pause()
        return {"row": {"recall_train": 1.0}}

    compare(
        Recipe("toy", "tiny", "", ("base", "smf", "lora"), lambda m, s: {}, run, lambda m: {"teach": 1}),
        out=folder,
    )


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_stopped(tmp_path):
    assert killed(_stopping, tmp_path, True, ready=(tmp_path / "started").exists)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["base", "smf"]
    before = (tmp_path / "runs/smf-seed0/result.json").stat().st_mtime_ns
    _stopping(tmp_path, False)
    assert (tmp_path / "runs/smf-seed0/result.json").stat().st_mtime_ns == before
    assert [row["method"] for row in collect(tmp_path)["rows"]] == ["base", "smf", "lora"]


def test_another_seed_with_other_settings_is_refused(tmp_path):
    compare(make_recipe([]), out=tmp_path, seeds=(1, 2))
    with pytest.raises(ValueError, match=r"smf-seed1 holds a run with other .*rate 0.1 there, 0.9"):
        compare(make_recipe([], rate=0.9), out=tmp_path, seeds=(3,))
    assert not (tmp_path / "runs" / "smf-seed3").exists()
