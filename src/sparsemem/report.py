"""Write a comparison down: a table in Markdown, a figure, and one HTML page that needs nothing beside it.

Choices:
- The table's columns are fixed here, each with its meaning; a column that no row has is left out.
- Every text that came from data or a model is escaped before it enters the page.
"""

import base64
import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from .compare import collect, read_json
from .files import write_atomically, write_json
from .pareto import number, pareto_figure


class Column(NamedTuple):
    """One column of the table: the row's key, the heading, its meaning, and how a value is written."""

    key: str
    heading: str
    meaning: str
    write: Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.4f}" if abs(value) >= 0.0001 else f"{value:.0e}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def _size(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def _count(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS = (
    Column(
        "recall_train", "recall", "taught questions answered rightly, in the words of the lessons", _percent
    ),
    Column(
        "recall_heldout", "recall, reworded", "the same facts, asked in words that were not taught", _percent
    ),
    Column(
        "knowledge",
        "knowledge kept",
        "general questions still right, of those the base answers rightly",
        _percent,
    ),
    Column("knowledge_total", "general questions", "right answers to all general questions", _percent),
    Column("perplexity", "perplexity", "on prose that was not taught; lower is better", "{:.2f}".format),
    Column("drift", "drift", "mean KL divergence from the base on that prose, in nats per token", _small),
    Column("exposure", "exposure", "share of that prose's tokens that read a written row", _percent),
    Column("loss", "loss", "training loss at the end", "{:.3f}".format),
    Column("steps", "steps", "optimizer steps", _count),
    Column("seconds", "time", "preparing and training, without the probes", _seconds),
    Column("trained_params", "trained", "parameters that training may change", _count),
    Column("peak_bytes", "peak memory", "growth of the process's memory while it trains", _size),
)


def write_report(results: dict[str, Any], out: str | Path) -> Path:
    """Write `report.md`, `pareto.png` and `report.html` into the folder `out`; return the path of the page.

    `results` is what `compare` returns and `results.json` holds.

    Raises:
        ValueError: when `results` has no rows.
    """
    rows = results.get("rows") if isinstance(results, dict) else None
    rows = rows if isinstance(rows, list) else []
    named = [row for row in rows if isinstance(row, dict) and "method" in row]
    if not rows or len(named) < len(rows):
        raise ValueError("these results have no rows to report; give the content of a results.json")
    out = Path(out)
    figure = pareto_figure(named)
    _write(out / "pareto.png", figure)
    _write(out / "report.md", _markdown(results).encode())
    _write(out / "report.html", _page(results, figure).encode())
    return out / "report.html"


def rebuild_report(folder: str | Path) -> tuple[dict[str, Any], Path]:
    """Results and report page of a folder that a comparison wrote: from its runs, or else its `results.json`.

    Raises:
        ValueError: when the folder holds neither, or they cannot be read.
    """
    folder = Path(folder)
    if any(folder.glob("runs/*/result.json")):
        results = collect(folder)
        write_json(folder / "results.json", results)
    elif (folder / "results.json").exists():
        results = read_json(folder / "results.json")
    else:
        missing = "no results.json and no runs/*/result.json"
        raise ValueError(f"{folder} holds {missing}; give a folder that a comparison wrote")
    return results, write_report(results, folder)


def text_table(results: dict[str, Any]) -> str:
    """The table in aligned Markdown, for terminal and file; several seeds as mean ± standard deviation."""
    lines = [[_one_line(cell) for cell in line] for line in _table(results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def text_examples(results: dict[str, Any], num_examples: int) -> str:
    """The first questions with every model's answer, for a terminal."""
    blocks = []
    for example in (results.get("examples") or [])[:num_examples]:
        width = max(map(len, example["answers"]))
        answers = [f"  {name.ljust(width)}  {_one_line(text)}" for name, text in example["answers"].items()]
        blocks.append("\n".join([f"{example['question']}  (expected: {_expected(example)})", *answers]))
    return "\n\n".join(blocks)


def _table(results: dict[str, Any]) -> list[list[str]]:
    columns = _present(results)
    rows = [[row["method"], *(_cell(row, column) for column in columns)] for row in results["rows"]]
    return [["method", *(column.heading for column in columns)], *rows]


def _present(results: dict[str, Any]) -> list[Column]:
    return [c for c in COLUMNS if any(number(row, c.key) is not None for row in results["rows"])]


def _cell(row: dict[str, Any], column: Column) -> str:
    value, spread = number(row, column.key), row.get("spread", {}).get(column.key)
    if value is None:
        return "–"
    return column.write(value) + (f" ± {column.write(spread)}" if spread else "")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _expected(example: dict[str, Any]) -> str:
    expected = example["expected"]
    return expected if isinstance(expected, str) else " / ".join(expected)


def _title(results: dict[str, Any]) -> str:
    return f"What was learnt, and what it cost: {_one_line(str(results.get('model', 'model')))}"


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the figures come from: recipe, model, seeds, versions, machine, commit."""
    seeds = ", ".join(map(str, results.get("seeds") or [results.get("seed")]))
    spread = any("spread" in row for row in results["rows"])
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    facts = [
        ("recipe", results.get("recipe")),
        ("model", results.get("model")),
        ("seeds", f"{seeds} (mean ± standard deviation)" if spread else seeds),
        ("versions", versions),
        ("machine", results.get("machine")),
        ("commit", results.get("commit")),
    ]
    return [(name, _one_line(str(value))) for name, value in facts if value]


def _markdown(results: dict[str, Any]) -> str:
    parts = [
        f"# {_title(results)}",
        str(results.get("about") or ""),
        text_table(results),
        "\n".join(f"- {column.heading}: {column.meaning}" for column in _present(results)),
        "![What was learnt against what was lost](pareto.png)",
        "\n".join(f"- {name}: {value}" for name, value in _facts(results)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


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


def _page(results: dict[str, Any], figure: bytes) -> str:
    title, about = escape(_title(results)), escape(str(results.get("about") or ""))
    meanings = [(column.heading, column.meaning) for column in _present(results)]
    image = base64.b64encode(figure).decode()
    settings = escape(json.dumps(results.get("settings", {}), indent=1, ensure_ascii=False))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}</p>
{_html_table([[escape(cell) for cell in line] for line in _table(results)], "figures")}
<h2>What was learnt against what was lost</h2>
<p>Up is learnt, right is lost: the upper left corner is best.</p>
<img alt="Recall against loss, one point for each method" src="data:image/png;base64,{image}">
{_html_examples(results)}
<h2>What the columns mean</h2>
{_html_definitions(meanings)}
<h2>Where the figures come from</h2>
{_html_definitions(_facts(results))}
<details><summary>Settings of every run</summary><pre>{settings}</pre></details>
<footer>Made by sparsemem; <code>sparsemem report DIR</code> makes it again.</footer>
</body>
</html>
"""


def _html_examples(results: dict[str, Any]) -> str:
    examples = results.get("examples") or []
    answering = {method for example in examples for method in example["answers"]}
    methods = [row["method"] for row in results["rows"] if row["method"] in answering]
    lines = [[escape(name) for name in ("question", "expected", *methods)]]
    for example in examples:
        line = [escape(example["question"]), escape(_expected(example))]
        for method in methods:
            kind = {True: "right", False: "wrong"}.get(example.get("right", {}).get(method), "")
            line.append(f'<span class="{kind}">{escape(example["answers"].get(method, "–"))}</span>')
        lines.append(line)
    heading = "<h2>Some questions, and what each model answers</h2>"
    return f"{heading}\n{_html_table(lines, 'answers')}" if examples else ""


def _html_table(lines: list[list[str]], kind: str) -> str:
    """A table of cells that are HTML already, its first line the heading."""
    head = "".join(f"<th>{cell}</th>" for cell in lines[0])
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines[1:])
    return (
        f'<div class="wide"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _html_definitions(pairs: list[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in pairs)}</dl>"


def _write(path: Path, data: bytes) -> None:
    def write(part: Path) -> None:
        part.write_bytes(data)

    write_atomically(path, write)
