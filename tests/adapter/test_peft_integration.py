"""What users do with LoRA in PEFT, transformers and TRL, tested with a sparse memory."""

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from sparsemem import RowAdamW, SparseMemoryConfig, calibrate, memory_layers, set_scope
from tiny import ARCHITECTURES, checkpoint, tiny_batch, tiny_model

SMALL = {"num_keys": 8, "num_heads": 2, "top_k": 4, "key_dim": 8, "task_type": "CAUSAL_LM"}
RANDOM = {**SMALL, "init_weights": False}
EVERYWHERE = pytest.mark.parametrize("architecture", ARCHITECTURES)


@torch.no_grad()
def logits(model, batch=None):
    return model(**(tiny_batch() if batch is None else batch)).logits


def with_memory(architecture="llama", base=None, **fields):
    base = tiny_model(architecture) if base is None else base
    return get_peft_model(base, SparseMemoryConfig(**{**RANDOM, **fields})).eval()


def training_batch(seed=0):
    batch = tiny_batch(4, 9, seed)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def with_scope(architecture="llama"):
    """A model with a calibrated memory that has a scope and random rows."""
    model = get_peft_model(tiny_model(architecture), SparseMemoryConfig(**SMALL))
    background = calibrate(model, [tiny_batch(8, 12, seed) for seed in (5, 6)])
    set_scope(model, [training_batch()], background)
    for memory in memory_layers(model).values():
        torch.nn.init.normal_(memory.values)
    return model.eval()


def assert_same_memory(model, other, batch):
    """Memory tensors are bit-identical. Logits may differ slightly, as mapped tensors are not aligned."""
    for mine, theirs in zip(memory_layers(model).values(), memory_layers(other).values(), strict=True):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], tensor), name
    torch.testing.assert_close(logits(other, batch), logits(model, batch), atol=1e-5, rtol=0)


@pytest.fixture
def base_folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


# Saving and loading


@EVERYWHERE
@pytest.mark.parametrize("make", [with_memory, with_scope])
def test_a_saved_adapter_gives_the_same_logits_to_the_bit(make, architecture, tmp_path):
    """Law 10."""
    model = make(architecture)
    batch = training_batch()
    before = logits(model, batch)
    assert not torch.equal(before, logits(tiny_model(architecture), batch))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    assert torch.equal(logits(loaded, batch), before)
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(get_peft_model_state_dict(loaded)[name], tensor), name


@pytest.mark.parametrize("safe", [True, False])
def test_file_formats(safe, tmp_path):
    model = with_scope()
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / ("adapter_model.safetensors" if safe else "adapter_model.bin")).exists()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


@pytest.mark.parametrize("option", ["values", "values+scale", "memory"])
def test_loaded_to_train_on(option, tmp_path):
    with_memory(trainable=option).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert model.peft_config["default"].trainable == option
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert ("values" in names, "scale" in names, "keys" in names) == (
        True,
        option != "values",
        option == "memory",
    )


def test_only_the_rows_train_after_the_whole_memory_did(tmp_path):
    model = with_memory(trainable="memory")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable": "values"}))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert {n.rpartition(".")[2] for n, p in loaded.named_parameters() if p.requires_grad} == {"values"}


def test_low_cpu_mem_usage(tmp_path):
    model = with_scope()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=True)
    assert_same_memory(model, loaded, training_batch())
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    loaded.set_adapter("other")
    assert_same_memory(model, loaded, training_batch())
    assert {t.device.type for t in loaded.state_dict().values()} == {"cpu"}


def test_auto_peft_model(base_folder, tmp_path):
    model = with_memory(base=AutoModelForCausalLM.from_pretrained(base_folder))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_several_adapters_saved_and_loaded(tmp_path):
    model = with_memory(layers_to_transform=[1])
    model.add_adapter("second", SparseMemoryConfig(**{**RANDOM, "num_keys": 6}))
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.load_adapter(tmp_path / "second", "second").missing_keys == []
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), second)


def test_modules_to_save_are_saved_with_the_adapter(tmp_path):
    model = with_memory(modules_to_save=["lm_head"])
    torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save.default.weight)
    model.save_pretrained(tmp_path)
    assert any("lm_head" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


@pytest.mark.parametrize("upcast", [True, False])
def test_a_bfloat16_base_keeps_the_saved_memory(upcast, tmp_path):
    model = with_scope()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model().bfloat16(), tmp_path, autocast_adapter_dtype=upcast)
    for name, memory in memory_layers(model).items():
        other = memory_layers(loaded)[name]
        assert torch.equal(other.values, memory.values if upcast else memory.values.bfloat16())
        assert torch.equal(other.keys, memory.keys)
        assert torch.equal(other.scope_centres, memory.scope_centres)
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(
        tiny_model().bfloat16(), tmp_path / "again", autocast_adapter_dtype=upcast
    )
    assert torch.equal(logits(again), logits(loaded))


def test_the_wrong_shape_is_refused(tmp_path):
    with_memory().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch for"):
        PeftModel.from_pretrained(
            tiny_model(), tmp_path, config=SparseMemoryConfig(**{**RANDOM, "num_keys": 9})
        )


# transformers' own adapter methods


@EVERYWHERE
def test_transformers_loads_a_saved_adapter(architecture, tmp_path):
    model = with_scope(architecture)
    model.save_pretrained(tmp_path)
    native = tiny_model(architecture)
    native.load_adapter(str(tmp_path))
    batch = training_batch()
    assert_same_memory(model, native, batch)
    native.disable_adapters()
    assert torch.equal(logits(native, batch), logits(tiny_model(architecture), batch))
    native.enable_adapters()
    assert_same_memory(model, native, batch)


