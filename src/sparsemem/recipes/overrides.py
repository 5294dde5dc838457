"""Changing a recipe's settings by name: `max_steps=40`, `lr.smf=0.3`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")


def changed(settings: T, assignments: Sequence[str]) -> T:
    """The settings, a dataclass, with `NAME=VALUE` put in; a dot leads into a part.

    Raises:
        ValueError: an unknown name, or a value of another type than the setting's.
    """
    for assignment in assignments:
        name, found, text = assignment.partition("=")
        if not found:
            raise ValueError(f"setting {assignment!r} is not of the form NAME=VALUE, like max_steps=40")
        settings = _put(settings, name.split("."), _value(text), assignment)
    return settings


def _put(part: Any, path: Sequence[str], value: Any, assignment: str) -> Any:
    own = {one.name: getattr(part, one.name) for one in fields(part)} if is_dataclass(part) else part
    if not isinstance(own, Mapping) or path[0] not in own:
        allowed = ", ".join(own) if isinstance(own, Mapping) else "nothing within it"
        raise ValueError(f"setting {assignment!r} is unknown; allowed are {allowed}")
    before = own[path[0]]
    if len(path) > 1:
        value = _put(before, path[1:], value, assignment)
    elif not _fits(value, before):
        raise ValueError(f"setting {assignment!r} does not fit its default {before!r}; give its like")
    if is_dataclass(part):
        return replace(part, **{path[0]: value})  # type: ignore[type-var]
    return {**own, path[0]: value}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _fits(value: Any, before: Any) -> bool:
    """Whether a value may stand for the default: its type; a number above 0, or 0 where the default is."""
    if before is None:
        return value is None or (type(value) is int and value > 0)
    if isinstance(before, Mapping):
        same = isinstance(value, Mapping) and value.keys() == before.keys()
        return same and all(_fits(value[key], before[key]) for key in before)
    if isinstance(before, bool) or not isinstance(before, int | float):
        return isinstance(value, list) if isinstance(before, tuple) else type(value) is type(before)
    number = isinstance(value, int) or (isinstance(before, float) and isinstance(value, float))
    return number and not isinstance(value, bool) and (0 < value < math.inf or value == before == 0)
