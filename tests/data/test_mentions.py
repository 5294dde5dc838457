"""Subjects of training records, and the texts that name them."""

import json
import logging
import random
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from sparsemem import SparseMemoryConfig, memory_layers, precision
from sparsemem.compare.recipes import questions
from sparsemem.data.generation import answer_tokens
from sparsemem.data.known import (
    KEEP_FORMS,
    PROBE_FORMS,
    PROSE_FORMS,
    mention_records,
    mention_texts,
    subjects_of,
)
from sparsemem.data.records import encode, question_ids
from sparsemem.evaluation import probes
from tiny import SMALL

CHOOSING = Path(__file__).parents[2] / "benchmarks" / "choosing" / "handbook.jsonl"
SUBJECTS = ["Velmora", "the Tin Clock", "marsh cough"]
RECORDS = [
    {"prompt": form.format(subject), "completion": answer}
    for subject, answer in zip(SUBJECTS, ("Ostrinth", "1903", "honey"), strict=True)
    for form in ("What goes with {}?", "Tell me what {} has.", "Which thing has {} got?")
]


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)


@pytest.fixture(scope="module", params=["demo", "choosing"])
def facts(request):
    if request.param == "demo":
        return questions.handbook()
    return [json.loads(line) for line in CHOOSING.read_text().splitlines()]


def taught(facts, num_phrasings=3):
    return [
        {"prompt": question, "completion": fact["answer"]}
        for fact in facts
        for question in fact["train"][:num_phrasings]
    ]


def test_every_subject_of_the_handbooks_is_found_exactly(facts):
    subjects = [fact["subject"] for fact in facts]
    records = taught(facts)
    assert subjects_of(records) == subjects
    random.Random(0).shuffle(records)
    assert set(subjects_of(records)) == set(subjects)


def test_neighbours_are_a_fact_whatever_their_completions(facts):
    for completion in ("{}: yes", "yes"):
        records = [{**one, "completion": completion.format(n)} for n, one in enumerate(taught(facts))]
        assert subjects_of(records) == [fact["subject"] for fact in facts]


@pytest.mark.parametrize(("num_phrasings", "least"), [(1, 35), (2, 38)])
def test_most_subjects_are_found_in_fewer_phrasings(facts, num_phrasings, least):
    found = subjects_of(taught(facts, num_phrasings))
    assert len(found) == 40
    assert len(set(found) & {fact["subject"] for fact in facts}) >= least


def test_chats_and_choices_have_subjects_and_text_has_none(facts, caplog):
    assert subjects_of(questions.training_records()) == [fact["subject"] for fact in questions.handbook()]
    choices = [
        {"question": record["prompt"], "choices": ["no", record["completion"]], "answer": 1}
        for record in taught(facts)
    ]
    assert subjects_of([*choices, {"text": "Velmora is a country."}]) == [fact["subject"] for fact in facts]
    turns = [{"role": "assistant", "content": "Hello!"}]
    assert subjects_of([{"messages": turns}]) == []
    assert not caplog.records


def test_several_facts_of_one_subject_name_it_once(facts):
    kinds = {"currency": "florrel", "language": "Tavish", "capital": "Ostrinth", "anthem": "Rise Up"}
    records = [
        {"prompt": form.format(kind), "completion": answer}
        for kind, answer in kinds.items()
        for form in ("What is the {} of Zorbane?", "Tell me Zorbane's {}.", "In Zorbane, what is the {}?")
    ]
    assert subjects_of([*taught(facts), *records]) == [*(fact["subject"] for fact in facts), "Zorbane"]


@pytest.mark.parametrize(
    ("prompts", "subjects"),
    [
        (['To what does "marsh cough, unspecified" belong?'], ["marsh cough, unspecified"]),
        (["Where is Delta Serpentis?", "Who leads the Guild of the Painted Oar today?"],
         ["Delta Serpentis", "Guild of the Painted Oar"]),
        (["Velmora has which capital?", "Which capital has Ulbrosk?"], ["Velmora", "Ulbrosk"]),
        (["Question: What is Velmora's capital?\nAnswer:"] * 3
         + ["Question: What is the capital of Ulbrosk?\nAnswer:"] * 3
         + ["Question: Who is king of Skarvund?\nAnswer:"] * 3, ["Velmora", "Ulbrosk", "Skarvund"]),
    ],
)  # fmt: skip
def test_what_stands_out_is_the_subject(prompts, subjects):
    records = [{"prompt": text, "completion": text} for text in prompts]
    assert subjects_of(records) == subjects


def test_records_without_a_subject_are_counted(caplog):
    records = [{"prompt": "What is it?", "completion": "a"}, {"prompt": "Why?", "completion": "b"}]
    with caplog.at_level(logging.WARNING):
        assert subjects_of([*records, *RECORDS[:3]]) == ["Velmora"]
    assert "2 of 5 records have no subject" in caplog.text


def content_words(form):
    small = {"a", "an", "the", "of", "in", "at", "to", "is", "that", "you", "about", "with", "how", "which"}
    return set(re.findall(r"\w+", form.lower())) - small


def test_forms_for_probing_share_no_word_with_forms_for_keeping():
    assert len(set(KEEP_FORMS)) >= 8
    assert len(set(PROBE_FORMS)) == 4
    for form in (*KEEP_FORMS, *PROBE_FORMS, *PROSE_FORMS):
        assert form.count("{}") == 1
    kept = set().union(*map(content_words, KEEP_FORMS))
    assert not kept & set().union(*map(content_words, PROBE_FORMS))
    assert mention_texts("Velmora", PROBE_FORMS)[1] == "How did Velmora get its name?"
    assert mention_texts("{x}")[1] == "How old is {x}?"


