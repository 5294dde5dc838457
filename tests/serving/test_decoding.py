"""The running batch: a request gets what it gets alone, whoever joins and leaves beside it."""

import pytest
import torch
from peft import get_peft_model
from transformers import MambaConfig, MambaForCausalLM

from sparsemem import SparseMemoryConfig, precision
from sparsemem.adapter.layers import BASE_ROW
from sparsemem.serving.decoding import Decoder, Row, Sampling
from tiny import ARCHITECTURES, tiny_model

SIZES = {"num_keys": 8, "num_heads": 2, "top_k": 4, "key_dim": 8, "task_type": "CAUSAL_LM"}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [30, 31], [40, 41, 42, 43]]
NAMES: list[tuple[str, ...]] = [(), ("default",), ("b",), ("default", "b")]
GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True)
def _without_bf16(monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)


def two_memories(architecture):
    """A model with two memories whose rows are random, without scopes: they speak everywhere."""
    model = get_peft_model(tiny_model(architecture), SparseMemoryConfig(**SIZES))
    model.add_adapter("b", SparseMemoryConfig(**SIZES))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        if name.endswith(".values"):
            tensor.data = torch.randn(tensor.shape, generator=generator)
    return model.eval()


def alone(model, prompt, names, steps):
    """Greedy tokens by transformers' generate."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=[names or BASE_ROW],
        do_sample=False, max_new_tokens=steps, min_new_tokens=steps, eos_token_id=None, pad_token_id=2,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_join_and_leave_get_what_they_get_alone(architecture):
    model = two_memories(architecture)
    rows = [Row(list(prompt), names, GREEDY) for prompt, names in zip(PROMPTS, NAMES, strict=True)]
    decoder = Decoder(model)
    decoder.join(rows[:2])
    decoder.step()
    decoder.join(rows[2:])
    for _ in range(3):
        decoder.step()
    decoder.leave([rows[1]])
    for _ in range(3):
        decoder.step()
    assert [len(row.tokens) for row in rows] == [8, 5, 7, 7]
    for row in rows:
        assert row.tokens == alone(model, row.prompt, row.memories, len(row.tokens))
    assert len({tuple(alone(model, PROMPTS[0], names, 8)) for names in NAMES}) == 4


def test_the_batch_is_no_wider_than_its_longest_row():
    decoder = Decoder(tiny_model())
    long, short = Row(list(range(5, 25)), (), GREEDY), Row([5, 6], (), GREEDY)
    decoder.join([long, short])
    decoder.step()
    decoder.leave([long])
    assert decoder._mask.shape == (1, 3)
    decoder.step()
    assert decoder._cache.get_seq_length() == 4
    decoder.leave([short])
    assert decoder.rows == []


def test_a_seed_decides_the_answer_whoever_is_beside():
    model = tiny_model()

    def drawn(seed, others):
        decoder, row = Decoder(model), Row([5, 6, 7], (), Sampling(1.3, 0.9, seed))
        decoder.join([row, *(Row([9, 9], (), Sampling(1.0, 1.0, 77)) for _ in range(others))])
        for _ in range(9):
            decoder.step()
        return row.tokens

    assert drawn(1, 0) == drawn(1, 2)
    assert len({tuple(drawn(seed, 0)) for seed in range(4)}) > 1


def test_top_p_near_zero_is_the_likeliest_token():
    model = tiny_model()
    tokens = []
    for sampling in (GREEDY, Sampling(1.0, 1e-6, 0)):
        decoder, row = Decoder(model), Row([5, 6, 7], (), sampling)
        decoder.join([row])
        decoder.step()
        tokens.append(row.tokens)
    assert tokens[0] == tokens[1]


def test_a_model_without_a_plain_cache_is_refused():
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4)
    with pytest.raises(ValueError, match="MambaForCausalLM keeps a state that is not keys and values"):
        Decoder(MambaForCausalLM(config))
