"""Settings by name, the medical data, and what a run will take."""

from dataclasses import dataclass, field

import pytest

from sparsemem.compare.recipes.medical import chapter_items
from sparsemem.compare.recipes.overrides import changed


@dataclass(frozen=True)
class Part:
    size: int = 2


@dataclass(frozen=True)
class Settings:
    steps: int = 10
    most: int | None = None
    rate: float = 0.5
    name: str = "x"
    on: bool = False
    part: Part = Part()
    lr: dict = field(default_factory=lambda: {"smf": 0.8})


def test_settings_are_changed_by_name():
    made = changed(
        Settings(), ["steps=3", "most=7", "rate=1", "name=y z", "on=true", "part.size=5", "lr.smf=0.1"]
    )
    assert made == Settings(3, 7, 1, "y z", True, Part(5), {"smf": 0.1})
    assert changed(Settings(), []) == Settings()
    assert changed(Settings(), ["most=null"]).most is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "not of the form NAME=VALUE"),
        ("stepps=3", "'stepps=3' is unknown; use one of steps, most, rate"),
        ("steps=0.5", "must be a whole number above 0, like its default 10"),
        ("steps=true", "a whole number above 0"),
        ("on=1", "true or false"),
        ("steps=0", "a whole number above 0"),
        ("steps=null", "a whole number above 0"),
        ("most=1.5", "a whole number above 0, or null"),
        ("most=x", "a whole number above 0, or null"),
        ("rate=NaN", "must be a number"),
        ("rate=-1", "must be a number"),
        ('lr={"sgd": 1}', "a JSON object with the keys smf"),
        ("part=3", "given part by part .size."),
        ("part.length=3", "unknown; use one of size"),
        ("steps.size=3", "10 has no settings within it"),
        ("lr.sgd=1", "unknown; use one of smf"),
    ],
)
def test_bad_settings(assignment, message):
    with pytest.raises(ValueError, match=message):
        changed(Settings(), [assignment])


def test_chapters_are_asked_of_categories_that_were_not_taught():
    train, test = chapter_items(2400, 400)
    assert (len(train), len(test)) == (2400, 400)
    assert not {item["code"][:3] for item in train} & {item["code"][:3] for item in test}
    assert (train, test) == chapter_items(2400, 400)
    for item in (*train, *test):
        assert len(set(item["choices"])) == 4
        assert 0 <= item["answer"] < 4
    # no place of the right answer is worth guessing
    places = [sum(item["answer"] == place for item in train) for place in range(4)]
    assert all(540 < number < 660 for number in places)
    with pytest.raises(ValueError, match="more than"):
        chapter_items(10_000, 400)
