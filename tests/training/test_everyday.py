"""A plain Trainer around a memory: what its options do to rows and scope."""

import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from sparsemem import RowAdamW, SparseMemoryConfig, calibrate, finetune, memory_layers, set_scope
from sparsemem.artifacts import ArtifactError
from sparsemem.data.records import batches, collate, encode
from sparsemem.layer import values
from tiny import SMALL, batch

FACTS = [{"prompt": f"Capital of {land}?", "completion": land[::-1]} for land in ("Velmora", "Tolgaria")]
GENERAL = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}."} for n in range(40)]


def rows_of(model):
    return [memory.values.detach().clone() for memory in memory_layers(model).values()]


@pytest.fixture
def train(tiny_llama, tokenizer, tmp_path):
    """Train a tiny model with a scope for four steps, at a rate that soon makes it worse."""

    def run(own_optimizer=True, **options):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
        examples = encode(FACTS, tokenizer)
        background = calibrate(model, batches(encode(GENERAL, tokenizer), 8, 0))
        set_scope(model, batches(examples, 2, 0), background)
        arguments = TrainingArguments(
            tmp_path, max_steps=4, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
            use_cpu=True, logging_strategy="no", dataloader_pin_memory=False,
            **{"save_strategy": "no", **options},
        )  # fmt: skip
        optimizer = RowAdamW(model, lr=5.0, top_t=5, rule="tf") if own_optimizer else None
        trainer = Trainer(
            model, arguments, train_dataset=examples, eval_dataset=examples, optimizers=(optimizer, None),
            data_collator=lambda rows: collate(rows, 0),
        )  # fmt: skip
        trainer.train()
        return model, trainer

    return run


def test_the_best_checkpoint_brings_back_its_rows_and_its_scope(train, tiny_llama, capsys):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    model, trainer = train(load_best_model_at_end=True, metric_for_best_model="eval_loss", **steps)
    best = trainer.state.best_model_checkpoint
    saved = PeftModel.from_pretrained(tiny_llama(), best).eval()
    assert all(map(torch.equal, rows_of(model), rows_of(saved)))
    inputs = batch(labels=False)
    assert torch.equal(model.eval()(**inputs).logits, saved(**inputs).logits)
    assert any(memory.has_scope for memory in memory_layers(model).values())


def test_neftune_has_an_effect(train, capsys):
    plain, noisy = (rows_of(train(neftune_noise_alpha=alpha)[0]) for alpha in (None, 20.0))
    assert not all(map(torch.equal, plain, noisy))


def test_an_optimizer_that_trains_rows_densely_is_named_once(train, caplog, capsys):
    values.say_dense.cache_clear()
    with caplog.at_level(logging.WARNING, "sparsemem"):
        train(own_optimizer=False)
    assert caplog.text.count("optimizers=(RowAdamW(model, lr=...), None)") == 1
    values.say_dense.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sparsemem"):
        train()
    assert "RowAdamW(model" not in caplog.text


def test_a_resized_base_is_taught_saved_and_loaded_again(tiny_llama, tokenizer, tmp_path):
    def resized(seed):
        base = tiny_llama()
        torch.manual_seed(seed)
        base.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
        return base

    base = resized(1)
    base.save_pretrained(tmp_path / "base")
    options = {"tokenizer": tokenizer, "background": GENERAL, "max_steps": 2, "mentions": 0}
    done = finetune(get_peft_model(base, SparseMemoryConfig(**SMALL)), FACTS, **options)
    done.model.save_pretrained(tmp_path / "adapter")
    logits = done.model(**batch(labels=False)).logits
    saved = type(base).from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(saved, tmp_path / "adapter").eval()
    assert torch.equal(again(**batch(labels=False)).logits, logits)
    # embeddings of added tokens are random, so a base that is resized again is another one
    with pytest.raises(ArtifactError, match=r"resize_token_embeddings"):
        PeftModel.from_pretrained(resized(2), tmp_path / "adapter")
