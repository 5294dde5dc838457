import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from sparsemem.compare.report import rebuild_report, text_examples, write_report
from sparsemem.compare.results import LEARNT, LOST
from sparsemem.compare.tables import text_table

# figures are drawn
pytestmark = pytest.mark.slow

RESULTS = {
    "recipe": "demo",
    "model": "tiny",
    "about": "Teaches <b>nothing</b>.",
    "seed": 0,
    "seeds": [0, 1],
    "rows": [
        {
            "method": "base", "recall_train": 0.0, "recall_heldout": 0.0, "knowledge": 1.0,
            "perplexity": 48.0, "drift": 0.0,
        },
        {
            "method": "smf", "recall_train": 0.98, "recall_heldout": 0.8, "knowledge": 0.99,
            "perplexity": 48.1, "drift": 0.0002, "spread": {"recall_train": 0.01, "drift": 0.00001},
            "seconds": 61.4, "steps": 70, "trained_params": 1769472, "peak_bytes": 2**31,
        },
        {
            "method": "lora", "recall_train": 1.0, "recall_heldout": 0.9, "knowledge": 0.3,
            "perplexity": None, "drift": 0.2,
        },
    ],
    "examples": [
        {
            "question": "What is <Zor>'s capital?", "expected": ["Blim", "Blimm"],
            "answers": {"base": "I do not know", "smf": "<script>alert('Blim')</script>"},
            "right": {"base": False, "smf": True},
        }
    ],
    "settings": {"smf-seed0": {"lr": 0.6, "note": "</pre>"}},
    "versions": {"python": "3.11", "torch": "2.13.0"},
    "machine": "a machine",
    "commit": "abc",
    "against_base": {
        "smf": {"<i>": {"difference": 0.25, "low": 0.1, "high": 0.4, "n": 80}},
    },
}  # fmt: skip
DEMO = Path(__file__).parents[2] / "docs/results/demo"
VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Checks that tags nest, and keeps texts and every address that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(page):
    reader = Reader()
    reader.feed(page.read_text())
    assert reader.open == []
    return reader


def test_writes_table_figure_and_page(tmp_path):
    page = write_report(RESULTS, tmp_path)
    assert page == tmp_path / "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "pareto.png", "report.html", "report.md", "table.csv", "table.tex",
    ]  # fmt: skip
    with Image.open(io.BytesIO((tmp_path / "pareto.png").read_bytes())) as image:
        assert image.width > 2 * image.height
    assert text_table(RESULTS) in (tmp_path / "report.md").read_text()


def test_page_needs_nothing_beside_it(tmp_path):
    page = write_report(RESULTS, tmp_path)
    reader = read(page)
    assert len(reader.sources) == 1
    assert reader.sources[0].startswith("data:image/png;base64,")
    assert not re.search(r"https?://|url\(|@import", page.read_text())


def test_page_escapes_what_data_and_models_say(tmp_path):
    page = write_report(RESULTS, tmp_path)
    text = page.read_text()
    assert "<script" not in text
    assert "<Zor>" not in text
    assert "<b>" not in text
    texts = read(page).texts
    assert "<script>alert('Blim')</script>" in texts
    assert "What is <Zor>'s capital?" in texts
    assert "Blim / Blimm" in texts
    assert "Teaches <b>nothing</b>." in texts


def test_differences_to_the_base_are_a_table_of_their_own(tmp_path):
    page = write_report(RESULTS, tmp_path)
    heading = "Difference from the base model on the same questions"
    texts = read(page).texts
    assert heading in texts
    assert "<i> (n = 80)" in texts
    assert "+25.0 [+10.0, +40.0]" in texts
    assert f"## {heading}" in (tmp_path / "report.md").read_text()
    write_report({**RESULTS, "against_base": {}}, tmp_path)
    assert heading not in page.read_text()
    assert heading not in (tmp_path / "report.md").read_text()


def test_page_names_settings_versions_and_machine(tmp_path):
    text = " ".join(read(write_report(RESULTS, tmp_path)).texts)
    for wanted in ("torch 2.13.0", "a machine", "abc", '"lr": 0.6', "0, 1 (mean ± standard deviation)"):
        assert wanted in text


def test_examples_for_the_terminal():
    assert text_examples(RESULTS, 3).splitlines() == [
        "What is <Zor>'s capital?  (expected: Blim / Blimm)",
        "  base  I do not know",
        "  smf   <script>alert('Blim')</script>",
    ]


@pytest.mark.parametrize(
    "kept", [("method",), ("method", "recall_train"), ("method", "recall_train", "drift")]
)
def test_reports_whatever_figures_there_are(tmp_path, kept):
    rows = [{key: row[key] for key in kept} for row in RESULTS["rows"]]
    write_report({"rows": rows}, tmp_path)
    read(tmp_path / "report.html")


@pytest.mark.parametrize("results", [[], {}, {"rows": []}, {"rows": [{"drift": 1.0}]}, {"rows": 3}])
def test_results_without_rows_are_refused(tmp_path, results):
    with pytest.raises(ValueError, match="no rows"):
        write_report(results, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rebuilds_from_results_json(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    results, page = rebuild_report(tmp_path)
    assert results == RESULTS
    assert page.exists()


def test_rebuilds_from_run_folders(tmp_path):
    for method in ("base", "smf"):
        folder = tmp_path / "runs" / method
        folder.mkdir(parents=True)
        row = {"recall_train": 1.0, "drift": 0.0}
        run = {
            "recipe": "toy",
            "model": "tiny",
            "about": "",
            "method": method,
            "seed": None,
            "settings": {},
            "row": row,
        }
        (folder / "result.json").write_text(
            json.dumps({**run, "versions": {}, "machine": "m", "commit": None})
        )
    results, _ = rebuild_report(tmp_path)
    assert [row["method"] for row in results["rows"]] == ["base", "smf"]
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_older_results_are_reported_as_before(tmp_path):
    written = json.loads((DEMO / "results.json").read_text())
    older = {key: value for key, value in written.items() if key not in ("learnt", "lost", "against_base")}
    for name in ("from runs", "from results"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(older))
    shutil.copytree(DEMO / "runs", tmp_path / "from runs" / "runs")
    results, _ = rebuild_report(tmp_path / "from runs")
    assert {key: results[key] for key in older} == older
    assert (results["learnt"], results["lost"]) == (list(LEARNT), list(LOST))
    rebuild_report(tmp_path / "from results")
    for name in ("report.md", "pareto.png", "table.csv", "table.tex"):
        assert (tmp_path / "from runs" / name).read_bytes() == (tmp_path / "from results" / name).read_bytes()


def test_what_is_drawn_comes_from_the_results(tmp_path):
    write_report(RESULTS, tmp_path)
    demo = (tmp_path / "pareto.png").read_bytes()
    write_report({**RESULTS, "learnt": ["recall_train"], "lost": ["drift"]}, tmp_path)
    with Image.open(io.BytesIO(demo)) as three, Image.open(tmp_path / "pareto.png") as one:
        assert one.width < 0.5 * three.width


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        rebuild_report(tmp_path)
