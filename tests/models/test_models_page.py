"""docs/models.md against the file that it was made from, and what the file says."""

from pathlib import Path

from all_types import page, passes, read
from test_types import USED_MOST

DOCS = Path(__file__).parents[2] / "docs"
LINES = read(DOCS / "results" / "models.jsonl")


def test_the_page_is_that_of_its_file():
    assert (DOCS / "models.md").read_text(encoding="utf-8") == page(LINES)


def test_no_type_fails_and_those_used_most_work():
    assert [line["type"] for line in LINES if not passes(line)] == []
    works = {
        line["type"] for line in LINES if (line.get("finetune"), line.get("learn")) == ("works", "works")
    }
    assert set(USED_MOST) <= works
