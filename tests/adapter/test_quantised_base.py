"""A base model in 8 bits: only the memory trains, and the adapter loads again."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from sparsemem import SparseMemoryConfig, finetune
from sparsemem.data.records import encode
from tiny import SMALL

FACTS = [{"prompt": f"Capital {n}?", "completion": f"City{n}"} for n in range(4)]
GENERAL = [f"{n} plain words, the square is {n * n}." for n in range(24)]


def in_8_bits(package):
    pytest.importorskip(package, reason=f"pip install {package}")
    if package == "bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


@pytest.mark.slow
@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_a_quantised_base_is_taught_and_stays_as_it_was(package, tmp_path, tiny_llama, tokenizer):
    config = in_8_bits(package)
    tiny_llama().save_pretrained(tmp_path / "base")

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map="cpu"
        )

    ids = torch.tensor([encode(FACTS, tokenizer)[0]["input_ids"]])
    before = load().eval()(ids).logits
    model = get_peft_model(load(), SparseMemoryConfig(**SMALL))
    options = {"tokenizer": tokenizer, "background": GENERAL, "max_steps": 20, "batch_size": 4, "lr": 0.3}
    done = finetune(model, FACTS, "smf", **options)
    assert sum(len(layer.slots) for layer in done.patch.layers.values()) > 0
    done.model.save_pretrained(tmp_path / "taught")
    again = PeftModel.from_pretrained(load(), str(tmp_path / "taught")).eval()
    taught = done.model(ids).logits
    assert torch.equal(again(ids).logits, taught)
    assert not torch.equal(taught, before)
    done.patch.revert(again)
    assert torch.equal(again(ids).logits, before)
