import logging

import pytest
import torch
from peft import get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from sparsemem import SparseMemoryConfig, memory_layers, precision
from sparsemem.evaluation.likelihood import log_probs, split_tokens
from tiny import SMALL, VOCABULARY, tiny_model


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Comparisons with naive twins are made without autocast."""
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)


def drawn(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


CONTEXTS = drawn(9, 1, 23, 4, 12)
CONTINUATIONS = [drawn(3, 1, 7), drawn(2, 2), drawn(1), drawn(5, 9, 1, 4, 2), drawn(1, 1, 6)]


@torch.no_grad()
def naive(model, contexts=CONTEXTS, continuations=CONTINUATIONS):
    """A plain version of `log_probs`: one forward pass for each context with each continuation."""
    found = []
    for context, several in zip(contexts, continuations, strict=True):
        scores = []
        for one in several:
            # the last token predicts nothing
            ids = torch.tensor([context + one[:-1]])
            log_p = model(ids, use_cache=False).logits[0, len(context) - 1 :].log_softmax(-1)
            scores.append(log_p[range(len(one)), one])
        found.append(scores)
    return found


def assert_same(found, expected, tolerance=1e-5):
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gpt_oss"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("shared", [[], drawn(6)[0]])
def test_log_probs_are_those_of_whole_sequences(architecture, batch_size, shared):
    model, contexts = tiny_model(architecture), [shared + context for context in CONTEXTS]
    found = log_probs(model, contexts, CONTINUATIONS, batch_size=batch_size)
    assert_same(found, naive(model, contexts))


def test_a_beginning_is_read_once(monkeypatch):
    model, seen = tiny_model(), []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda input_ids, **kw: (seen.append(input_ids.numel()), forward(input_ids, **kw))[1],
    )
    contexts = [[*range(3, 33), n, n + 1] for n in (50, 60, 70, 80)]
    log_probs(model, contexts, [[[5, 6, 7], [8]]] * 4)
    assert seen == [30, 4 * 2, 4 * 2]


def test_a_window_that_slides_over_the_context():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}
    config = MistralConfig(vocab_size=VOCABULARY, num_hidden_layers=3, sliding_window=5, **sizes)
    model = MistralForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5)
    assert_same(log_probs(model, CONTEXTS, CONTINUATIONS, batch_size=3), naive(model))


def test_a_written_memory_reads_continuations_as_it_reads_texts():
    model = get_peft_model(tiny_model(), SparseMemoryConfig(**SMALL)).eval()
    for memory in memory_layers(model).values():
        memory.values.data.normal_()
    expected = naive(model)
    assert_same(log_probs(model, CONTEXTS, CONTINUATIONS, batch_size=3), expected)
    with model.disable_adapter():
        assert not torch.allclose(naive(model)[0][0], expected[0][0], atol=1e-2)


def test_a_context_that_does_not_fit_loses_its_beginning(caplog):
    model = tiny_model("gpt2")
    (context,), several = drawn(80), drawn(3, 10)
    with caplog.at_level(logging.WARNING):
        found = log_probs(model, [context], [several])
    assert "1 of 1 contexts" in caplog.text
    # 64 positions are room for 55 tokens and the nine that predict the rest of the longest continuation
    assert_same(found, naive(model, [context[-55:]], [several]))


def test_exact_is_without_autocast(monkeypatch):
    model = tiny_model()
    expected = log_probs(model, CONTEXTS, CONTINUATIONS, precision="float32")
    monkeypatch.setattr(precision, "fast_bf16", lambda device: True)
    rounded = log_probs(model, CONTEXTS, CONTINUATIONS)
    assert not torch.allclose(rounded[0][0], expected[0][0], atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(log_probs(model, CONTEXTS, CONTINUATIONS, precision="float32"), expected, tolerance=0)


@pytest.mark.parametrize(
    ("contexts", "continuations", "message"),
    [
        ([[3]], [], "0 lists for 1 contexts"),
        ([[]], [[[3]]], "item 0: context or continuation without a token"),
        ([[3], [4]], [[[3]], [[5], []]], "item 1: context or continuation without a token"),
        ([[3]], [[]], "item 0: context or continuation without a token"),
        ([[3]], [[[4] * 65]], "a continuation of 65 tokens, the model reads 64"),
    ],
)
def test_bad_arguments(contexts, continuations, message):
    with pytest.raises(ValueError, match=message):
        log_probs(tiny_model(), contexts, continuations)


def test_continuations_are_what_follows_the_contexts_own_tokens(plain_tokenizer):
    ids, several = split_tokens(plain_tokenizer, "Answer: ", ["A", "BC"])
    assert plain_tokenizer.decode(ids) == "Answer:"
    assert [plain_tokenizer.decode(one) for one in several] == [" A", " BC"]
