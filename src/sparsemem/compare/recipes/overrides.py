"""Change a recipe's settings by name: `max_steps=40`, `lr.smf=0.3`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")


def changed(settings: T, assignments: Sequence[str]) -> T:
    """A copy of the settings (a dataclass) with each `NAME=VALUE` changed; a dot leads to a nested setting.

    Raises:
        ValueError: the name is unknown, or the value has another type than the setting.
    """
    for assignment in assignments:
        name, found, text = assignment.partition("=")
        if not found:
            raise ValueError(
                f"setting {assignment!r} is not of the form NAME=VALUE, for example max_steps=40"
            )
        settings = _put(settings, name.split("."), _value(text), assignment)
    return settings


def _put(part: Any, path: Sequence[str], value: Any, assignment: str) -> Any:
    own = {one.name: getattr(part, one.name) for one in fields(part)} if is_dataclass(part) else part
    if not isinstance(own, Mapping) or path[0] not in own:
        if not isinstance(own, Mapping):
            raise ValueError(f"setting {assignment!r} is unknown: {part!r} has no settings within it")
        raise ValueError(f"setting {assignment!r} is unknown; use one of {', '.join(own)}")
    before = own[path[0]]
    if len(path) > 1:
        value = _put(before, path[1:], value, assignment)
    elif not _fits(value, before):
        raise ValueError(f"setting {assignment!r} must be {_allowed(before)}, like its default {before!r}")
    if is_dataclass(part):
        return replace(part, **{path[0]: value})  # type: ignore[type-var]
    return {**own, path[0]: value}


def _allowed(before: Any) -> str:
    """What may replace the default, in words."""
    if before is None:
        return "a whole number above 0, or null"
    if is_dataclass(before):
        return f"given part by part ({', '.join(one.name for one in fields(before))})"
    if isinstance(before, Mapping):
        return f"a JSON object with the keys {', '.join(before)} and fitting values"
    if isinstance(before, bool):
        return "true or false"
    if isinstance(before, int | float):
        kind = "whole number" if isinstance(before, int) else "number"
        return f"a {kind} above 0" if before else f"a {kind} of at least 0"
    return "a JSON list" if isinstance(before, tuple) else "a text"


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _fits(value: Any, before: Any) -> bool:
    """Whether a value may replace the default: same type; a number above 0, or 0 if the default is 0."""
    if before is None:
        return value is None or (type(value) is int and value > 0)
    if isinstance(before, Mapping):
        same = isinstance(value, Mapping) and value.keys() == before.keys()
        return same and all(_fits(value[key], before[key]) for key in before)
    if isinstance(before, bool) or not isinstance(before, int | float):
        return isinstance(value, list) if isinstance(before, tuple) else type(value) is type(before)
    number = isinstance(value, int) or (isinstance(before, float) and isinstance(value, float))
    return number and not isinstance(value, bool) and (0 < value < math.inf or value == before == 0)
