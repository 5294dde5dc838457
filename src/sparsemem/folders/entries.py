"""The entries of `evaluations.json`: what was asked of a model, and what was found."""

from typing import Any

from .markdown import show
from .names import public_data, public_model

# What an entry found, and where; all other keys say what was asked.
FOUND = ("metrics", "base", "n", "weights", "date", "versions", "commit")


def asked(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in FOUND}


def data_name(entry: dict[str, Any]) -> str:
    """A benchmark that was read from the Hub goes by its task."""
    return public_data(entry["data"]) if entry.get("data") else str(entry["task"])


def options_text(entry: dict[str, Any]) -> str:
    """What was asked beyond task and data, as `limit 100`."""
    known = ("task", "data", *FOUND)
    if entry.get("precision") == "float32":
        known += ("precision",)
    return ", ".join(
        f"{key} {show_setting(v)}" for key, v in entry.items() if key not in known and v is not None
    )


def show_setting(value: Any) -> str:
    """A setting may name a file."""
    return public_model(value) if isinstance(value, str) else show(value)
