"""--config: a file says what the flags say, and is refused where it says something else."""

import json

import click
import pytest
import yaml
from click.testing import CliRunner

from sparsemem.cli.config_file import template
from sparsemem.cli.main import main

COMMANDS = [
    name for name, command in main.commands.items() if any(p.name == "config" for p in command.params)
]


def parsed(name, *arguments):
    """What a command would be called with."""
    command = main.commands[name]
    return command.make_context(name, list(map(str, arguments))).params


@pytest.mark.parametrize("name", COMMANDS)
def test_the_printed_file_says_the_defaults(name, tmp_path):
    command = main.commands[name]
    text = CliRunner().invoke(main, ["config", name]).stdout
    assert text == template(name, command)
    required = {p.name: "1" for p in command.params if p.required and isinstance(p, click.Option)}
    given = [f"--{key.replace('_', '-')}={value}" for key, value in required.items()]
    given += ["x" for p in command.params if isinstance(p, click.Argument) and p.required]
    if name == "compare":
        given[-1] = "demo"
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert parsed(name, *given, "--config", file) == parsed(name, *given)
    # each line that is commented out is a key, too
    keys = [line.removeprefix("# ").partition(":")[0] for line in text.splitlines() if ": " in line]
    options = {max(p.opts, key=len).lstrip("-") for p in command.params} - {"config"}
    assert options <= set(keys)


def test_a_file_says_what_flags_say_and_flags_have_the_last_word(tmp_path):
    file = tmp_path / "config.yaml"
    wanted = {"model": "smollm2", "data": "facts.jsonl", "out": "taught", "batch_size": 4, "lr": 0.3}
    file.write_text(yaml.safe_dump({**wanted, "report-to": ["tensorboard", "wandb"], "json": True}))
    from_file = parsed("train", "--config", file)
    flags = ("smollm2", "--data", "facts.jsonl", "--out", "taught", "--batch-size", 4, "--lr", 0.3, "--json")
    assert from_file == parsed("train", *flags, "--report-to", "tensorboard,wandb")
    assert parsed("train", "--config", file, "--batch-size", 2)["batch_size"] == 2
    file.write_text("patch: [a=x, b=y]\nport: 0\n")
    assert parsed("serve", "m", "--config", file)["patches"] == ("a=x", "b=y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "unknown key 'batchsize'; allowed are model, data, out"),
        ("resume: 3", "resume=3 must be true or false"),
        ("lr: {a: 1}", "must be text, a number, or a list of them"),
        ("- a", "must have one `key: value` a line"),
        ("a: [", "is not YAML"),
        ("batch-size: many", "'many' is not a valid integer"),
        (None, "cannot be read"),
    ],
)
def test_bad_files_are_one_sentence(text, message, tmp_path):
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    result = CliRunner().invoke(main, ["train", "m", "--data", "d", "--out", "o", "--config", str(file)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_commands_without_a_file():
    result = CliRunner().invoke(main, ["config", "patch"])
    assert result.exit_code == 2
    assert "there is no configuration file for 'patch'; choose from" in result.stderr


def test_env_says_versions_and_no_paths(monkeypatch):
    monkeypatch.setenv("SPARSEMEM_CACHE", "/home/somebody/cache")
    found = json.loads(CliRunner().invoke(main, ["env", "--json"]).stdout)
    assert found["torch"].startswith("2.")
    assert found["bitsandbytes"] == "not installed"
    assert found["precision by default"] in ("bfloat16", "float32")
    assert "SPARSEMEM_CACHE" in found["variables set"]
    assert "somebody" not in json.dumps(found)
    lines = CliRunner().invoke(main, ["env"]).stdout.splitlines()
    assert f"peft: {found['peft']}" in lines


def test_the_file_of_learn_is_that_of_its_first_word(tmp_path):
    text = CliRunner().invoke(main, ["config", "learn"]).stdout
    assert "# stream: " in text
    # the options that became words are not printed, but an older file may have them
    assert "undo" not in text
    (tmp_path / "config.yaml").write_text(f"out: {tmp_path}\nstatus: true\n")
    result = CliRunner().invoke(main, ["learn", "--config", str(tmp_path / "config.yaml")])
    assert "ledger.jsonl: cannot be read" in result.stderr


@pytest.mark.parametrize(
    ("text", "value"), [("2GiB", 2**31), ("512MB", 512_000_000), ("1048576", 2**20), ("0", 0), ("1.5k", 1500)]
)
def test_sizes_have_units(text, value):
    assert parsed("train", "m", "--data", "d", "--out", "o", "--cache-bytes", text)["cache_bytes"] == value


def test_a_size_that_is_none_is_refused():
    result = CliRunner().invoke(main, ["train", "m", "--data", "d", "--out", "o", "--cache-bytes", "much"])
    assert (result.exit_code, "write for example 2GiB" in result.stderr) == (2, True)
