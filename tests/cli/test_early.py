"""Wrong names and files are refused before torch is imported."""

import json
import os
import subprocess
import sys
import time

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
START = "import sys; sys.argv[0] = 'sparsemem'; from sparsemem_cli import main; main()"
# each command in the same process, of which none may import torch
ALL = """
import json, sys
import sparsemem_cli
from click.testing import CliRunner
from sparsemem.cli.main import main

found, slow = [], {"torch", "transformers", "datasets"}
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(main, command)
    found.append((done.exit_code, done.stderr, sorted(slow & set(sys.modules))))
print(json.dumps(found))
"""


def test_nothing_slow_is_imported_for_what_is_wrong(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"completion": "x"}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "model").mkdir()
    bad, good, full, model = (str(tmp_path / name) for name in ("bad.jsonl", "good.jsonl", "full", "model"))
    line = "bad.jsonl, line 1: record with completion; allowed are"
    cases = [
        (["train", model, "--data", bad, "--out", "x"], line),
        (["train", model, "--data", good, "--out", "x", "--keep", bad], line),
        (["train", model, "--data", good, "--out", "x", "--background", bad], line),
        (["train", model, "--data", good, "--out", full], "exists and is not empty"),
        (["train", "./absent", "--data", good, "--out", "x"], "'./absent' is not a folder"),
        (["train", "absent.gguf", "--data", good, "--out", "x"], "'absent.gguf' is not a file"),
        (["train", model, "--data", "absent.parquet", "--out", "x"], "'absent.parquet' cannot be read"),
        (["learn", model, "--stream", bad, "--out", "x"], line),
        (["graft", model, "--background", bad, "--out", "x"], line),
        (["eval", model, "--task", "recall", "--data", bad], "bad.jsonl, line 1: not an item of this task"),
        (["eval", "./absent", "--task", "recall", "--data", good], "is not a folder"),
        (["chat", "./absent"], "is not a folder"),
        (["serve", "./absent"], "is not a folder"),
        (["serve", model, "--patch", "a=absent"], "--patch a=absent: there is no such file"),
        (["ui", "./absent"], "is not a folder"),
    ]
    commands = json.dumps([command for command, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", ALL, commands], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    for (command, message), (code, said, imported) in zip(cases, json.loads(done.stdout), strict=True):
        assert (code, imported) == (2, []), (command, said)
        assert message in said
        assert said.count("\n") == 1


def test_a_wrong_file_is_refused_about_as_fast_as_help_is_shown(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")

    def seconds(*arguments):
        began = time.perf_counter()
        command = [sys.executable, "-c", START, *map(str, arguments)]
        subprocess.run(command, capture_output=True, env=ENVIRONMENT, check=False)
        return time.perf_counter() - began

    usual = seconds("--help")
    assert seconds("train", "smollm2", "--data", tmp_path / "bad.jsonl", "--out", "x") < 5 * usual + 5
