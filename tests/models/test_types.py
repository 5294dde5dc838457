"""The types of causal language models that people use most; `make models` tries all that transformers has."""

import json

import pytest
from checks import examine

USED_MOST = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "opt",
    "bloom",
    "falcon",
    "falcon_h1",
    "mamba",
    "deepseek_v3",
    "granite",
    "olmo",
    "cohere2",
    "qwen2_5_vl",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", USED_MOST)
def test_a_memory_works_in_the_types_that_are_used_most(name, monkeypatch):
    # random states say little of what is asked, so few relations will do
    monkeypatch.setattr("sparsemem.data.asked.LEAST_RELATIONS", 6)
    found = examine(name, quick=True)
    failed = {
        f"{part}: {key}": result
        for part in ("last", "learn")
        for key, result in (found[part] if isinstance(found[part], dict) else {"": found[part]}).items()
        if not result.startswith("ok")
    }
    assert not failed, json.dumps(failed, indent=1)


@pytest.mark.parametrize("name", ["t5", "bart-seq2seq"])
def test_an_encoder_decoder_model_is_refused(name):
    found = examine(name, quick=True)
    for told in (found["last"]["insert"], found["learn"]):
        assert told.startswith("refused (model:")
        assert "is an encoder-decoder model" in told
