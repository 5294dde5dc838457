"""Write the report of a comparison: tables in Markdown, LaTeX and CSV, a figure and an HTML page."""

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..atomic import read_json, write_atomically, write_json
from .figure import pareto_figure
from .results import LEARNT, LOST, collect
from .tables import (
    AGAINST_BASE,
    AGAINST_BASE_MEANING,
    against_base_table,
    align,
    csv_table,
    latex_table,
    one_line,
    present_columns,
    table,
    text_table,
)


def write_report(results: dict[str, Any], out: str | Path) -> Path:
    """Write `pareto.png`, `report.md`, `table.tex`, `table.csv` and `report.html` into the folder `out`.

    `results` is what `compare` returns and `results.json` holds. Returns the path of the page.

    Raises:
        ValueError: `results` has no rows.
    """
    rows = results.get("rows") if isinstance(results, dict) else None
    rows = rows if isinstance(rows, list) else []
    named = [row for row in rows if isinstance(row, dict) and "method" in row]
    if not rows or len(named) < len(rows):
        raise ValueError(
            "the results have no rows, so there is nothing to report; give the content of a results.json"
        )
    out = Path(out)
    figure = pareto_figure(named, learnt=results.get("learnt", LEARNT), lost=results.get("lost", LOST))
    texts = {
        "report.md": _markdown(results),
        "table.tex": latex_table(results),
        "table.csv": csv_table(results),
        "report.html": html_page(results, figure),
    }
    _write(out / "pareto.png", figure)
    for name, text in texts.items():
        _write(out / name, text.encode())
    return out / "report.html"


def rebuild_report(folder: str | Path) -> tuple[dict[str, Any], Path]:
    """Write the report of a comparison folder again, from its runs or, without runs, from its `results.json`.

    Returns the results and the path of the HTML page.

    Raises:
        ValueError: the folder holds neither runs nor results, or they cannot be read.
    """
    folder = Path(folder)
    if any(folder.glob("runs/*/result.json")):
        results = collect(folder)
        write_json(folder / "results.json", results)
    elif (folder / "results.json").exists():
        results = read_json(folder / "results.json")
    else:
        missing = "no results.json and no runs/*/result.json"
        raise ValueError(f"{folder} holds {missing}; give a folder that `sparsemem compare` wrote")
    return results, write_report(results, folder)


def text_examples(results: dict[str, Any], num_examples: int) -> str:
    """The first `num_examples` questions with the answer of every method, as text for a terminal."""
    blocks = []
    for example in (results.get("examples") or [])[:num_examples]:
        width = max(map(len, example["answers"]))
        answers = [f"  {name.ljust(width)}  {one_line(text)}" for name, text in example["answers"].items()]
        blocks.append("\n".join([f"{example['question']}  (expected: {expected(example)})", *answers]))
    return "\n\n".join(blocks)


def _markdown(results: dict[str, Any]) -> str:
    compared = against_base_table(results)
    parts = [
        f"# {title(results)}",
        str(results.get("about") or ""),
        text_table(results),
        "\n".join(f"- {column.heading}: {column.meaning}" for column in present_columns(results)),
        f"## {AGAINST_BASE}\n\n{align(compared)}\n\n{AGAINST_BASE_MEANING}" if compared else "",
        "![Learnt and lost](pareto.png)",
        "\n".join(f"- {name}: {value}" for name, value in facts(results)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _write(path: Path, data: bytes) -> None:
    def write(part: Path) -> None:
        part.write_bytes(data)

    write_atomically(path, write)


def html_page(results: dict[str, Any], figure: bytes) -> str:
    """Render the page; `figure` is a PNG that is embedded in it."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    methods = _answering(results)
    return pages.get_template("page.html.jinja").render(
        title=title(results),
        about=str(results.get("about") or ""),
        table=table(results),
        against_base=against_base_table(results),
        against_base_heading=AGAINST_BASE,
        against_base_meaning=AGAINST_BASE_MEANING,
        figure=base64.b64encode(figure).decode(),
        methods=methods,
        examples=[_example(example, methods) for example in results.get("examples") or []],
        meanings=[(column.heading, column.meaning) for column in present_columns(results)],
        facts=facts(results),
        settings=json.dumps(results.get("settings", {}), indent=1, ensure_ascii=False),
    )


def title(results: dict[str, Any]) -> str:
    """The heading of a report."""
    return f"Learnt and forgotten: {one_line(str(results.get('model', 'model')))}"


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """How the results were made: recipe, model, seeds, versions, machine and commit, as pairs of text."""
    seeds = ", ".join(map(str, results.get("seeds") or [results.get("seed")]))
    spread = any("spread" in row for row in results["rows"])
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    pairs = [
        ("recipe", results.get("recipe")),
        ("model", results.get("model")),
        ("seeds", f"{seeds} (mean ± standard deviation)" if spread else seeds),
        ("versions", versions),
        ("machine", results.get("machine")),
        ("commit", results.get("commit")),
    ]
    return [(name, one_line(str(value))) for name, value in pairs if value]


def expected(example: dict[str, Any]) -> str:
    """The accepted answers to a question, as one text."""
    accepted = example["expected"]
    return accepted if isinstance(accepted, str) else " / ".join(accepted)


def _answering(results: dict[str, Any]) -> list[str]:
    """The methods that have answers to the examples, in the order of the table."""
    answering = {method for example in results.get("examples") or [] for method in example["answers"]}
    return [row["method"] for row in results["rows"] if row["method"] in answering]


def _example(example: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """One row of the table of examples; an answer's kind is `right`, `wrong` or empty."""
    kinds, judged = {True: "right", False: "wrong"}, example.get("right", {})
    answers = [
        {"text": example["answers"].get(method, "–"), "kind": kinds.get(judged.get(method), "")}
        for method in methods
    ]
    return {"question": example["question"], "expected": expected(example), "answers": answers}
