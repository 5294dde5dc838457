"""The package imported: any name first, peft before or after it or not at all; and the command line alone."""

import ast
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
from tiny import SMALL

# nearly all of them are about whole starts of Python
pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# Each name in a process of its own, in which nothing of peft and sparsemem has been imported (but "before").
# What these wait for is there already: whole starts of Python for all of them would take minutes.
EACH_NAME = """
import os, sys, traceback
import accelerate, datasets, torch, transformers
from transformers import AutoModelForCausalLM, BloomPreTrainedModel, PreTrainedModel

order, names = sys.argv[1], sys.argv[2:]
if order == "before":
    import peft

def first(name):
    assert ("peft" in sys.modules, "sparsemem" in sys.modules) == (order == "before", False)
    exec(f"from sparsemem import {name}")
    assert "peft" in sys.modules
    exec("import peft")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from sparsemem import SparseMemoryConfig
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SPARSE_MEMORY"] is SparseMemoryConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["SPARSE_MEMORY"].__name__ == "SparseMemoryModel"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 4}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))
    sys.modules["peft"].get_peft_model(llama, SparseMemoryConfig(num_keys=4, num_heads=2, top_k=2))

failed = []
for name in names:
    child = os.fork()
    if not child:
        try:
            first(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
sys.exit(f"failed: {failed}" if failed else 0)
"""


def run(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


@pytest.mark.parametrize("order", ["before", "after"])
def test_every_name_can_be_the_first_import(order):
    done = run(EACH_NAME, order, *sparsemem.__all__, "__version__")
    assert done.returncode == 0, done.stderr


def test_the_lists_of_public_names_agree():
    """Names, rooms, and the imports that type checkers read."""
    tree = ast.parse(Path(sparsemem.__file__).read_text(encoding="utf-8"))
    (for_types,) = [
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    named = {alias.name: node.module for node in for_types.body for alias in node.names}
    assert named == sparsemem._ROOM
    assert sparsemem.__all__ == sorted(named)


def test_an_adapter_is_loaded_by_peft_imported_after_the_package(tiny, tmp_path, tiny_llama):
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 if parameter.requires_grad else 0.0)
    model.save_pretrained(tmp_path)
    done = run(
        "import sys, sparsemem\n"
        "from transformers import AutoModelForCausalLM\n"
        "import peft\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "model = peft.PeftModel.from_pretrained(base, sys.argv[2])\n"
        "print(type(model.base_model).__name__, sum(p.sum().item() != 0 for p in model.parameters()))\n",
        tiny,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SparseMemoryModel ")


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


def test_commands_of_the_console_script_register_the_method(tiny, tmp_path, tiny_llama):
    get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL)).save_pretrained(tmp_path / "adapter")
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    config = config.replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{tiny}"')
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    (tmp_path / "q.jsonl").write_text('{"question": "Who?", "answer": "she"}\n')
    program = "import sys; from sparsemem_cli import main; main()"
    done = run(program, "eval", tmp_path / "adapter", "--task", "recall", "--data", tmp_path / "q.jsonl")
    assert done.returncode == 0, done.stderr
    assert "(base " in done.stdout


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
