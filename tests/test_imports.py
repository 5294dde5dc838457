"""The package imported: any name first, peft before or after it or not at all; and the command line alone."""

import ast
import json
import os
import runpy
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import sparsemem
from sparsemem import SparseMemoryConfig
from started import ENVIRONMENT
from tiny import SMALL

# nearly all of them are about whole starts of Python
pytestmark = pytest.mark.slow


# Each program of a list in a process of its own, in which nothing of peft and sparsemem has been imported.
# What these wait for is there already: whole starts of Python for all of them would take minutes.
EACH = """
import json, os, sys, traceback
import accelerate, datasets, psutil, torch, transformers
from transformers import AutoModelForCausalLM, BloomPreTrainedModel, PreTrainedModel

assert not {"peft", "sparsemem"} & set(sys.modules)
assert psutil.Process().num_threads() == 1, "a fork of threads"
for name, program in json.load(sys.stdin).items():
    if not os.fork():
        try:
            exec(program, {"__name__": "__main__"})
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.wait()[1]:
        print(name)
"""
FIRST = """
from sparsemem import {name}
import sys, transformers
assert "peft" in sys.modules
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from sparsemem import SparseMemoryConfig
assert PEFT_TYPE_TO_CONFIG_MAPPING["SPARSE_MEMORY"] is SparseMemoryConfig
assert PEFT_TYPE_TO_TUNER_MAPPING["SPARSE_MEMORY"].__name__ == "SparseMemoryModel"
sizes = {{"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 4}}
llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))
peft.get_peft_model(llama, SparseMemoryConfig(num_keys=4, num_heads=2, top_k=2))
"""
LOADED = """
import sparsemem
from transformers import AutoModelForCausalLM
import peft
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})
assert type(model.base_model).__name__ == "SparseMemoryModel"
assert any("sparse_memory" in name and one.any() for name, one in model.named_parameters())
"""
COMMAND = """
import sys
from sparsemem_cli import main
sys.argv = ["sparsemem", "eval", {adapter!r}, "--task", "recall", "--data", {data!r}]
main()
"""


def run(program, stdin=None):
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False
    )


def test_each_import_can_be_the_first(tiny, tmp_path, tiny_llama):
    """A name of each module, peft before or after it; a load by PEFT; a command of the console script."""
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 if parameter.requires_grad else 0.0)
    model.save_pretrained(tmp_path / "adapter")
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    config = config.replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{tiny}"')
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    (tmp_path / "q.jsonl").write_text('{"question": "Who?", "answer": "she"}\n')
    paths = {"base": str(tiny), "adapter": str(tmp_path / "adapter"), "data": str(tmp_path / "q.jsonl")}
    names = [*{room: name for name, room in sparsemem._ROOM.items()}.values(), "__version__"]
    programs = {f"{name}, then peft": FIRST.format(name=name) for name in names}
    programs |= {f"peft, then {name}": "import peft" + FIRST.format(name=name) for name in names}
    programs |= {"a load": LOADED.format(**paths), "a command": COMMAND.format(**paths)}
    done = run(EACH, json.dumps(programs))
    assert done.returncode == 0, done.stderr
    assert "(base " in done.stdout
    assert [one for one in done.stdout.splitlines() if one in programs] == [], done.stderr


def test_the_lists_of_public_names_agree():
    """Names, rooms, and the imports that type checkers read."""
    tree = ast.parse(Path(sparsemem.__file__).read_text(encoding="utf-8"))
    (for_types,) = [
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    named = {alias.name: node.module for node in for_types.body for alias in node.names}
    assert named == sparsemem._ROOM
    assert sparsemem.__all__ == sorted(named)


def test_the_console_script_says_its_help_without_torch():
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"sparsemem": "sparsemem_cli:main"}
    program = (
        "import sys, time\n"
        "from sparsemem_cli import main\n"
        "sys.argv = ['sparsemem', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "print(time.process_time(), file=sys.stderr)\n"
    )
    done = [run(program) for _ in range(3)]
    assert [one.returncode for one in done] == [0, 0, 0], done[0].stderr
    for command in ("demo", "graft", "train", "eval", "compare", "report", "push", "patch", "chat"):
        assert f"\n  {command} " in done[0].stdout
    # of processor time: a busy machine must not fail it
    assert min(float(one.stderr) for one in done) < 0.3


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparsemem", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("sparsemem", run_name="__main__")
    assert capsys.readouterr().out.startswith("Usage: python -m sparsemem")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "benchmarks").rglob("*.py")), ids=lambda path: path.name
)
def test_benchmarks_import_names_that_exist(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparsemem":
            module = import_module(str(node.module))
            missing = [
                alias.name
                for alias in node.names
                if not hasattr(module, alias.name) and not find_spec(f"{node.module}.{alias.name}")
            ]
            assert not missing, f"{path.name}: {node.module} has no {missing}"
