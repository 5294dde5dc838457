"""The entries of `evaluations.json`: each holds the options of one evaluation and its results."""

from typing import Any

from .markdown import show
from .names import public_data, public_model

# Keys of the results and their circumstances. All other keys are options of the evaluation.
FOUND = ("metrics", "base", "n", "weights", "date", "versions", "commit")


def asked(entry: dict[str, Any]) -> dict[str, Any]:
    """The options of the evaluation: task, data, limit and so on."""
    return {key: value for key, value in entry.items() if key not in FOUND}


def data_name(entry: dict[str, Any]) -> str:
    """The data's public name; for a benchmark from the Hub, the name of its task."""
    return public_data(entry["data"]) if entry.get("data") else str(entry["task"])


def options_text(entry: dict[str, Any]) -> str:
    """The options other than task and data, for example `limit 100`."""
    known = ("task", "data", *FOUND)
    if entry.get("precision") == "float32":
        known += ("precision",)
    return ", ".join(
        f"{key} {show_setting(v)}" for key, v in entry.items() if key not in known and v is not None
    )


def show_setting(value: Any) -> str:
    """A setting for readers. Text may be a path, so only its public name is shown."""
    return public_model(value) if isinstance(value, str) else show(value)
