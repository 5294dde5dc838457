"""Labelled questions for the question key: enough of them, well formed, the same each time."""

import json
import re
from collections import Counter

import pytest

from sparsemem.data.forms import EMBEDDED, TYPED, form_samples
from sparsemem.data.records import prompt_ids
from sparsemem.data.wordings import forms

RELATIONS = {r: wordings for of_kind in forms()["forms"].values() for r, wordings in of_kind.items()}


def test_there_are_many_relations_with_four_wordings_or_more():
    wordings = [w for all_of in RELATIONS.values() for w in all_of]

    assert len(RELATIONS) == sum(map(len, forms()["forms"].values())) >= 150
    assert all(len(all_of) >= 4 for all_of in RELATIONS.values())
    assert len(set(wordings)) == len(wordings)
    assert all(w.count("{}") == 1 for w in wordings)


def test_names_are_of_the_kinds_of_the_forms():
    names = [name for of_kind in forms()["names"].values() for name in of_kind]

    assert forms()["names"].keys() == forms()["forms"].keys()
    assert len(set(names)) == len(names) >= 300


def test_no_wording_or_name_is_in_the_data_that_is_measured_on(shared_data):
    asked = set()
    for file, fields in {
        "pokemqa.jsonl": ["questions"],
        "zsre.jsonl": ["src", "rephrase"],
        "counterfact.jsonl": ["prompt", "rephrase_prompt"],
    }.items():
        for line in (shared_data / file).read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            for field in fields:
                texts = item[field] if isinstance(item[field], list) else [item[field]]
                asked |= {_plain(text.replace(item["subject"], "{}")) for text in texts}

    assert not {w for all_of in RELATIONS.values() for w in all_of if _plain(w) in asked}


def test_samples_are_the_same_each_time_and_other_with_another_seed(tokenizer):
    first = form_samples(tokenizer, relations=20)

    assert form_samples(tokenizer, relations=20) == first
    assert form_samples(tokenizer, relations=20, seed=1) != first


def test_samples_have_every_relation_and_variant_in_the_given_shares(tokenizer):
    samples = form_samples(tokenizer, names=2, per_name=2, embedded=0.6, typed=0.2)

    found = Counter(sample.variant for sample in samples)
    assert {sample.relation for sample in samples} == RELATIONS.keys()
    assert found.keys() == {"bare", *TYPED, *EMBEDDED}
    assert found["bare"] / len(samples) == pytest.approx(0.6, abs=0.05)
    assert sum(found[v] for v in set(EMBEDDED)) / len(samples) == pytest.approx(0.3, abs=0.05)


def test_many_relations_are_asked_about_each_name_and_each_fact_in_several_wordings(tokenizer):
    samples = form_samples(tokenizer, relations=100)

    facts = Counter((sample.relation, sample.name) for sample in samples)
    assert all(count >= 3 for count in facts.values())
    assert len(facts) / len({name for _, name in facts}) >= 4


def test_fewer_relations_are_the_first(tokenizer):
    assert {sample.relation for sample in form_samples(tokenizer, relations=20)} == set([*RELATIONS][:20])


def test_a_bare_sample_is_the_prompt_as_users_write_it(tokenizer):
    bare = [s for s in form_samples(tokenizer, relations=40) if s.variant == "bare"]

    asked = {
        tuple(prompt_ids(w.replace("{}", s.name), tokenizer)) for s in bare for w in RELATIONS[s.relation]
    }
    assert {tuple(s.ids) for s in bare} <= asked


def test_without_a_chat_template_half_of_the_prompts_are_text_to_be_continued(plain_tokenizer):
    samples = form_samples(plain_tokenizer, names=1, embedded=0, typed=0)

    marked = [plain_tokenizer.decode(sample.ids).startswith("Question:") for sample in samples]
    assert sum(marked) / len(marked) == pytest.approx(0.5, abs=0.06)


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.replace("{}", " zz ")).strip().lower()
