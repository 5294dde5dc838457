"""The examples run, on a tiny model and for few steps."""

import runpy
import sys
from pathlib import Path

import pytest

from started import Started

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow


def run(name, tmp_path, *arguments):
    with Started(_script, EXAMPLES / name, *map(str, arguments), folder=tmp_path) as process:
        process.wait()
    assert process.returncode == 0, process.stderr
    return process.stdout


def _script(path, *arguments):
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def test_every_example_is_run_here():
    tested = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run("{path.name}"' in tested for path in EXAMPLES.glob("*.py"))


def test_teach_facts(tiny_words, tmp_path):
    said = run("teach_facts.py", tmp_path, tiny_words, "facts.safetensors", 3)
    assert f"{(tmp_path / 'facts.safetensors').stat().st_size:,} bytes in facts.safetensors" in said
    assert "taken back:" in said


def test_domain_task(tiny_words, tmp_path):
    said = run("domain_task.py", tmp_path, tiny_words, "departments", 3)
    assert "of 24 new messages" in said
    assert "drift on prose: " in said
    assert (tmp_path / "departments" / "adapter_config.json").is_file()


def test_stream_with_undo(tiny_words, tmp_path):
    said = run("stream_with_undo.py", tmp_path, tiny_words, "stream")
    assert said.count("taught in") == 3
    assert "taken back:" in said
    lines = (tmp_path / "stream" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    assert '"undo"' in lines[-1]
    assert (tmp_path / "stream" / "adapter_config.json").is_file()
