"""Names of adapters, and several adapters or models on one base."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sparsemem import SparseMemoryConfig, Stream, finetune, memory_layers
from sparsemem.adapter.model import check_adapter_name
from tiny import SMALL, batch

AWKWARD = ["a", "memory", "sparse", "0_", "my-values", "default-2", "x_default", "lora", "layer", "Ångström"]
REFUSED = [
    "v1.5",
    "",
    "a b",
    "a/b",
    "values",
    "keys",
    "scale",
    "model",
    "mlp",
    "layers",
    "2",
    "train",
    "pop",
    "scope_rows",
]
FACTS = [{"prompt": f"Capital of {land}?", "completion": land[::-1]} for land in ("Velmora", "Tolgaria")]
GENERAL = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}."} for n in range(40)]


def with_rows(model, name, seed):
    generator = torch.Generator().manual_seed(seed)
    model.set_adapter(name)
    for memory in memory_layers(model).values():
        memory.values.data.copy_(torch.randn(memory.values.shape, generator=generator))
    return model(**batch(labels=False)).logits


@pytest.mark.filterwarnings("ignore:Adapter name")
def test_ten_adapters_with_awkward_names_are_saved_and_loaded_as_they_were(tiny_llama, tmp_path):
    names = [*AWKWARD[:-1], "A"]
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, SparseMemoryConfig(**SMALL))
    logits = {name: with_rows(model.eval(), name, seed) for seed, name in enumerate(names)}
    model.save_pretrained(tmp_path)
    for name in names:
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / name, adapter_name=name).eval()
        assert torch.equal(loaded(**batch(labels=False)).logits, logits[name])


@pytest.mark.filterwarnings("ignore:Adapter name")
@pytest.mark.parametrize("name", [*REFUSED, AWKWARD[-1]])
def test_names_that_peft_would_mix_up_are_refused(tiny_llama, name):
    with pytest.raises(ValueError, match=r"adapter name .* rename it, for example"):
        get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL), adapter_name=name)


@pytest.mark.filterwarnings("ignore:Adapter name")
def test_a_second_adapter_is_refused_by_name_and_leaves_the_first(tiny_llama):
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL)).eval()
    logits = with_rows(model, "default", 0)
    for name in ("v1.5", "values"):
        with pytest.raises(ValueError, match="adapter name"):
            model.add_adapter(name, SparseMemoryConfig(**SMALL))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(**batch(labels=False)).logits, logits)
    check_adapter_name(model, "facts")


SECOND = {
    "smf": lambda base, tokenizer, folder: finetune(base, FACTS, tokenizer=tokenizer, background=GENERAL),
    "lora": lambda base, tokenizer, folder: finetune(base, FACTS, "lora", tokenizer=tokenizer),
    "full": lambda base, tokenizer, folder: finetune(base, FACTS, "full", tokenizer=tokenizer),
    "stream": lambda base, tokenizer, folder: Stream(base, folder, tokenizer=tokenizer, background=GENERAL),
}


@pytest.mark.parametrize("first", ["memory", "lora"])
@pytest.mark.parametrize("second", SECOND)
def test_a_second_model_on_one_base_object_is_refused(tiny_llama, tokenizer, tmp_path, first, second):
    base = tiny_llama()
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, SparseMemoryConfig(**SMALL) if first == "memory" else lora).eval()
    before = model(**batch(labels=False)).logits
    with pytest.raises(ValueError, match="already carries a"):
        SECOND[second](base, tokenizer, tmp_path / "stream")
    assert torch.equal(model(**batch(labels=False)).logits, before)
    assert not (tmp_path / "stream").exists()


def test_two_streams_on_one_base_object_are_refused(tiny_llama, tokenizer, tmp_path):
    base = tiny_llama()
    Stream(base, tmp_path / "first", tokenizer=tokenizer, background=GENERAL).teach("a", FACTS)
    with pytest.raises(ValueError, match="load the base model again"):
        Stream(base, tmp_path / "second", tokenizer=tokenizer, background=GENERAL)


def test_after_unload_a_memory_can_be_added_again(tiny_llama):
    base = tiny_llama()
    logits = base(**batch(labels=False)).logits
    model = get_peft_model(base, SparseMemoryConfig(**SMALL)).eval()
    with_rows(model, "default", 0)
    bare = model.unload()
    assert torch.equal(bare(**batch(labels=False)).logits, logits)
    again = get_peft_model(bare, SparseMemoryConfig(**SMALL)).eval()
    assert torch.equal(again(**batch(labels=False)).logits, logits)
    assert not torch.equal(with_rows(again, "default", 0), logits)
