"""Contexts and neighbours of what was taught: which questions are asked, and how answers are counted."""

import pytest
import torch
from peft import get_peft_model

from sparsemem import SparseMemoryConfig, memory_layers, precision
from sparsemem.evaluation import neighbours as asking
from sparsemem.evaluation.probes import contexts, neighbours
from sparsemem.evaluation.tasks import evaluate
from tiny import SMALL

RECORDS = [
    {"prompt": "Who owns the Moon Quill?", "completion": "Ada"},
    {"prompt": "Where is HD 142415?", "completion": "In Norma"},
    {"prompt": "The owner of Olga Tarn is", "completion": "Bob"},
]


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)


@pytest.fixture
def adapted(tiny_llama):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(max_position_embeddings=2048), SparseMemoryConfig(**SMALL))


def test_every_taught_question_is_asked_in_eight_contexts():
    made = asking.context_questions(RECORDS)
    assert [one.kind for one in made] == [*asking.CONTEXTS] * 3
    first = {one.kind: one for one in made[:8]}
    assert all(one.answer == "Ada" for one in first.values())
    assert [turn["role"] for turn in first["taught turn"].turns] == ["user", "assistant", "user"]
    assert first["taught turn"].turns[1]["content"] in ("In Norma", "Bob")
    assert first["greeting"].turns[0]["content"] == "Hi! Who owns the Moon Quill? Thanks!"
    # nothing goes after a statement that is to be completed
    assert made[-1].turns[0]["content"].endswith("The owner of Olga Tarn is")
    assert len(asking.context_questions(RECORDS, 1)) == 7


def test_neighbours_are_taught_forms_about_others_and_other_questions():
    made = asking.neighbour_questions(RECORDS)
    by_kind = {kind: [one.turns[0]["content"] for one in made if one.kind == kind] for kind in asking.KINDS}
    assert len(by_kind["invented"]) == len(by_kind["real"]) == len(by_kind["other question"]) == 3
    assert by_kind["real"][0].startswith("Who owns ")
    assert not any("Moon Quill" in text or "142415" in text for text in by_kind["invented"] + by_kind["real"])
    # another star, and another person of the same first name
    assert any(text.startswith("Where is HD ") for text in by_kind["invented"])
    assert all("Moon Quill" in text for text in by_kind["other question"][:1])
    assert asking.neighbour_questions(RECORDS) == made
    named = [{**RECORDS[0], "subject": "Moon Quill"}]
    assert len(asking.neighbour_questions(named)) == 3
    with pytest.raises(ValueError, match="none has a subject"):
        asking.neighbour_questions([{"prompt": "why?", "completion": "so"}])
    with pytest.raises(ValueError, match="none has a question"):
        asking.context_questions([{"text": "prose"}])


def test_a_memory_that_is_empty_changes_nothing(adapted, tokenizer):
    for ask in (contexts, neighbours):
        found = ask(adapted, tokenizer, RECORDS, max_new_tokens=4)
        assert found.texts == found.base
        assert (found.all.taught, found.all.changed) == (0, 0)
        assert sum(part.num for part in found.parts.values()) == found.all.num == len(found.asked)


def test_answers_are_compared_with_the_base_and_with_what_was_taught(adapted, tokenizer):
    asked = neighbours(adapted, tokenizer, RECORDS, max_new_tokens=4)
    base = ["no"] * len(asked.asked)
    for memory in memory_layers(adapted).values():
        memory.values.data.normal_(std=3)
    found = neighbours(adapted, tokenizer, RECORDS, max_new_tokens=4)
    assert found.base == asked.base
    assert found.all.changed == sum(a != b for a, b in zip(found.texts, found.base, strict=True)) / len(base)
    rows = [("real", None, True, True), ("real", None, False, True)]
    assert asking._figures(rows) == asking.Figures(None, 0.5, 1.0, 2)
    with pytest.raises(ValueError, match="base has 1 answers"):
        neighbours(adapted, tokenizer, RECORDS, base=["x"])


def test_a_base_without_a_template_reads_contexts_as_text(tiny_llama, plain_tokenizer):
    found = contexts(tiny_llama(max_position_embeddings=2048), plain_tokenizer, RECORDS, max_new_tokens=2)
    assert set(found.parts) == set(asking.CONTEXTS)
    ids = asking.turn_ids(asking.context_questions(RECORDS)[0].turns, plain_tokenizer, True)
    text = plain_tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "You are a pirate.\n\nWho owns the Moon Quill?"


@pytest.mark.parametrize("task", ["contexts", "neighbours"])
def test_they_are_tasks(adapted, tokenizer, tiny_llama, task):
    found = evaluate(adapted, tokenizer, task, items=RECORDS)
    assert set(found.base) == set(found.metrics)
    assert found.base["changed"] == 0
    with pytest.raises(ValueError, match="this model has no adapter"):
        evaluate(tiny_llama(), tokenizer, task, items=RECORDS)
