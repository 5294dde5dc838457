"""The paper's comparison on a tiny model and a folder of data: every arm, killed, resumed, refused."""

import json
import shutil
import time

import pytest
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM

import sparsemem  # noqa: F401 (registers the adapter type)
from sparsemem.cli.main import main
from sparsemem.compare.recipes.arms import ARMS, METHODS, SETTINGS, method_settings
from started import sparsemem_with

pytestmark = pytest.mark.slow

SMALL = {
    "max_steps": 2, "batch_size": 2, "accumulation": 2, "warmup_steps": 1, "max_length": 128, "limit": 4,
    "stage1_max_steps": 2, "stage1_batch_size": 2, "stage1_accumulation": 1, "top_t": 8, "smf_background": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")

    def lines(name, records):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    choices = [
        {"question": f"Which is {n}?", "choices": ["one", "two", "three", "four"], "answer": n % 4}
        for n in range(12)
    ]
    lines("medmcqa_train1k.jsonl", choices[:5])
    lines("medmcqa_devsplit_train.jsonl", [{**choices[5], "exp": "Because."}, *choices[6:8]])
    lines("medmcqa_devsplit_test.jsonl", choices[8:])
    lines("triviaqa.jsonl", [{"question": f"Who is {n}?", "answers": [f"{n}", "x"]} for n in range(6)])
    talk = [{"role": "user", "content": "Say a word."}, {"role": "assistant", "content": "A word, then."}]
    lines("oasst_en_replies.jsonl", [{"messages": talk, "rank": 0}] * 22)
    (folder / "wikitext2_raw_test.txt").write_text(" = Title = \n\n Some words of prose .\n" * 20)
    return folder


def command(tiny, data, out, *more, **settings):
    chosen = [f"--set={name}={json.dumps(value)}" for name, value in {**SMALL, **settings}.items()]
    return [
        "compare",
        "paper",
        "--model",
        str(tiny),
        "--data-dir",
        str(data),
        "--out",
        str(out),
        *chosen,
        *more,
    ]


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def compared(tiny, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "paper"
    result = invoke(*command(tiny, data, out, "--seeds", "1"))
    assert result.exit_code == 0, result.output
    return out


def test_every_arm_has_its_row_its_log_and_its_difference_to_the_base(compared):
    results = json.loads((compared / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == list(METHODS)
    for row in results["rows"]:
        assert {"medmcqa", "wikitext", "triviaqa"} <= row.keys()
        folder = compared / "runs" / ("base" if row["method"] == "base" else f"{row['method']}-seed1")
        assert not (folder / "partial").exists()
        if row["method"] != "base":
            log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
            assert results["against_base"][row["method"]]["medmcqa"]["n"] == 4
    assert {path.name for path in (compared / "stage1").iterdir()} == {
        "dense-additive", "dense-replacement", "calibrate-additive",
    }  # fmt: skip
    for name in ("report.md", "report.html", "table.tex", "table.csv", "pareto.png"):
        assert (compared / name).stat().st_size > 0
    trained = {row["method"]: row["trained_params"] for row in results["rows"]}
    table = 3 * 128**2 * 32
    assert trained["additive-kl"] == trained["replacement-tfidf"] == trained["calibrated-kl"] == table
    assert trained["additive-scale-kl"] == table + 3


def test_stage_1_is_an_adapter_whose_rows_alone_train(compared, tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = PeftModel.from_pretrained(base, compared / "stage1" / "dense-additive", is_trainable=True)
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"values"}
    made = json.loads((compared / "stage1" / "dense-additive" / "metrics.json").read_text())
    assert made["steps"] == 2
    assert made["validation_loss"] > 0


def test_finished_runs_are_taken_up_and_other_settings_refused(compared, tiny, data):
    before = (compared / "runs" / "lora-seed1" / "result.json").stat().st_mtime_ns
    again = invoke(*command(tiny, data, compared, "--seeds", "1", "--methods", "base,lora"))
    assert again.exit_code == 0, again.output
    assert (compared / "runs" / "lora-seed1" / "result.json").stat().st_mtime_ns == before
    other = invoke(*command(tiny, data, compared, "--seeds", "1", "--methods", "base,lora", max_steps=3))
    assert other.exit_code == 2
    assert "max_steps 2 there, 3 now" in other.stderr


def test_another_data_file_is_another_config(compared, tiny, data, tmp_path):
    changed = shutil.copytree(data, tmp_path / "data")
    with (changed / "medmcqa_train1k.jsonl").open("a") as file:
        file.write((changed / "medmcqa_devsplit_test.jsonl").read_text())
    result = invoke(*command(tiny, changed, compared, "--seeds", "1", "--methods", "base,lora"))
    assert result.exit_code == 2
    assert "data.train" in result.stderr


def test_a_killed_run_goes_on_where_it_was(compared, tiny, data, tmp_path):
    """SIGKILL in stage 2: the arm's figures are those of the run that nobody killed."""
    for name in ("out", "whole"):
        shutil.copytree(compared / "stage1" / "dense-additive", tmp_path / name / "stage1" / "dense-additive")
        shutil.copytree(compared / "runs" / "base", tmp_path / name / "runs" / "base")
    options = ("--seeds", "1", "--methods", "base,additive-kl")
    arguments = command(tiny, data, tmp_path / "out", *options, max_steps=12)
    whole = command(tiny, data, tmp_path / "whole", *options, max_steps=12)
    with sparsemem_with(*arguments) as running:
        partial = tmp_path / "out" / "runs" / "additive-kl-seed1" / "partial"
        while not list(partial.glob("checkpoint-*/trainer_state.json")):
            assert running.poll() is None, running.stderr
            time.sleep(0.02)
    assert not (partial.parent / "result.json").exists()
    assert invoke(*arguments).exit_code == invoke(*whole).exit_code == 0
    rows = [
        json.loads((tmp_path / name / "runs" / "additive-kl-seed1" / "result.json").read_text())["row"]
        for name in ("out", "whole")
    ]
    for key in ("medmcqa", "wikitext", "triviaqa", "loss", "steps"):
        assert rows[0][key] == rows[1][key]


def test_quirks_are_part_of_an_arms_settings_and_nobody_elses():
    from dataclasses import replace

    quirky = replace(SETTINGS, quirks=True)
    data = dict.fromkeys(("medmcqa", "wikitext", "triviaqa", "train", "general"), "x")
    for method in METHODS:
        same = method_settings(SETTINGS, method, data) == method_settings(quirky, method, data)
        assert same == (method not in ARMS)


def test_quirks_change_what_an_arm_learns(compared, tiny, data, tmp_path):
    rows = []
    for quirks in (False, True):
        out = tmp_path / str(quirks)
        shutil.copytree(compared / "stage1" / "dense-additive", out / "stage1" / "dense-additive")
        shutil.copytree(compared / "runs" / "base", out / "runs" / "base")
        # at the paper's rate two steps of a tiny model are lost in bfloat16
        options = ("--seeds", "1", "--methods", "base,additive-kl", "--set=lr.sparse=0.5")
        result = invoke(*command(tiny, data, out, *options, quirks=quirks))
        assert result.exit_code == 0, result.output
        rows.append(json.loads((out / "runs" / "additive-kl-seed1" / "result.json").read_text())["row"])
    assert rows[0]["wikitext"] != rows[1]["wikitext"]


def test_a_missing_file_is_named(tiny, data, tmp_path):
    lacking = shutil.copytree(data, tmp_path / "data")
    (lacking / "triviaqa.jsonl").unlink()
    result = invoke(*command(tiny, lacking, tmp_path / "out"))
    assert result.exit_code == 2
    assert "has no file triviaqa*.jsonl; put TriviaQA's questions" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_the_papers_own_model_takes(tmp_path):
    result = invoke("compare", "paper", "--dry-run", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for method in METHODS[1:]:
        for seed in (1, 2, 3):
            assert f"{method}-seed{seed}: to do" in result.stdout
    assert "steps=11250" in result.stdout
    assert "stage1_steps=5938" in result.stdout
    assert not (tmp_path / "out").exists()
