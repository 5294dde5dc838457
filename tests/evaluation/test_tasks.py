import json

import pytest
import torch

from sparsemem import precision
from sparsemem.data.records import encode, prompt_ids
from sparsemem.evaluation.items import read_items
from sparsemem.evaluation.probes import complete, contains, perplexity
from sparsemem.evaluation.tasks import (
    TRIVIAQA_TOKENS,
    evaluate,
    medmcqa_prompt,
    medmcqa_text,
    medmcqa_tokens,
    triviaqa_prompt,
)
from tiny import tiny_model

RECORD = {"question": "Which nerve?", "opa": "Ulnar", "opb": "Median", "opc": "Radial", "opd": "Vagus"}
PROMPT = "Medical exam question:\nQuestion: Which nerve?\nA. Ulnar\nB. Median\nC. Radial\nD. Vagus\nAnswer:"


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Comparisons with naive twins are made without autocast."""
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_medmcqa_prompt_and_training_text(tmp_path):
    told = [{**RECORD, "cop": 1, "exp": "Carpal tunnel."}, {**RECORD, "cop": 1, "exp": None}]
    items = read_items("medmcqa", lines(tmp_path / "m.jsonl", [*told, {**RECORD, "cop": 3}]))
    assert {medmcqa_prompt(item) for item in items} == {PROMPT}
    assert [medmcqa_text(item) for item in items] == [
        PROMPT + " B. Median\nExplanation: Carpal tunnel.",
        PROMPT + " B. Median",
        PROMPT + " D. Vagus",
    ]
    generic = {"question": "Which nerve?", "choices": ["Ulnar", "Median", "Radial", "Vagus"], "answer": 1}
    file = lines(tmp_path / "g.jsonl", [{**generic, "explanation": "Carpal tunnel."}])
    assert medmcqa_text(read_items("medmcqa", file)[0]) == medmcqa_text(items[0])


@torch.no_grad()
def test_medmcqa_is_the_mean_over_the_option_with_its_letter(tiny_llama, tokenizer, tmp_path):
    """The prompt is plain text, although the tokenizer has a chat template."""
    model = tiny_llama()
    names = ("opa", "opb", "opc", "opd")
    records = [{**RECORD, names[n % 4]: "x" * (1 + n), "cop": n % 3} for n in range(9)]
    items = read_items("medmcqa", lines(tmp_path / "m.jsonl", records))
    by_mean, by_sum = [], []
    for item in items:
        scores, num = [], len(tokenizer(medmcqa_prompt(item)).input_ids)
        for letter, choice in zip("ABCD", item["choices"], strict=True):
            ids = tokenizer(f"{medmcqa_prompt(item)} {letter}. {choice}").input_ids
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(log_p[range(num - 1, len(ids) - 1), ids[num:]])
        by_mean.append(int(torch.stack([one.mean() for one in scores]).argmax()) == item["answer"])
        by_sum.append(int(torch.stack([one.sum() for one in scores]).argmax()) == item["answer"])
    found = evaluate(model, tokenizer, "medmcqa", items=items)
    assert found.correct == by_mean
    assert found.metrics == {"acc": sum(by_mean) / 9, "acc_sum": sum(by_sum) / 9}
    assert found.n == 9
    assert by_mean != by_sum


def test_wikitext_is_lines_with_blank_lines_between_them(tiny_llama, tokenizer, tmp_path):
    text = " = Title = \n\n First line . \nSecond\n \n"
    (tmp_path / "w.txt").write_text(text)
    records = [{"text": line + "\n"} for line in text.split("\n")]
    for file in (tmp_path / "w.txt", lines(tmp_path / "w.jsonl", records)):
        assert read_items("wikitext", file) == "= Title =\n\nFirst line .\n\nSecond"
        assert read_items("wikitext", file, limit=2) == "= Title =\n\nFirst line ."
    assert read_items("perplexity", tmp_path / "w.txt") == text
    model = tiny_llama()
    found = evaluate(model, tokenizer, "wikitext", items=read_items("wikitext", tmp_path / "w.txt"))
    ids = torch.tensor(tokenizer("= Title =\n\nFirst line .\n\nSecond").input_ids)
    assert (found.n, found.correct) == (len(ids), None)
    assert found.metrics == {"ppl": pytest.approx(perplexity(model, ids, precision="float32"))}


@pytest.mark.parametrize("kind", ["bos_tokenizer", "plain_bos_tokenizer"])
def test_tasks_read_the_tokens_that_training_reads(kind, request):
    bos_tokenizer = request.getfixturevalue(kind)
    model = tiny_model("llama").eval()
    (text,) = encode([{"text": "Prose of a line."}], bos_tokenizer)
    bos, *ids = text["input_ids"]
    expected = perplexity(model, torch.tensor(ids), opening=[bos], precision="float32")
    found = evaluate(model, bos_tokenizer, "perplexity", items="Prose of a line.")
    assert found.metrics == {"ppl": pytest.approx(expected)}
    whole = torch.tensor([text["input_ids"]])
    with torch.no_grad():
        assert expected == pytest.approx(float(model(whole, labels=whole).loss.exp()))
    item = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2}
    prompt, options = medmcqa_tokens(item, bos_tokenizer)
    (record,) = encode([{"text": medmcqa_text(item)}], bos_tokenizer)
    assert record["input_ids"] == prompt + options[2]


def trivia(num):
    return [{"question": f"Who is {n}?", "answers": [f"A{n}", f"Mr {n}"]} for n in range(num)]


def test_worked_examples_come_from_the_end_and_are_never_asked(tmp_path):
    # the first question is also an example
    file = lines(tmp_path / "t.jsonl", [{"question": "Who is 4?", "answers": ["A"]}, *trivia(5)])
    asked = read_items("triviaqa", file, num_fewshot=2)
    assert [item["question"] for item in asked] == ["Who is 0?", "Who is 1?", "Who is 2?"]
    examples = "Question: Who is 3?\nAnswer: A3\n\nQuestion: Who is 4?\nAnswer: A4\n\n"
    assert triviaqa_prompt(asked[0]) == examples + "Question: Who is 0?\nAnswer:"
    assert read_items("triviaqa", file, num_fewshot=2, limit=2) == asked[:2]
    assert triviaqa_prompt(read_items("triviaqa", file, limit=1)[0]) == "Question: Who is 4?\nAnswer:"


def test_worked_examples_of_the_hub_are_of_the_training_split(monkeypatch):
    shown = [{"question": f"T{n}", "answer": {"aliases": ["x"]}} for n in "ab"]
    splits = {"validation": trivia(3), "train[:2]": shown}
    monkeypatch.setattr("datasets.load_dataset", lambda _name, _config, split: splits[split])
    asked = read_items("triviaqa", num_fewshot=2)
    assert [item["question"] for item in asked] == ["Who is 0?", "Who is 1?", "Who is 2?"]
    assert [example["question"] for example in asked[0]["examples"]] == ["Ta", "Tb"]


@pytest.mark.parametrize("form", ["plain", "examples", "chat"])
def test_triviaqa_asks_in_three_ways(tiny_llama, tokenizer, tmp_path, form):
    model = tiny_llama(max_position_embeddings=512)
    file = lines(tmp_path / "t.jsonl", trivia(7))
    items = read_items("triviaqa", file, num_fewshot=2 if form == "examples" else 0)
    if form == "chat":
        prompts = [prompt_ids(item["question"], tokenizer) for item in items]
    else:
        prompts = [tokenizer(triviaqa_prompt(item)).input_ids for item in items]
    told = complete(model, tokenizer, prompts, max_new_tokens=TRIVIAQA_TOKENS, precision="float32")
    if form == "examples":
        told = [text.split("\n")[0].strip() for text in told]
    # make every other answer right
    for item, text in list(zip(items, told, strict=True))[::2]:
        item["answer"] = ["surely not this", text[1:6]]
    found = evaluate(model, tokenizer, "triviaqa", items=items, chat=form == "chat")
    assert found.correct == [contains(text, item["answer"]) for text, item in zip(told, items, strict=True)]
    assert found.metrics == {"contains_acc": sum(found.correct) / len(items)}
    assert 0 < sum(found.correct) < len(items)


def test_chat_needs_a_template(tiny_llama, plain_tokenizer):
    items = [{"question": "Who?", "answer": ["x"]}]
    with pytest.raises(ValueError, match="needs a chat template"):
        evaluate(tiny_llama(), plain_tokenizer, "triviaqa", items=items, chat=True)


def test_the_shared_benchmarks_can_be_read(shared_data):
    assert len(read_items("medmcqa", shared_data / "medmcqa_dev.jsonl")) == 4183
    assert len(read_items("triviaqa", shared_data / "triviaqa.jsonl", num_fewshot=5)) == 995
    assert len(read_items("wikitext", shared_data / "wikitext2_raw_test.txt", limit=10).split("\n\n")) == 10
