"""The general text that ships with the package."""

import builtins

from sparsemem.compare.recipes import questions
from sparsemem.data.general import general_background, prose
from sparsemem.data.records import encode, read_records


def test_it_is_questions_and_prose_and_needs_no_extra(monkeypatch, tokenizer):
    real = builtins.__import__

    def without_extras(name, *args, **kwargs):
        assert name.partition(".")[0] not in ("countryinfo", "simple_icd_10_cm")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_extras)
    records = general_background()
    assert records == general_background() == read_records(records, mixed=True)
    chats = [one for one in records if "messages" in one]
    pieces = [one["text"] for one in records if "text" in one]
    assert (len(chats), len(pieces), len(records)) == (296, 12, 308)
    assert all(len(piece) == 1000 for piece in pieces)
    assert len(set(pieces)) == 12
    assert all(piece in prose()[0] for piece in pieces)
    assert len(encode(records, tokenizer)) == 308


def test_no_recipe_probes_what_it_asks():
    asked = {one["messages"][0]["content"] for one in general_background() if "messages" in one}
    assert len(asked) == 296
    probed = [*questions.general_items(), *questions.capital_items()]
    probed += [*questions.recall_items("train"), *questions.recall_items("heldout")]
    assert not asked & {item["question"] for item in probed}
