"""The HTML page of a comparison: one file that loads no other file.

Choices: the template `page.html.jinja` is rendered with autoescape, so no text from data or a model can
become HTML.
"""

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .tables import AGAINST_BASE, AGAINST_BASE_MEANING, against_base_table, one_line, present_columns, table


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
