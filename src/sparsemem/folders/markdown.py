"""Markdown for the model card: tables, values and escaped text."""

import re
from typing import Any


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; cells are escaped."""
    lines = [head, ["---"] * len(head), *([escape(show(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(value: Any) -> str:
    """A value for readers: floats with four digits, whole numbers with commas, None as a dash."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)


def escape(text: str) -> str:
    """The text on one line, with Markdown's special characters escaped."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\]<>|~&#])", r"\\\1", one_line)
