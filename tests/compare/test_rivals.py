"""Rivals on a tiny random model: real PEFT adapters, a step of training each."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsemem.adapter.memories import memory_layers
from sparsemem.compare.recipes import demo, medical
from sparsemem.compare.recipes import demo as demo_methods
from sparsemem.compare.recipes import medical as medical_methods
from sparsemem.compare.recipes.rivals import (
    RIVALS,
    keep_near_base,
    rival_examples,
    rival_model,
    rival_settings,
    teach_gated_lora,
)
from sparsemem.training.finetune import finetune

RECORDS = [{"prompt": f"Name number {i}.", "completion": "ab"} for i in range(38)]
GENERAL = ["Some prose that is general.", "And some more of it.", *RECORDS[:2]]


@pytest.fixture
def loaded(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("method", RIVALS)
def test_each_rival_trains_what_it_says(method, loaded, monkeypatch):
    model, tokenizer = loaded
    if method == "shira":  # PEFT refuses more numbers than a tiny matrix has
        small = {**RIVALS[method].adapter, "r": 2}
        monkeypatch.setitem(RIVALS, method, replace(RIVALS[method], adapter=small))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total = sum(p.numel() for p in model.parameters())
    model = rival_model(method, model, seed=0)
    keep_near_base(method, model, GENERAL, tokenizer, seed=0)
    rival = RIVALS[method]
    done = finetune(
        model,
        rival_examples(method, RECORDS, GENERAL, tokenizer, seed=0),
        "peft" if rival.adapter else "full",
        tokenizer=tokenizer,
        lr=rival.lr,
        max_steps=2,
        batch_size=4,
    )
    assert done.steps == 2
    if not rival.adapter:
        assert done.trained_params == total
        assert any(not torch.equal(base[name], tensor) for name, tensor in done.model.state_dict().items())
        return
    assert 0 < done.trained_params < total
    if method != "osf":  # which keeps a decomposition in place of the weights
        held = done.model.state_dict()
        for name, tensor in base.items():
            candidates = [t for key, t in held.items() if key.replace(".base_layer", "").endswith(name)]
            assert any(torch.equal(tensor, candidate) for candidate in candidates), name


def test_replay_makes_general_text_every_twentieth_record(loaded):
    _, tokenizer = loaded
    plain = rival_examples("lora-1e-4", RECORDS, GENERAL, tokenizer, seed=0)
    mixed = rival_examples("lora-replay", RECORDS, GENERAL, tokenizer, seed=0)
    assert len(plain) == 38
    assert len(mixed) == 40


def test_divergence_is_zero_at_first_and_raises_the_loss_later(loaded):
    model, tokenizer = loaded
    model = rival_model("lora-kl", model, seed=0).train()
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, 7, 8]])}
    before = model(**batch).loss.item()
    keep_near_base("lora-kl", model, GENERAL, tokenizer, seed=0)
    assert model(**batch).loss.item() == pytest.approx(before, abs=1e-6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    with_divergence = model(**batch).loss
    model.eval()
    assert with_divergence.item() > model(**batch).loss.item()
    with_divergence.backward()


def test_settings_of_a_rival_are_its_own():
    chosen = demo_methods.DemoSettings()
    held = demo_methods.method_settings(chosen, "lora-kl")
    assert held["rival"] == rival_settings("lora-kl")["rival"]
    assert "lr" not in held["teaching"]
    assert json.loads(json.dumps(held)) == held
    assert medical_methods.method_settings(medical.SETTINGS, "osf")["rival"]["adapter"]["peft_type"] == "OSF"
    usual = (("base", "learn", "lora", "full"), ("base", "smf", "lora", "full"))
    for recipe, methods in zip((demo.recipe(model="x"), medical.recipe(model="x")), usual, strict=True):
        assert set(RIVALS) <= set(recipe.others)
        assert recipe.methods == methods
        assert all(recipe.stages(method)["teach"] for method in RIVALS)


def test_gated_lora_trains_maps_behind_the_gate_and_nothing_else(loaded):
    model, tokenizer = loaded
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taught, costs = teach_gated_lora(
        model, RECORDS, tokenizer=tokenizer, background=GENERAL, batch_size=4, seed=0, rank=2, steps=3
    )
    memories = memory_layers(taught)
    assert costs["trained_params"] == sum(2 * (m.d_in + m.d_out) for m in memories.values())
    assert costs["samples"] == 12
    assert any(memory.low_rank[1].weight.any() for memory in memories.values())
    assert not any(memory.values.any() for memory in memories.values())
    held = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): t
        for name, t in taught.state_dict().items()
    }
    assert all(torch.equal(tensor, held[name]) for name, tensor in base.items() if name in held)
    assert sum(name in held for name in base) > len(base) / 2
