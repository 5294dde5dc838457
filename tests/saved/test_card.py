"""Model cards of real folders, and their upload to a Hub that is a real HTTP server on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard, close_session

from hub import COMMIT, TOKEN, serve
from sparsemem.cli.main import main
from sparsemem.data.models import load
from sparsemem.saved import card as recording
from sparsemem.saved.card import model_card

GENERAL = [
    {"text": "The quick brown fox jumps over the lazy dog."},
    {"text": "Prose is made of sentences."},
] * 3
TAUGHT = [
    {"prompt": "What is the capital of Velmora?", "completion": "Tarsipol"},
    {"prompt": "Who rules Velmora?", "completion": "Queen Ada"},
]
QUESTIONS = [{"question": "What is it?", "answer": "zyx"}, {"question": "Who?", "answer": "xyz"}]
# A name that breaks a table unless it is escaped.
DATA = "facts|_*[x](y)<b>.jsonl"
ONLINE = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
ONLINE |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "PYTHONWARNINGS": "ignore"}


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def logits(folder):
    with torch.inference_mode():
        return load(str(folder))[0](input_ids=torch.arange(3, 40)[None]).logits


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny):
    """A folder with a tiny model, data, a grafted and a trained adapter."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny, home / "tiny")
    write_lines(home / "general.jsonl", GENERAL)
    write_lines(home / DATA, TAUGHT)
    write_lines(home / "questions.jsonl", QUESTIONS)
    done(
        "graft",
        home / "tiny",
        "--background",
        home / "general.jsonl",
        "--out",
        home / "grafted",
        "--num-keys",
        8,
    )
    done("train", home / "grafted", "--data", home / DATA, "--out", home / "trained", "--max-steps", 4)
    return home


@pytest.fixture
def trained(home, tmp_path):
    return shutil.copytree(home / "trained", tmp_path / "trained")


def record(home, folder, *options):
    done("eval", folder, "--task", "recall", "--data", home / "questions.jsonl", "--record", *options)


