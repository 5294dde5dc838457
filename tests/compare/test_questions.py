"""The demo's questions: complete, deterministic, and no probe in the background."""

import re
import sys
from collections import Counter

import pytest

from sparsemem.compare.recipes import questions
from sparsemem.data.general import prose

SEEDS = (0, 1, 2)


def normal(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def has_words(text: str, phrase: str) -> bool:
    return f" {normal(phrase)} " in f" {normal(text)} "


def accepted(item: dict) -> list[str]:
    return [item["answer"]] if isinstance(item["answer"], str) else item["answer"]


def pair(record: dict) -> tuple[str, str]:
    user, assistant = record["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


@pytest.fixture(scope="module")
def general() -> list[dict]:
    return questions.general_items()


@pytest.fixture(scope="module", params=SEEDS)
def background(request) -> list[tuple[str, str]]:
    return [pair(record) for record in questions.background_records(request.param)]


def test_handbook_has_forty_whole_facts():
    facts = questions.handbook()
    assert len(facts) == 40
    assert Counter(fact["kind"] for fact in facts)["capital"] == 12
    for key in ("id", "subject", "answer"):
        assert len({normal(fact[key]) for fact in facts}) == 40, key
    for fact in facts:
        assert set(fact) == {"id", "kind", "subject", "answer", "train", "heldout"}
        phrasings = [*fact["train"], fact["heldout"]]
        assert len({normal(phrasing) for phrasing in phrasings}) == 4
        assert 1 <= len(fact["answer"].split()) <= 3
        for phrasing in phrasings:
            assert fact["subject"] in phrasing
            assert phrasing[-1] in "?."
            assert len(phrasing.split()) <= 14


def test_no_handbook_question_gives_an_answer_away():
    facts = questions.handbook()
    asked = " | ".join(phrasing for fact in facts for phrasing in [*fact["train"], fact["heldout"]])
    assert not [fact["answer"] for fact in facts if has_words(asked, fact["answer"])]


def test_heldout_wording_is_not_a_training_wording_of_the_same_fact():
    for fact in questions.handbook():
        frames = [normal(text.replace(fact["subject"], "_")) for text in [*fact["train"], fact["heldout"]]]
        # Word order counts: "X's capital is which city" is not "which city is X's capital".
        assert frames[3] not in frames[:3], fact["id"]


def test_training_records_and_recall_items_are_the_handbook():
    train, heldout = questions.recall_items("train"), questions.recall_items("heldout")
    assert (len(train), len(heldout)) == (120, 40)
    assert [pair(record) for record in questions.training_records()] == [
        (item["question"], item["answer"]) for item in train
    ]
    assert not {item["question"] for item in train} & {item["question"] for item in heldout}


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' and 'heldout'"):
        questions.recall_items("test")


def test_general_items(general):
    capitals = [item for item in general if item["question"].startswith("What is the capital of ")]
    assert len(general) - len(capitals) >= 60
    everywhere = questions.capital_items()
    assert 90 <= len(everywhere) <= 105
    assert capitals == everywhere[1::2]
    assert {"question": "What is the capital of France?", "answer": "Paris"} in everywhere
    assert {"question": "What is the capital of the Netherlands?", "answer": "Amsterdam"} in everywhere
    assert len({normal(item["question"]) for item in general}) == len(general)
    assert general == questions.general_items()
    for item in general:
        assert accepted(item)
        assert not any(has_words(item["question"], answer) for answer in accepted(item)), item


def test_background_records(background):
    assert 250 <= len(background) <= 500
    assert len({normal(question) for question, _ in background}) == len(background)
    assert all(question.strip() and answer.strip() for question, answer in background)


def test_background_is_deterministic_and_differs_by_seed():
    assert questions.background_records(0) == questions.background_records(0)
    assert questions.background_records(0) != questions.background_records(1)


def test_no_probe_is_in_the_background(background, general):
    probes = [*general, *questions.recall_items("train"), *questions.recall_items("heldout")]
    assert not {normal(item["question"]) for item in probes} & {
        normal(question) for question, _ in background
    }
    capitals = {
        accepted(item)[0] for item in general if item["question"].startswith("What is the capital of ")
    }
    for question, answer in background:
        assert not ("capital" in question and answer in capitals), question


def test_the_background_does_not_reword_a_probe(background, general):
    """No pair shares a probe's answer and all of its question's content words."""
    small = {
        "what",
        "which",
        "who",
        "is",
        "the",
        "of",
        "in",
        "a",
        "name",
        "called",
        "does",
        "do",
        "for",
        "was",
    }

    def content(question: str) -> set[str]:
        return set(normal(question).split()) - small

    for question, answer in background:
        for item in general:
            if normal(answer) in map(normal, accepted(item)):
                assert not content(item["question"]) <= content(question), (question, item)


def test_nothing_invented_is_anywhere_else(background, general):
    elsewhere = " | ".join(
        [text for entry in background for text in entry]
        + [text for item in general for text in (item["question"], *accepted(item))]
    )
    invented = [text for fact in questions.handbook() for text in (fact["subject"], fact["answer"])]
    assert not [text for text in invented if has_words(elsewhere, text)]


def test_prose_halves_are_long_and_share_no_paragraph():
    background, probe = prose()
    assert min(len(background), len(probe)) > 50_000
    parts = [
        {" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)}
        for text in (background, probe)
    ]
    assert not parts[0] & parts[1]
    assert (background, probe) == prose()
    assert not [
        fact["subject"] for fact in questions.handbook() if has_words(background + probe, fact["subject"])
    ]


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("countryinfo", questions.general_items),
        ("countryinfo", lambda: questions.background_records(0)),
        ("simple_icd_10_cm", lambda: questions.background_records(0)),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=re.escape(f"{module}, which is not installed: run pip install")):
        call()
