"""Checks of the options of row optimizers."""


def _check(name: str, value: float, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} must be {allowed}")


def check_positive(name: str, value: float) -> None:
    _check(name, value, value > 0, "greater than 0")


def check_not_negative(name: str, value: float) -> None:
    _check(name, value, value >= 0, "0 or greater")


def check_fraction(name: str, value: float) -> None:
    _check(name, value, 0 <= value < 1, "at least 0 and less than 1")
