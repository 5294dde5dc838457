import csv
import io

import pytest

from sparsemem.compare.tables import against_base_table, csv_table, latex_table, text_table

RESULTS = {
    "rows": [
        {"method": "base", "medmcqa": 0.344, "wikitext": 13.146, "chapters": 0.25},
        {
            "method": "additive_kl & 50%", "medmcqa": 0.369, "wikitext": 12.7234, "triviaqa": 0.252,
            "num_known": 7, "chapters": 0.5, "chapters_sum": 0.375, "capitals": 1.0, "note": "no figure",
            "spread": {"medmcqa": 0.0041, "wikitext": 0.05},
        },
    ],
    "against_base": {
        "smf": {"medmcqa": {"difference": 0.025, "low": -0.001, "high": 0.0512, "n": 1000}},
        "lora": {"own-task": {"difference": -0.5, "low": -0.75, "high": -0.25, "n": 4}},
    },
}  # fmt: skip
DEMO = {
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
}  # fmt: skip


def test_table_is_aligned_markdown_with_spread_and_gaps():
    lines = text_table(DEMO).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    assert "98.0 % ± 1.0 %" in lines[3]
    assert "0.0002 ± 1e-05" in lines[3]
    assert "2,048 MiB" in lines[3]
    assert "1,769,472" in lines[3]
    assert "exposure" not in lines[0]
    assert lines[4].count("–") == 5


def test_table_keeps_odd_method_names_in_their_cell():
    table = text_table({"rows": [{"method": "a|b\nc", "drift": 0.1}]})
    assert r"a\|b c" in table


def test_the_papers_figures_have_columns():
    head, _, base, additive = text_table(RESULTS).splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert names == [
        "method", "MedMCQA", "chapters", "chapters, by sum", "TriviaQA", "capitals", "WikiText perplexity",
    ]  # fmt: skip
    cells = [cell.strip() for cell in additive.strip("|").split("|")]
    assert cells[1:] == ["36.9 % ± 0.4 %", "50.0 %", "37.5 %", "25.2 %", "100.0 %", "12.72 ± 0.05"]
    assert [cell.strip() for cell in base.strip("|").split("|")][1:4] == ["34.4 %", "25.0 %", "–"]


def test_differences_to_the_base_in_points():
    assert against_base_table(RESULTS) == [
        ["method", "MedMCQA (n = 1,000)", "own-task (n = 4)"],
        ["smf", "+2.5 [-0.1, +5.1]", "–"],
        ["lora", "–", "-50.0 [-75.0, -25.0]"],
    ]


@pytest.mark.parametrize("compared", [{}, {"against_base": {}}, {"against_base": {"smf": {}}}])
def test_no_difference_no_table(compared):
    assert against_base_table({"rows": [], **compared}) == []


def test_latex_escapes_and_closes():
    lines = latex_table(RESULTS).splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrr}"
    assert lines[-1] == r"\end{tabular}"
    assert lines.count(r"\hline") == 3
    row = next(line for line in lines if line.startswith("additive"))
    assert row.startswith(r"additive\_kl \& 50\% & 36.9 \% $\pm$ 0.4 \% &")
    assert row.endswith(r"\\")
    base = next(line for line in lines if line.startswith("base"))
    assert base == r"base & 34.4 \% & 25.0 \% & -- & -- & -- & 13.15 \\"


def test_latex_leaves_nothing_that_it_would_take_for_its_own():
    (row,) = [
        line
        for line in latex_table({"rows": [{"method": "#{$}~^\\|<>\n", "drift": 0.0}]}).splitlines()
        if "&" in line and "method" not in line
    ]
    name = row.split(" & ")[0]
    assert name == (
        r"\#\{\$\}\textasciitilde{}\textasciicircum{}\textbackslash{}\textbar{}\textless{}\textgreater{}"
    )


def test_csv_keeps_every_figure_with_its_deviation():
    lines = list(csv.DictReader(io.StringIO(csv_table(RESULTS))))
    assert list(lines[0])[:3] == ["method", "medmcqa", "medmcqa_sd"]
    assert "note" not in lines[0]
    assert lines[0]["medmcqa_sd"] == lines[0]["triviaqa"] == ""
    assert lines[1]["method"] == "additive_kl & 50%"
    assert float(lines[1]["wikitext"]) == 12.7234
    assert float(lines[1]["medmcqa_sd"]) == 0.0041
    assert lines[1]["num_known"] == "7"
