"""The tables of README and docs/results against the run folders that they come from."""

import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
EVIDENCE = runpy.run_path(str(PROJECT / "benchmarks" / "evidence.py"))
PAGES = EVIDENCE["PAGES"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_its_folders(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert EVIDENCE["with_tables"](text) == text


def test_a_table_that_differs_is_found():
    text = PAGES[0].read_text(encoding="utf-8")
    changed = text.replace("97.5 %", "99.5 %")
    assert changed != text
    assert EVIDENCE["with_tables"](changed) == text


def test_the_list_names_what_is_missing_and_what_is_left(tmp_path):
    runs = EVIDENCE["Runs"]("no-such-folder", "demo", "base,smf", "0,1", 2)
    assert runs.missing() == ["base", "smf-seed0", "smf-seed1"]
    shown = EVIDENCE["listed"]()
    assert "compare demo --methods base,learn,smf,lora,full --seeds 1,2" in shown
    assert shown.count("sparsemem compare") == len(EVIDENCE["RUNS"])


@pytest.mark.parametrize("runs", EVIDENCE["RUNS"], ids=lambda runs: f"{runs.folder} {runs.seeds}")
def test_every_listed_method_is_known(runs):
    from importlib import import_module

    room = import_module(f"sparsemem.compare.recipes.{runs.recipe}")
    assert set(runs.methods.split(",")) <= {"base", *room.METHODS}
