import json
import re
from pathlib import Path

import pytest

from sparsemem.compare.tables import text_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _example():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return code


def test_the_example_is_short_and_compiles():
    code = _example()
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    compile(code, "README.md", "exec")


@pytest.mark.slow
def test_the_example_teaches_keeps_and_takes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(_example(), "README.md", "exec"), scope)
    assert "Tarsipol" in scope["taught"][0]
    assert "Stockholm" in scope["taught"][1]
    untaught = scope["recall"](scope["done"].model, scope["tokenizer"], scope["items"]).texts
    assert "Tarsipol" not in untaught[0]
    assert (tmp_path / "taught" / "patch.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "folder", "method"),
    [
        ("**smf (sparse memory)**", "demo", "smf"),
        ("lora", "demo-one-layer", "lora"),
        ("full finetuning", "demo-one-layer", "full"),
        ("lora with KL to the base (one seed)", "demo", "lora-kl"),
    ],
)
def test_the_results_table_is_the_results_files(name, folder, method):
    results = json.loads((ROOT / "docs/results" / folder / "results.json").read_text(encoding="utf-8"))
    headings, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text_table(results).splitlines()
    ]
    row = next(dict(zip(headings, row, strict=True)) for row in rows if row[0] == method)
    shown = ("recall", "recall, reworded", "knowledge kept", "perplexity", "drift")
    assert " | ".join(["| " + name, *(row[heading] for heading in shown)]) + " |" in README