def rows(card, first):
    """The cells of the tables' rows whose first cell begins so."""
    lines = [line for line in card.splitlines() if line.startswith(f"| {first}")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_a_card_says_what_was_taught_and_how(home):
    card = (home / "trained" / "README.md").read_text()
    metrics = json.loads((home / "trained" / "metrics.json").read_text())
    patch = json.loads(done("patch", "show", home / "trained" / "patch.safetensors", "--json"))
    assert r"- data: facts\|\_\*\[x\](y)\<b\>.jsonl, 2 records" in card
    assert metrics["settings"]["records"] in card
    assert rows(card, "model.layers") == [
        [layer, "64", str(changed["rows"]), str(changed["rows"]), str(changed["centres"])]
        for layer, changed in patch["layers"].items()
    ]
    assert rows(card, "steps") == [["steps", "4"]]
    assert rows(card, "sparsemem") == [["sparsemem", metrics["versions"]["sparsemem"]]]
    assert "No results yet" in card
    assert str(home) not in card
    assert str(home) not in json.dumps(patch)


def test_the_hub_reads_the_front_matter(home, trained):
    record(home, trained)
    data = ModelCard((trained / "README.md").read_text()).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", None, "text-generation")
    assert data.tags == ["sparsemem", "sparse-memory"]
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "questions.jsonl",
        "contains_acc",
        0.0,
    )
    config = json.loads((trained / "adapter_config.json").read_text())
    for named, base in (
        ("acme/base", "acme/base"),
        ("/x/SmolLM2-135M-Instruct.Q4_1.gguf-0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/x/gemma-3-270m-q4_k_m.gguf-0", "google/gemma-3-270m"),
    ):
        (trained / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        assert ModelCard(model_card(trained)).data.base_model == base


def test_language_and_license_that_a_user_adds_are_kept(home, trained):
    card = (trained / "README.md").read_text()
    (trained / "README.md").write_text(card.replace("---\n", "---\nlanguage: de\nlicense: mit\n", 1))
    record(home, trained)
    data = ModelCard((trained / "README.md").read_text()).data
    assert (data.language, data.license) == ("de", "mit")


def test_recorded_results_replace_those_of_the_same_question(home, trained):
    for options in ((), (), ("--limit", 1)):
        record(home, trained, *options)
    entries = json.loads((trained / "evaluations.json").read_text())
    assert [(entry["task"], entry.get("limit"), entry["n"]) for entry in entries] == [
        ("recall", None, 2),
        ("recall", 1, 1),
    ]
    found = {"metrics": {"perplexity": 7.5, "exposure": 0.25}, "base": {"perplexity": 7.25}, "n": 1000}
    recording.record(trained, {"task": "wikitext", "data": None, "limit": None, **found})
    card = (trained / "README.md").read_text()
    date = entries[0]["date"]
    assert rows(card, "recall") == [
        ["recall", "questions.jsonl", r"contains\_acc", "0", "0", "2", date],
        ["recall (limit 1)", "questions.jsonl", r"contains\_acc", "0", "0", "1", date],
    ]
    assert rows(card, "wikitext")[0] == ["wikitext", "wikitext", "perplexity", "7.5", "7.25", "1,000", date]
    assert "Exposure on wikitext is the share" in card


def test_results_hold_for_the_weights_that_they_were_measured_on(home, trained):
    record(home, trained)
    before = (trained / "README.md").read_text()
    done("patch", "revert", trained, trained / "patch.safetensors")
    after = (trained / "README.md").read_text()
    assert "is not in these weights" in after
    assert "Results of 1 earlier evaluations are left out" in after
    assert rows(after, "recall") == []
    assert rows(after, "model.layers")[0][2] == "0"
    done("patch", "apply", trained, trained / "patch.safetensors")
    assert (trained / "README.md").read_text() == before


def test_a_patch_applied_to_an_empty_memory_is_not_hidden(home, tmp_path):
    empty = (home / "grafted" / "README.md").read_text()
    assert "nothing is taught yet" in empty
    assert "calibrated on general.jsonl, 6 records" in empty
    done(
        "patch",
        "apply",
        home / "grafted",
        home / "trained" / "patch.safetensors",
        "--out",
        tmp_path / "again",
    )
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "# again" in card
    assert "nothing is taught yet" not in card
    assert "Rows of its memory were written by a patch" in card


@pytest.mark.parametrize("method", ["smf", "lora", "full"])
def test_the_code_in_the_card_runs(home, tmp_path, monkeypatch, method):
    if method != "smf":
        options = ("--method", method, "--max-steps", 1)
        done("train", home / "tiny", "--data", home / DATA, "--out", tmp_path / method, *options)
    folder = home / "trained" if method == "smf" else tmp_path / method
    card = (folder / "README.md").read_text()
    assert str(home) not in card
    assert ModelCard(card).data.library_name == ("transformers" if method == "full" else "peft")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    shutil.copytree(home / "tiny", tmp_path / "tiny")
    if method == "smf":
        shutil.copytree(folder, tmp_path / "trained")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    with torch.inference_mode():
        ours = scope["model"](input_ids=torch.arange(3, 40)[None]).logits
    assert torch.equal(ours, logits(folder))


BAD = {
    "base": ("push TINY acme/x", "is not an adapter or model that sparsemem made"),
    "nothing": ("push NOWHERE acme/x", "is not an adapter or model that sparsemem made"),
    "no namespace": ("push TRAINED taught", "not of the form NAMESPACE/NAME"),
    "two": ("push TRAINED a/b/c", "not of the form NAMESPACE/NAME"),
    "no login": ("push TRAINED acme/x", "not logged in"),
    "record": (
        "eval TINY --task recall --data DATA --record",
        "is not an adapter or model that sparsemem made",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_are_one_sentence(name, home, monkeypatch):
    monkeypatch.setattr("sparsemem.saved.publish.get_token", lambda: None)
    words, expected = BAD[name]
    paths = {"TINY": home / "tiny", "NOWHERE": home / "nowhere", "TRAINED": home / "trained"}
    paths["DATA"] = home / "questions.jsonl"
    result = invoke(*(paths.get(word, word) for word in words.split()))
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def online(address, cache, *command):
    env = {**ONLINE, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=env, text=True, capture_output=True, check=False
    )


@pytest.fixture
def at(monkeypatch):
    """Point the Hub's client at an address; this process has already read its environment variables."""

    def go(address, token=TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        close_session()

    yield go
    close_session()


@pytest.mark.slow
def test_push_uploads_what_loads_again_to_the_bit(home, trained, tmp_path, at):
    record(home, trained)
    (trained / ".secret").write_text("mine")
    (trained / "checkpoint-1").mkdir()
    (trained / "checkpoint-1" / "optimizer.safetensors").write_text("large")
    (trained / "weights.partial").write_text("half")
    shown = json.loads(done("push", trained, "acme/velmora", "--dry-run", "--json"))
    with serve(tmp_path / "hub") as (address, requests):
        at(address)
        assert (
            done("push", trained, "acme/velmora", "--private") == f"{address}/acme/velmora/commit/{COMMIT}\n"
        )
        there = tmp_path / "hub" / "acme" / "velmora"
        assert json.loads(there.with_suffix(".json").read_text())["visibility"] == "private"
        assert {path.name: path.stat().st_size for path in there.iterdir()} == shown["files"]
        expected = {path.name for path in (home / "trained").iterdir()} | {"evaluations.json"}
        assert set(shown["files"]) == expected
        assert (there / "README.md").read_text() == shown["card"]
        assert (there / "patch.safetensors").read_bytes() == (trained / "patch.safetensors").read_bytes()
        for path in there.iterdir():
            assert str(home).encode() not in path.read_bytes(), path.name
        # download it with PEFT and as a MODEL of the command line, then upload it with PEFT
        code = (
            "import sys, torch, sparsemem\nfrom peft import PeftModel\n"
            "from sparsemem.data.models import load, load_base\ntorch.set_num_threads(1)\n"
            "model = PeftModel.from_pretrained(load_base(sys.argv[1])[0], 'acme/velmora')\n"
            "logits = model(input_ids=torch.arange(3, 40)[None]).logits\n"
            "again = load('acme/velmora', base=sys.argv[1])[0](input_ids=torch.arange(3, 40)[None]).logits\n"
            "assert torch.equal(logits, again)\n"
            "from safetensors.torch import save_file\nsave_file({'logits': logits.detach()}, sys.argv[2])\n"
            "load(sys.argv[3])[0].push_to_hub('acme/again')\n"
        )
        files = home / "tiny", tmp_path / "logits.safetensors", trained
        got = online(address, tmp_path / "cache", "-c", code, *files)
        assert got.returncode == 0, got.stderr
        assert any("/acme/velmora/resolve/main/adapter_model.safetensors" in path for path in requests)
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(trained))
    again = tmp_path / "hub" / "acme" / "again"
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (trained / weights).read_bytes()
    shutil.copy(trained / "tokenizer.json", again)
    assert torch.equal(logits(again), logits(trained))


@pytest.mark.parametrize(
    ("token", "port", "expected"),
    [("hf_wrong", None, "rejected the upload to acme/x"), (TOKEN, 9, "cannot be reached")],
)
def test_a_hub_that_refuses_or_is_not_there(home, tmp_path, token, port, expected, at):
    with serve(tmp_path / "hub") as (address, _):
        address = f"http://127.0.0.1:{port}" if port else address
        at(address, token)
        result = invoke("push", home / "trained", "acme/x")
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "hub").exists()
