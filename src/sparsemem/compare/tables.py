"""The tables of a comparison, as Markdown, LaTeX or CSV.

Choices: the possible columns are listed here, each with its meaning; a column without any value is left out.
Markdown and LaTeX round the numbers, CSV keeps every digit.
"""

import csv
import io
from collections.abc import Callable
from typing import Any, NamedTuple

from .figure import number
from .results import NUM_RESAMPLES

AGAINST_BASE = "Difference from the base model on the same questions"
AGAINST_BASE_MEANING = (
    "Difference in accuracy in percentage points, with the 95 % interval of a paired bootstrap "
    f"({NUM_RESAMPLES:,} resamples of the n questions; with several seeds, of each question's mean)."
)


class Column(NamedTuple):
    """One column of the table: key in the rows, heading, meaning, and the function that formats a value."""

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
    Column("edits", "edits", "facts that were taught, strictly one at a time", _count),
    Column(
        "reliability", "reliability", "of all of them, answered wholly right in the taught words", _percent
    ),
    Column("generality", "generality", "the same, asked in other words", _percent),
    Column(
        "contexts",
        "in contexts",
        "taught questions asked behind system prompts, in later turns, in longer texts, answered rightly",
        _percent,
    ),
    Column(
        "worst_context",
        "worst context",
        "the same, in the one of these contexts with the fewest right answers",
        _percent,
    ),
    Column("first_tenth", "first tenth", "reliability of the tenth that was taught first", _percent),
    Column(
        "locality", "locality", "answers to questions about something else that are the base's own", _percent
    ),
    Column(
        "untaught_changed", "untaught changed", "of these answers, those that are not the base's", _percent
    ),
    Column("untaught_taught", "untaught, taught answer", "of these, those with a taught answer", _percent),
    Column("seconds_per_edit", "time an edit", "of teaching, without the probes", "{:.2f} s".format),
    Column("bytes_per_edit", "bytes an edit", "that must be kept for it", _count),
    Column(
        "recall_train",
        "recall",
        "training questions answered correctly, in the wording of the training data",
        _percent,
    ),
    Column(
        "recall_heldout",
        "recall, reworded",
        "the same facts, asked in wordings that are not in the training data",
        _percent,
    ),
    Column(
        "knowledge",
        "knowledge kept",
        "of the general questions that the base model answers correctly, those still correct",
        _percent,
    ),
    Column("knowledge_total", "general questions", "correct answers to all general questions", _percent),
    Column("medmcqa", "MedMCQA", "accuracy on medical exam questions, by mean log-probability", _percent),
    Column(
        "chapters", "chapters", "ICD-10 chapter of a diagnosis, accuracy by mean log-probability", _percent
    ),
    Column("chapters_sum", "chapters, by sum", "the same, by the sum of log-probabilities", _percent),
    Column("triviaqa", "TriviaQA", "general questions with an accepted answer in the reply", _percent),
    Column("capitals", "capitals", "questions about capitals of real countries answered correctly", _percent),
    Column(
        "wikitext",
        "WikiText perplexity",
        "perplexity on Wikipedia articles; lower is better",
        "{:.2f}".format,
    ),
    Column(
        "perplexity",
        "perplexity",
        "perplexity on general prose, not in the training data; lower is better",
        "{:.2f}".format,
    ),
    Column(
        "drift",
        "drift",
        "mean KL divergence from the base model on the same prose, in nats per token",
        _small,
    ),
    Column(
        "neighbours_taught",
        "neighbours, taught answer",
        "taught forms about other subjects, and other questions about taught ones, that get a taught answer",
        _percent,
    ),
    Column(
        "neighbours_changed",
        "neighbours changed",
        "of these questions, those whose answers differ from the base model's",
        _percent,
    ),
    Column(
        "mentions_changed",
        "mentions changed",
        "other questions about the taught subjects whose answers differ from the base model's",
        _percent,
    ),
    Column(
        "mentions_perplexity",
        "mentions perplexity",
        "perplexity of the base model's answers to these questions; best is the base model's value",
        "{:.2f}".format,
    ),
    Column(
        "mentions_prose_perplexity",
        "mentions in prose",
        "perplexity on short texts that name taught subjects; best is the base model's value",
        "{:.2f}".format,
    ),
    Column(
        "exposure",
        "exposure",
        "share of the tokens of the same prose that are in scope and read a written row",
        _percent,
    ),
    Column("loss", "loss", "training loss at the end of the run", "{:.3f}".format),
    Column("steps", "steps", "optimizer steps", _count),
    Column("samples", "samples", "records seen in training, each as often as it was seen", _count),
    Column("seconds", "time", "time to prepare and train, without evaluation", _seconds),
    Column("trained_params", "trained", "number of parameters that training can change", _count),
    Column("peak_bytes", "peak memory", "growth of the process's memory during training", _size),
)
# Characters that LaTeX does not print as they are.
_LATEX = str.maketrans(
    {
        **{mark: f"\\{mark}" for mark in "%_&#${}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "|": r"\textbar{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "±": r"$\pm$",
        "–": "--",
    }
)


def present_columns(results: dict[str, Any]) -> list[Column]:
    """The columns for which at least one row has a value."""
    return [c for c in COLUMNS if any(number(row, c.key) is not None for row in results["rows"])]


def table(results: dict[str, Any]) -> list[list[str]]:
    """The table as lines of cells, heading first; with several seeds a cell is mean ± standard deviation."""
    columns = present_columns(results)
    rows = [[row["method"], *(_cell(row, column) for column in columns)] for row in results["rows"]]
    return [["method", *(column.heading for column in columns)], *rows]


def against_base_table(results: dict[str, Any]) -> list[list[str]]:
    """Differences from the base model with intervals, as lines of cells; empty if nothing was compared."""
    compared = results.get("against_base") or {}
    sizes = {task: entry["n"] for tasks in compared.values() for task, entry in tasks.items()}
    if not sizes:
        return []
    headings = {column.key: column.heading for column in COLUMNS}
    lines = [["method", *(f"{headings.get(task, task)} (n = {n:,})" for task, n in sizes.items())]]
    for method, tasks in compared.items():
        lines.append([method, *(_interval(tasks[task]) if task in tasks else "–" for task in sizes)])
    return lines


def text_table(results: dict[str, Any]) -> str:
    """The table as aligned Markdown, for the terminal and for files."""
    return align(table(results))


def align(lines: list[list[str]]) -> str:
    """Lines of cells as aligned Markdown; the first line is the heading."""
    lines = [[one_line(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def latex_table(results: dict[str, Any]) -> str:
    """The table as a LaTeX `tabular` that needs no LaTeX package."""
    head, *rows = [[" ".join(cell.split()).translate(_LATEX) for cell in line] for line in table(results)]
    lines = [f"{' & '.join(line)} \\\\" for line in (head, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    parts = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"]
    return "\n".join([*parts, r"\end{tabular}"]) + "\n"


def csv_table(results: dict[str, Any]) -> str:
    """All numbers with all digits as CSV: columns `method`, then for each key `<key>` (mean) and `<key>_sd`.

    The standard deviation is empty if there is only one seed.
    """
    rows = results["rows"]
    keys = dict.fromkeys(key for row in rows for key in row if number(row, key) is not None)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", *(name for key in keys for name in (key, f"{key}_sd"))])
    for row in rows:
        spread = row.get("spread", {})
        writer.writerow(
            [row["method"], *(f for key in keys for f in (number(row, key), number(spread, key)))]
        )
    return text.getvalue()


def one_line(text: str) -> str:
    """The text as one line, safe in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _cell(row: dict[str, Any], column: Column) -> str:
    value, spread = number(row, column.key), row.get("spread", {}).get(column.key)
    if value is None:
        return "–"
    return column.write(value) + (f" ± {column.write(spread)}" if spread else "")


def _interval(entry: dict[str, Any]) -> str:
    difference, low, high = (f"{100 * entry[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{difference} [{low}, {high}]"
