import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _example():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return code


def test_the_example_is_short_and_compiles():
    code = _example()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    compile(code, "README.md", "exec")


@pytest.mark.slow
def test_the_example_teaches_keeps_and_takes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(_example(), "README.md", "exec"), scope)
    assert "Tarsipol" in scope["taught"][0]
    assert "Stockholm" in scope["taught"][1]
    stream = scope["stream"]
    untaught = scope["recall"](stream.model, stream.tokenizer, scope["items"]).texts
    assert "Tarsipol" not in untaught[0]
    assert (tmp_path / "mind" / "adapter_model.safetensors").is_file()