def test_transformers_adds_switches_and_deletes_adapters(tmp_path):
    model, base = tiny_model(), logits(tiny_model())
    model.add_adapter(SparseMemoryConfig(**RANDOM), "a")
    first = logits(model)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model.add_adapter(SparseMemoryConfig(**{**RANDOM, "num_keys": 6, "layers_to_transform": [0, 2]}), "b")
    second = logits(model)
    assert len({tuple(t.flatten().tolist()) for t in (base, first, second)}) == 3
    assert list(memory_layers(model)) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"values"}
    model.set_adapter("a")
    assert torch.equal(logits(model), first)
    assert model.active_adapters() == ["a"]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    other = tiny_model()
    other.load_adapter(str(tmp_path), "a")
    assert_same_memory(model, other, tiny_batch())
    model.delete_adapter("b")
    assert torch.equal(logits(model), first)
    model.delete_adapter("a")
    assert torch.equal(logits(model), base)


def test_together_with_a_lora_adapter_of_the_same_model():
    model = tiny_model()
    model.add_adapter(LoraConfig(target_modules=["down_proj"], init_lora_weights=False), "lora")
    lora = logits(model)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model.add_adapter(SparseMemoryConfig(**SMALL), "memory")
    assert torch.equal(logits(model), logits(tiny_model()))
    model.set_adapter("lora")
    assert torch.equal(logits(model), lora)
    model.set_adapter(["lora", "memory"])
    assert torch.equal(logits(model), lora)


# Generation


@EVERYWHERE
@pytest.mark.parametrize("make", [with_memory, with_scope])
def test_generation_with_a_cache_equals_generation_without(make, architecture):
    """Law 8."""
    model = make(architecture)
    batch = tiny_batch(3, 8)
    batch = {key: value.flip(1) for key, value in batch.items()}  # left padding
    outputs = [
        model.generate(
            **batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cache,
            return_dict_in_generate=True, output_logits=True,
        )
        for cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for with_cache, without in zip(*(o.logits for o in outputs), strict=True):
        torch.testing.assert_close(with_cache, without, atol=1e-4, rtol=0)
    assert torch.equal(
        model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8, min_new_tokens=8
        ),
        outputs[0].sequences,
    )


# Training


def gradients(model):
    model.zero_grad()
    model.train()
    model(**training_batch(), use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EVERYWHERE
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("option", ["values", "memory"])
def test_gradient_checkpointing_changes_no_gradient(option, use_reentrant, architecture):
    model = with_memory(architecture, trainable=option)
    plain = gradients(model)
    assert set(plain) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.enable_input_require_grads()
    checkpoint(model, use_reentrant=use_reentrant)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_counts_each_token_once(use_reentrant):
    """Law 5: recomputed tokens and padding are never counted."""
    batch = training_batch()
    counts = []
    for checkpointing in (False, True):
        model = with_memory()
        optimizer = RowAdamW(model, lr=0.1, rule="tf")
        if checkpointing:
            model.enable_input_require_grads()
            checkpoint(model, use_reentrant=use_reentrant)
        gradients(model)
        memories = optimizer.layers.values()
        counts.append([m.log.counts(m.num_slots, m.values.device) for m in memories])
    for plain, checkpointed in zip(*counts, strict=True):
        assert torch.equal(plain, checkpointed)
        # the positions that have a label
        assert plain.sum() == (batch["labels"][:, 1:] != -100).sum() * 2 * 4


@EVERYWHERE
def test_bfloat16_autocast_trains_and_addresses_in_float32(architecture):
    model = with_memory(architecture)
    plain = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(logits(model)).all()
        mixed = gradients(model)
    for name, gradient in mixed.items():
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0) > 0.8


def test_a_batch_out_of_scope_trains_nothing():
    model = with_scope().train()
    batch = tiny_batch(4, 9, seed=3)
    for memory in memory_layers(model).values():
        memory.scope_lo.fill_(1.5)
        memory.scope_hi.fill_(2.0)
    optimizer = RowAdamW(model, lr=0.1, rule="tf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = model(**batch)
    output.logits.sum().backward()
    optimizer.step()
    assert torch.equal(output.logits, logits(tiny_model(), batch))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_trainer_changes_only_the_rows(tmp_path):
    model = with_scope()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(tmp_path, max_steps=3, report_to=[], use_cpu=True, save_steps=2)
    data = [{key: value[0] for key, value in training_batch(seed).items()} for seed in range(4)]
    optimizer = RowAdamW(model, lr=0.1, top_t=4, rule="tf")
    Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"values"}
    for name in changed:
        assert (model.state_dict()[name] != before[name]).any(1).sum() <= 3 * 4
    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").exists()


@pytest.mark.slow
@EVERYWHERE
@pytest.mark.parametrize("packing", [True, False])
def test_trl_sft_trainer(packing, architecture, tokenizer, tmp_path):
    texts = ["".join(chr(97 + (7 * i * j) % 26) for j in range(4 + i)) for i in range(8)]
    arguments = SFTConfig(
        tmp_path, max_length=16, packing=packing, max_steps=2, per_device_train_batch_size=4,
        learning_rate=0.1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        activation_checkpointing=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        tiny_model(architecture), arguments, train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer, peft_config=SparseMemoryConfig(**SMALL),
    )  # fmt: skip
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    assert all(memory.values.any() for memory in memory_layers(trainer.model).values())
