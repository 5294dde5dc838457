import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparsemem import SparseMemoryConfig, calibrate, memory_layers, precision, set_scope
from sparsemem.cli.chat import converse
from sparsemem.data import models
from sparsemem.data.records import batches, choice_prompt, encode, prompt_ids
from sparsemem.evaluation import probes


def taught_by_heart(model, tokenizer, text):
    ids = torch.tensor([tokenizer(text).input_ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


QUESTIONS = [{"question": "x" * n, "answer": "y"} for n in (3, 17, 1, 8, 30)]


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Comparisons with naive twins are made without autocast."""
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)


def test_recall_is_greedy_decoding_whatever_the_batch(tiny_llama, tokenizer):
    model = tiny_llama()
    naive = []
    for item in QUESTIONS:
        ids = prompt_ids(item["question"], tokenizer)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        answer = ids[len(prompt_ids(item["question"], tokenizer)) :]
        naive.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    for batch_size in (1, 2, 64):
        found = probes.recall(model, tokenizer, QUESTIONS, max_new_tokens=6, batch_size=batch_size)
        assert found.texts == naive
    assert found.correct == [probes.is_right(text, "y") for text in naive]
    assert found.share == sum(found.correct) / 5


def test_without_a_template_an_answer_ends_at_the_next_question(tiny_llama, plain_tokenizer):
    said = "Question: Hi?\nAnswer: Ho\nQuestion: Who?\nAnswer: He"
    model = taught_by_heart(tiny_llama(), plain_tokenizer, said)
    found = probes.recall(model, plain_tokenizer, [{"question": "Hi?", "answer": "Ho"}], max_new_tokens=24)
    assert (found.texts, found.correct) == (["Ho"], [True])
    told = []
    converse(model, plain_tokenizer, ["Hi?"], told.append, max_new_tokens=24)
    assert "".join(told).split("\n") == [" Ho", "", ""]


@torch.no_grad()
def test_multiple_choice_is_the_likelihood_of_the_option(tiny_llama, tokenizer):
    model = tiny_llama()
    items = [
        {"question": "q" * n, "choices": ["a", "long one", "zz"], "answer": n % 3} for n in (1, 9, 4, 2, 5)
    ]
    best_sum, best_mean = [], []
    for item in items:
        scores = []
        for choice in item["choices"]:
            prompt, option = prompt_ids(choice_prompt(item), tokenizer), tokenizer(choice).input_ids
            log_p = model(torch.tensor([prompt + option])).logits[0].log_softmax(-1)
            scores.append(log_p[range(len(prompt) - 1, len(prompt) + len(option) - 1), option])
        best_sum.append(max(range(3), key=lambda index: float(scores[index].sum())))
        best_mean.append(max(range(3), key=lambda index: float(scores[index].mean())))
    found = probes.multiple_choice(model, tokenizer, items, batch_size=4)
    right = [item["answer"] for item in items]
    assert found.correct == [a == b for a, b in zip(best_mean, right, strict=True)]
    assert found.correct_by_sum == [a == b for a, b in zip(best_sum, right, strict=True)]
    assert (found.share, found.share_by_sum) == (sum(found.correct) / 5, sum(found.correct_by_sum) / 5)


def test_a_stop_ends_a_completion_there(tiny_llama, tokenizer):
    model = tiny_llama(seed=3)
    prompts = [prompt_ids(item["question"], tokenizer) for item in QUESTIONS]
    whole = probes.complete(model, tokenizer, prompts, max_new_tokens=12)
    stop = next(text[3] for text in whole if len(text) > 5 and text[3].isascii())
    stopped = probes.complete(model, tokenizer, prompts, max_new_tokens=12, stop=stop)
    assert stopped == [text.split(stop)[0].strip() for text in whole]
    assert stopped != whole


@pytest.mark.parametrize(("length", "window", "stride"), [(50, 16, 8), (50, 16, 16), (16, 16, 4), (9, 16, 8)])
@torch.no_grad()
def test_perplexity_weighs_windows_by_their_new_tokens(tiny_llama, length, window, stride):
    model, ids = tiny_llama(), torch.randint(2, 200, (length,))
    total, done = 0.0, 0
    for start in range(0, length, stride):
        end = min(start + window, length)
        labels = ids[start:end].clone()
        labels[: done - start] = -100
        total += float(model(ids[None, start:end], labels=labels[None]).loss) * (end - done)
        done = end
        if end == length:
            break
    found = probes.perplexity(model, ids, window=window, stride=stride)
    assert found == pytest.approx(float(torch.tensor(total / length).exp()), rel=1e-5)


@pytest.mark.parametrize(("length", "window", "stride"), [(50, 16, 8), (50, 16, 16), (9, 16, 8)])
@torch.no_grad()
def test_every_window_of_perplexity_and_drift_begins_with_the_opening(tiny_llama, length, window, stride):
    model, other, ids = tiny_llama(0), tiny_llama(1), torch.randint(2, 200, (length,))
    opening, total, done = torch.tensor([1]), 0.0, 0
    for start in range(0, length, min(stride, window - 1)):
        end = min(start + window - 1, length)
        labels = torch.cat([torch.tensor([-100]), ids[start:end]])
        labels[1 : 1 + done - start] = -100
        read = torch.cat([opening, ids[start:end]])
        total += float(model(read[None], labels=labels[None]).loss) * (end - done)
        done = end
        if end == length:
            break
    found = probes.perplexity(model, ids, window=window, stride=stride, opening=[1])
    assert found == pytest.approx(float(torch.tensor(total / length).exp()), rel=1e-5)
    p, q = (
        torch.cat([m(torch.cat([opening, part])[None]).logits[0, 1:] for part in ids.split(8)]).softmax(-1)
        for m in (model, other)
    )
    expected = float((p * (p / q).log()).sum() / length)
    assert probes.drift(other, model, ids, window=8, opening=[1]) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_drift_is_the_divergence_per_token(tiny_llama):
    base, other, ids = tiny_llama(0), tiny_llama(1), torch.randint(2, 200, (20,))
    p, q = (torch.cat([m(part[None]).logits[0] for part in ids.split(8)]).softmax(-1) for m in (base, other))
    expected = float((p * (p / q).log()).sum() / 20)
    assert probes.drift(other, base, ids, window=8) == pytest.approx(expected, rel=1e-4)
    assert probes.drift(base, base, ids) == 0


def test_drift_of_an_adapter_is_from_the_model_without_it(tiny_llama):
    adapted = get_peft_model(tiny_llama(), LoraConfig(init_lora_weights=False))
    ids = torch.randint(2, 200, (20,))
    assert probes.drift(adapted, None, ids) == probes.drift(adapted, tiny_llama(), ids) > 0


def test_bad_arguments(tiny_llama, tokenizer):
    model, ids = tiny_llama(), torch.arange(5)
    for call, message in [
        (lambda: probes.recall(model, tokenizer, []), "items is empty"),
        (lambda: probes.multiple_choice(model, tokenizer, []), "items is empty"),
        (lambda: probes.perplexity(model, ids[:1]), "two or more tokens"),
        (lambda: probes.perplexity(model, ids, window=4, stride=5), "stride=5"),
        (lambda: probes.perplexity(model, ids, window=2, stride=1, opening=[1, 1]), "window=2"),
        (lambda: probes.drift(model, None, ids), "base=None"),
        (lambda: probes.drift(model, model, ids[None]), "one dimension"),
        (lambda: probes.exposure(model, ["x"], tokenizer), "no active sparse memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_exposure_and_gate_of_what_was_taught(tiny_llama, tokenizer):
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(num_keys=4, top_k=2, key_dim=8))
    general = encode([{"text": f"{n} plain words, number {n * n}."} for n in range(20)], tokenizer)
    background = calibrate(model, batches(general, 4, 0))
    taught = batches(encode([{"prompt": "Velmora?", "completion": "Ostrinth"}] * 2, tokenizer), 2, 0)
    assert probes.exposure(model, ["Velmora?"], tokenizer) == 0
    for memory in memory_layers(model).values():
        memory.values.data.normal_()
    assert probes.exposure(model, "Velmora?", tokenizer) == 1
    set_scope(model, taught, background)
    gates = probes.scope_gate(model, taught[0])
    assert list(gates) == list(memory_layers(model))[-1:]
    predicts = (taught[0]["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    for g in gates.values():
        assert g.shape == taught[0]["input_ids"].shape
        assert (g[predicts] > 0.9).all()
    assert probes.exposure(model, ["1 plain words"], tokenizer) < 1


@pytest.mark.slow
def test_smollm2_knows_capitals():
    model, tokenizer = models.load_base("smollm2")
    pairs = {"France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Italy": "Rome"}
    items = [{"question": f"What is the capital of {land}?", "answer": city} for land, city in pairs.items()]
    assert probes.recall(model, tokenizer, items).share >= 0.75
