"""The HTML page of a comparison, which needs nothing beside it.

Choices: every text that came from data or a model is escaped before it enters the page.
"""

import base64
import json
from html import escape
from typing import Any

from .tables import AGAINST_BASE, AGAINST_BASE_MEANING, against_base_table, one_line, present_columns, table

_STYLE = """
:root { --ink: #222; --soft: #666; --line: #dcdcdc; --right: #00694b; --wrong: #a33c00; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 68rem;
  margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin-top: 2.6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { vertical-align: bottom; }
.figures td, .figures th { text-align: right; }
.figures td { white-space: nowrap; }
.figures td:first-child, .figures th:first-child { text-align: left; font-weight: 600; }
img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .93rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .85rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .9rem; }
"""


def html_page(results: dict[str, Any], figure: bytes) -> str:
    """The page, with the PNG `figure` inside."""
    heading, about = escape(title(results)), escape(str(results.get("about") or ""))
    meanings = [(column.heading, column.meaning) for column in present_columns(results)]
    image = base64.b64encode(figure).decode()
    settings = escape(json.dumps(results.get("settings", {}), indent=1, ensure_ascii=False))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{heading}</h1>
<p>{about}</p>
{_table(_escaped(table(results)), "figures")}
{_against_base(results)}
<h2>What was learnt against what was lost</h2>
<p>Up is learnt, right is lost: the upper left corner is best. The dashed lines are the base.</p>
<img alt="Learnt against lost, one point for each method" src="data:image/png;base64,{image}">
{_examples(results)}
<h2>What the columns mean</h2>
{_definitions(meanings)}
<h2>Where the figures come from</h2>
{_definitions(facts(results))}
<details><summary>Settings of every run</summary><pre>{settings}</pre></details>
<footer>Made by sparsemem; <code>sparsemem report DIR</code> makes it again.</footer>
</body>
</html>
"""


def title(results: dict[str, Any]) -> str:
    """The heading of a report."""
    return f"What was learnt, and what it cost: {one_line(str(results.get('model', 'model')))}"


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the figures come from: recipe, model, seeds, versions, machine, commit."""
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


def _against_base(results: dict[str, Any]) -> str:
    lines = _escaped(against_base_table(results))
    heading = f"<h2>{AGAINST_BASE}</h2>\n<p>{AGAINST_BASE_MEANING}</p>"
    return f"{heading}\n{_table(lines, 'figures')}" if lines else ""


def _escaped(lines: list[list[str]]) -> list[list[str]]:
    return [[escape(cell) for cell in line] for line in lines]


def _examples(results: dict[str, Any]) -> str:
    examples = results.get("examples") or []
    answering = {method for example in examples for method in example["answers"]}
    methods = [row["method"] for row in results["rows"] if row["method"] in answering]
    lines = [[escape(name) for name in ("question", "expected", *methods)]]
    for example in examples:
        line = [escape(example["question"]), escape(expected(example))]
        for method in methods:
            kind = {True: "right", False: "wrong"}.get(example.get("right", {}).get(method), "")
            line.append(f'<span class="{kind}">{escape(example["answers"].get(method, "–"))}</span>')
        lines.append(line)
    heading = "<h2>Some questions, and what each model answers</h2>"
    return f"{heading}\n{_table(lines, 'answers')}" if examples else ""


def _table(lines: list[list[str]], kind: str) -> str:
    """A table of cells that are HTML already, its first line the heading."""
    head = "".join(f"<th>{cell}</th>" for cell in lines[0])
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines[1:])
    return (
        f'<div class="wide"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _definitions(pairs: list[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in pairs)}</dl>"
