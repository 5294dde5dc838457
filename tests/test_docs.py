"""README and docs against the code: imports, code blocks, commands, links, the map of folders."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
import transformers

import sparsemem
from sparsemem.choices import RECIPES
from sparsemem.cli.main import main
from sparsemem.compare.recipes.overrides import changed
from test_house import FOLDERS, FREE, PACKAGE, ROOT
from tiny import batch

PROJECT = Path(__file__).parents[1]
GUIDE, ARCHITECTURE = "docs/guide.md", "docs/architecture.md"
EVALUATE, COMPARE, SETTINGS = "docs/evaluate.md", "docs/compare.md", "docs/settings.md"
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((PROJECT / "docs").glob("*.md"))),
)


def text_of(page):
    return (PROJECT / page).read_text(encoding="utf-8")


def blocks(page, language="python"):
    """The fenced blocks of a page in this language; "": those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


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
    exec(block(EVALUATE, "evaluate("), scope)
    assert scope["found"].n == len(scope["found"].correct) == 1


def test_the_settings_train_in_a_trainer_of_your_own(tmp_path, tiny_llama):
    batches = [batch(seed) for seed in range(3)]
    options = {"max_steps": 2, "max_grad_norm": 0.0, "report_to": [], "dataloader_pin_memory": False}
    scope = {
        "base": tiny_llama(),
        "general_batches": batches[:2],
        "training_batches": batches[2:],
        "args": transformers.TrainingArguments(str(tmp_path), **options),
        "data": [{key: row[i] for key, row in batches[2].items()} for i in range(6)],
    }
    exec(block(SETTINGS, "Trainer("), scope)
    layers = sparsemem.memory_layers(scope["model"])
    assert all(memory.values.any() for memory in layers.values())
    assert scope["optimizer"].selected


def commands(page):
    """The command lines of a page, without comments; a backslash continues a line."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("sparsemem ")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_docs_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what `sparsemem config train > train.yaml` on the same page would write
    Path("train.yaml").write_text("model: smollm2\ndata: facts.jsonl\nout: taught\n")
    for arguments in commands(page):
        group, rest = main, arguments
        while isinstance(group, click.Group):
            _, group, rest = group.resolve_command(click.Context(group), rest)
        group.make_context(group.name, list(rest))


def test_the_guide_has_commands():
    assert {arguments[0] for arguments in commands(GUIDE)} >= {"train", "eval", "compare", "patch", "push"}


@pytest.mark.parametrize(
    "assignments", re.findall(r"`(--set [a-z][\w.=]+(?: --set [\w.=]+)*)`", text_of(COMPARE))
)
def test_the_settings_that_the_page_changes_exist(assignments):
    chosen = assignments.removeprefix("--set ").split(" --set ")
    found = []
    for name in RECIPES:
        try:
            changed(import_module(f"sparsemem.compare.recipes.{name}").SETTINGS, chosen)
        except ValueError:
            continue
        found.append(name)
    assert found


def test_the_map_is_the_tree():
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    on_the_map = re.findall(r"^\| `(\w+)/` \|", text_of(ARCHITECTURE), flags=re.MULTILINE)
    assert sorted(on_the_map) == sorted(there)


def test_the_map_is_in_the_order_of_imports():
    on_the_map = re.findall(r"^\| `(\w+)/` \|", text_of(ARCHITECTURE), flags=re.MULTILINE)
    ordered = [folder for folder in FOLDERS if folder in on_the_map]
    assert on_the_map[: len(ordered)] == ordered
    assert set(on_the_map[len(ordered) :]) <= set(FREE)


def test_the_architecture_page_names_files_that_are_there():
    named = re.findall(r"`([\w/]+\.py)`", text_of(ARCHITECTURE))
    missing = [one for one in named if not (PACKAGE / one).is_file() and not (PROJECT / one).is_file()]
    assert named
    assert not missing
    assert {one for one in ROOT if (PACKAGE / f"{one}.py").is_file()} <= {Path(one).stem for one in named}


def test_the_reference_names_where_each_public_name_is():
    named = re.findall(r"^::: (\S+)$", text_of("docs/api.md"), flags=re.MULTILINE)
    assert sorted(named) == sorted(f"sparsemem.{room}.{name}" for name, room in sparsemem._ROOM.items())


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert [name for name in sparsemem.__all__ if f">{name}<" not in api and f".{name}" not in api] == []
    pages = tmp_path.rglob("*.html")
    loaded = {
        one
        for page in pages
        for one in re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css))', page.read_text())
    }
    assert loaded == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page))
    missing = [one for one in links if not ((PROJECT / page).parent / one).exists()]
    assert not missing
