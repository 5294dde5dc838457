"""The question key of a model: of its states alone, the same each time, fitted once."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model

from sparsemem import SparseMemoryConfig
from sparsemem.background.question_key import key_layers, load_question_key
from sparsemem.data.asked import answer_starts, fit_question_key, question_key
from sparsemem.data.forms import form_samples


@pytest.fixture
def base(tiny_llama):
    return tiny_llama()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path))
    return tmp_path / "question-keys"


def test_states_are_those_of_each_prompt_alone(base, tokenizer):
    samples = form_samples(tokenizer, names=1, relations=6)
    layers = ["model.layers.1.mlp", "model.layers.3.mlp"]
    seen = {}
    for name in layers:
        base.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.__setitem__(name, args[0])
        )

    states = answer_starts(base, samples, layers)

    for sample, state in zip(samples, states, strict=True):
        with torch.no_grad():
            base(input_ids=torch.tensor([sample.ids]))
        alone = torch.cat([seen[name][0, -1] for name in layers])
        torch.testing.assert_close(state, alone, atol=2e-2, rtol=2e-2)


def test_a_key_is_the_same_for_the_same_model(base, tokenizer):
    first = fit_question_key(base, tokenizer, key_layers(base))
    again = fit_question_key(base, tokenizer, key_layers(base))

    assert torch.equal(first.projection, again.projection)
    assert torch.equal(first.mean, again.mean)
    assert first.least == again.least
    assert -1 < first.least < 1
    assert first.projection.shape[1] < 32


def test_an_adapter_changes_nothing(tiny_llama, tokenizer):
    base = tiny_llama()
    plain = fit_question_key(base, tokenizer, key_layers(base))
    config = SparseMemoryConfig(write="own", init_weights=False, num_keys=8, key_dim=8, num_heads=2, top_k=4)

    key = fit_question_key(get_peft_model(base, config), tokenizer, key_layers(base))

    assert torch.equal(key.projection, plain.projection)


def test_a_base_model_without_a_chat_template_has_a_key(base, plain_tokenizer):
    assert fit_question_key(base, plain_tokenizer, key_layers(base)).projection.isfinite().all()


def test_a_key_is_fitted_once_per_named_model_and_then_read_from_the_cache(base, tokenizer, cache, caplog):
    base.config.name_or_path = "some/model"
    with caplog.at_level(logging.INFO):
        fitted = question_key(base, tokenizer, key_layers(base))
        read = question_key(base, tokenizer, key_layers(base))

    assert caplog.text.count("fitting what is asked") == 1
    assert torch.equal(read.projection, fitted.projection)
    assert read.least == fitted.least
    question_key(base, tokenizer, key_layers(base)[:1])
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_two_that_ask_at_once_fit_once(tiny_llama, tokenizer, cache, caplog):
    bases = [tiny_llama(), tiny_llama()]
    for base in bases:
        base.config.name_or_path = "some/model"

    with caplog.at_level(logging.INFO), ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda base: question_key(base, tokenizer, key_layers(base)), bases)

    assert caplog.text.count("fitting what is asked") == 1
    assert torch.equal(one.projection, two.projection)


def test_a_model_without_a_name_leaves_no_file(base, tokenizer, cache):
    question_key(base, tokenizer, key_layers(base))

    assert not cache.exists()


def test_a_damaged_file_is_made_again(base, tokenizer, cache, caplog):
    base.config.name_or_path = "some/model"
    fitted = question_key(base, tokenizer, key_layers(base))
    (file,) = cache.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 255
    file.write_bytes(content)

    again = question_key(base, tokenizer, key_layers(base))

    assert "made again" in caplog.text
    assert torch.equal(again.projection, fitted.projection)
    assert torch.equal(load_question_key(file).projection, fitted.projection)