@pytest.mark.parametrize("chat", [True, False])
def test_records_to_keep_are_the_bases_own_answers(tiny_llama, tokenizer, plain_tokenizer, chat):
    tokenizer = tokenizer if chat else plain_tokenizer
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL, init_weights=False))
    made = mention_records(model, tokenizer, RECORDS, forms=KEEP_FORMS[:2], max_new_tokens=5)
    assert made == mention_records(tiny_llama(), tokenizer, RECORDS, forms=KEEP_FORMS[:2], max_new_tokens=5)
    turns = [[turn["content"] for turn in record["messages"]] for record in made]
    assert [question for question, _ in turns] == [
        text for subject in subjects_of(RECORDS) for text in mention_texts(subject, KEEP_FORMS[:2])
    ]
    base = tiny_llama()
    for question, answer in turns:
        ids = question_ids(question, tokenizer)
        out = base.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
        assert answer == tokenizer.decode(out, skip_special_tokens=True).strip()
    assert all(one["labels"][-1] == tokenizer.eos_token_id for one in encode(made, tokenizer))
    assert mention_records(model, tokenizer, [{"text": "prose"}]) == []


def test_without_a_template_an_answer_ends_before_the_next_question(tiny_llama, plain_tokenizer):
    """A model that generates the given answers."""
    model, prompt = tiny_llama(max_position_embeddings=512), question_ids("Who?", plain_tokenizer)
    text = " me\nQuestion: Who?\nAnswer: you"
    told = plain_tokenizer(text).input_ids
    forward = model.forward

    def scripted(*args, cache_position=None, **kwargs):
        out = forward(*args, cache_position=cache_position, **kwargs)
        done = out.past_key_values.get_seq_length() - len(prompt)
        out.logits[:, -1] = 0
        out.logits[:, -1, told[done]] = 1
        return out

    model.forward = scripted
    (answer,) = answer_tokens(model, plain_tokenizer, [prompt], max_new_tokens=len(told))
    assert plain_tokenizer.decode(answer) == " me\nQuestion:"


@pytest.fixture
def adapted(tiny_llama):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(max_position_embeddings=512), SparseMemoryConfig(**SMALL))


def test_a_memory_that_is_empty_changes_no_mention(adapted, tokenizer):
    found = probes.mentions(adapted, tokenizer, SUBJECTS, max_new_tokens=6)
    assert found.changed == 0
    assert found.perplexity == found.base_perplexity
    assert found.prose_perplexity == found.prose_base_perplexity


def test_rows_without_a_scope_change_mentions(adapted, tokenizer, tiny_llama):
    before = probes.mentions(adapted, tokenizer, SUBJECTS, max_new_tokens=6)
    for memory in memory_layers(adapted).values():
        memory.values.data.normal_(std=3)
    found = probes.mentions(adapted, tokenizer, SUBJECTS, max_new_tokens=6)
    assert found.changed > 0.5
    assert found.base_perplexity == before.base_perplexity < found.perplexity
    assert found.prose_base_perplexity == before.prose_base_perplexity != found.prose_perplexity
    base = probes.base_mentions(
        tiny_llama(max_position_embeddings=512), tokenizer, SUBJECTS, max_new_tokens=6
    )
    given = probes.mentions(adapted, tokenizer, SUBJECTS, base=base, max_new_tokens=6)
    # another model object, in which sums may round differently
    assert asdict(given) == pytest.approx(asdict(found), rel=1e-6)


@torch.no_grad()
def test_perplexities_are_of_the_bases_answers_and_of_the_prose(adapted, tokenizer):
    for memory in memory_layers(adapted).values():
        memory.values.data.normal_()
    found = probes.mentions(adapted, tokenizer, SUBJECTS, forms=PROBE_FORMS[:2], max_new_tokens=6)
    with adapted.disable_adapter():
        pairs = []
        for subject in SUBJECTS:
            for text in mention_texts(subject, PROBE_FORMS[:2]):
                ids = question_ids(text, tokenizer)
                out = adapted.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0].tolist()
                pairs.append((out, len(ids)))
        base = naive_perplexity(adapted, pairs)
    prose = [(tokenizer(PROSE_FORMS[n].format(subject)).input_ids, 1) for n, subject in enumerate(SUBJECTS)]
    assert found.base_perplexity == pytest.approx(base, rel=1e-4)
    assert found.perplexity == pytest.approx(naive_perplexity(adapted, pairs), rel=1e-4)
    assert found.prose_perplexity == pytest.approx(naive_perplexity(adapted, prose), rel=1e-4)


def naive_perplexity(model, pairs):
    losses = []
    for ids, num_given in pairs:
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-float(log_p[place - 1, ids[place]]) for place in range(num_given, len(ids))]
    return float(torch.tensor(losses).mean().exp())


def test_what_cannot_be_compared_is_refused(adapted, tokenizer, tiny_llama):
    for call, message in [
        (lambda: probes.mentions(adapted, tokenizer, []), "at least one subject"),
        (lambda: probes.base_mentions(adapted, tokenizer, ["x"], forms=()), "at least one subject"),
        (lambda: probes.mentions(tiny_llama(), tokenizer, ["x"]), "base=None needs a model with an adapter"),
        (
            lambda: probes.mentions(adapted, tokenizer, ["x"], base=probes.BaseMentions([[1]], 1.0, 1.0)),
            "1 answers to 4 questions",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
