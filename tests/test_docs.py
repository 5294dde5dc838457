"""README and docs against the code: imports, code blocks."""

import re
from pathlib import Path

import pytest
import transformers

import sparsemem
from tiny import batch

PROJECT = Path(__file__).parents[1]
GUIDE = "docs/guide.md"
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((PROJECT / "docs").glob("*.md"))))


def text_of(page):
    return (PROJECT / page).read_text(encoding="utf-8")


def blocks(page):
    """The Python code of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", text_of(page), flags=re.DOTALL)


def block(page, word):
    """The one block that holds a word."""
    (found,) = [code for code in blocks(page) if word in code]
    return compile(found, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_the_docs_import_public_names_alone(page):
    lines = re.findall(r"^(?:from|import) sparsemem.*$", "\n".join(blocks(page)), flags=re.MULTILINE)
    names = [re.fullmatch(r"from sparsemem import (.+)", line) for line in lines]
    assert all(names), lines
    used = {name for found in names for name in found[1].split(", ")}
    assert used <= set(sparsemem.__all__)


@pytest.mark.slow
def test_the_guide_finetunes_and_measures(tmp_path, monkeypatch, tiny, tokenizer):
    monkeypatch.chdir(tmp_path)
    facts = '{"prompt": "Who?", "completion": "she"}\n{"prompt": "What?", "completion": "it"}\n'
    (tmp_path / "facts.jsonl").write_text(facts)
    (tmp_path / "general.jsonl").write_text('{"prompt": "Where?", "completion": "here"}\n' * 4)
    (tmp_path / "questions.jsonl").write_text('{"question": "Who?", "answer": "she"}\n')
    scope = {"tokenizer": tokenizer, "model": sparsemem.load_base(str(tiny))[0]}
    exec(block(GUIDE, "done = finetune"), scope)
    assert scope["done"].steps >= 200
    assert set(scope["done"].patch.layers) == set(sparsemem.memory_layers(scope["done"].model))

    scope["done"].model.save_pretrained("taught")
    tokenizer.save_pretrained("taught")
    exec(block(GUIDE, "evaluate("), scope)
    assert scope["found"].n == len(scope["found"].correct) == 1


def test_the_guide_trains_in_a_trainer_of_your_own(tmp_path, tiny_llama):
    batches = [batch(seed) for seed in range(3)]
    options = {"max_steps": 2, "max_grad_norm": 0.0, "report_to": [], "dataloader_pin_memory": False}
    scope = {
        "base": tiny_llama(),
        "general_batches": batches[:2],
        "training_batches": batches[2:],
        "args": transformers.TrainingArguments(str(tmp_path), **options),
        "data": [{key: row[i] for key, row in batches[2].items()} for i in range(6)],
    }
    exec(block(GUIDE, "Trainer("), scope)
    layers = sparsemem.memory_layers(scope["model"])
    assert all(memory.values.any() for memory in layers.values())
    assert scope["optimizer"].selected
