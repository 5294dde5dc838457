"""The tail memory: laws 9, 11 and 12, and its use through PEFT and transformers."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainingArguments

from sparsemem import (
    RowAdamW,
    RowPatch,
    SparseMemoryConfig,
    calibrate,
    finetune,
    memory_layers,
    precision,
    scope_gate,
    set_scope,
)
from sparsemem.adapter import layers as tail
from sparsemem.adapter.blocks import final_norm
from sparsemem.training.cached import TailHead
from tiny import ARCHITECTURES, VOCABULARY, tiny_batch, tiny_model

SIZES = {"num_keys": 8, "num_heads": 2, "top_k": 4, "key_dim": 8, "task_type": "CAUSAL_LM"}
ON_ALL = pytest.mark.parametrize("architecture", ARCHITECTURES)
WITHOUT_BF16 = pytest.mark.usefixtures("without_bf16")
GENERAL = [
    {"input_ids": list(range(n, n + 12)), "labels": [-100] * 4 + list(range(n + 4, n + 12))}
    for n in range(60)
]
FACTS = [{"input_ids": [9, 8, 7, n, 3 * n], "labels": [-100] * 3 + [n, 3 * n]} for n in range(20, 28)]
FACTS += [{"input_ids": [5, 4, n, 99, 98, 97], "labels": [-100] * 4 + [98, 97]} for n in range(30, 34)]


@pytest.fixture
def without_bf16(monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: False)


def with_memory(architecture="llama", **fields):
    model = get_peft_model(tiny_model(architecture), SparseMemoryConfig(**SIZES, **fields))
    return model.eval()


def written(model, adapter="default", seed=0):
    """Fill the tables of the adapter with random rows."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, tensor in model.named_parameters():
        if name.endswith(f"sparse_memory_layers.{adapter}.values"):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator, device="cpu"))
    return model


def scoped(architecture="llama"):
    """A model with a calibrated memory that has a scope and random rows."""
    model = with_memory(architecture)
    background = calibrate(model, [tiny_batch(8, 12, seed) for seed in (5, 6)])
    batch = tiny_batch(4, 9, 0)
    set_scope(model, [{**batch, "labels": batch["input_ids"]}], background)
    return written(model)


@torch.no_grad()
def everything(model, batch, **options):
    return model(**batch, output_hidden_states=True, use_cache=True, **options)


def assert_undisturbed(out, base):
    """Hidden states up to the last block's output and the KV cache are bit-identical."""
    for mine, theirs in zip(out.hidden_states[:-1], base.hidden_states[:-1], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(out.past_key_values.layers, base.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("make", [lambda a: written(with_memory(a)), scoped], ids=["open", "scoped"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "opt"])
def test_law_11_the_base_is_undisturbed(architecture, make):
    batch = tiny_batch(4, 9, 0)
    base, out = everything(tiny_model(architecture), batch), everything(make(architecture), batch)
    assert_undisturbed(out, base)
    assert not torch.equal(out.logits, base.logits)


@ON_ALL
@pytest.mark.usefixtures("on_device")
def test_law_11_a_batch_that_mixes_patches_gives_each_row_its_own_logits(architecture):
    model = written(with_memory(architecture))
    model.add_adapter("b", SparseMemoryConfig(**SIZES))
    written(model, "b", seed=1)
    batch, names = tiny_batch(4, 9, 3), ["default", "b", "__base__", "b"]
    out = everything(model, batch, adapter_names=names)
    assert_undisturbed(out, everything(tiny_model(architecture), batch))
    alone = {"__base__": everything(tiny_model(architecture), batch).logits}
    for name in ("default", "b"):
        model.set_adapter(name)
        alone[name] = everything(model, batch).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(out.logits[row], alone[name][row], atol=1e-5, rtol=0)
    assert torch.equal(out.logits[2], alone["__base__"][2])
    assert not torch.equal(alone["default"], alone["b"])


def test_a_row_with_several_memories_gets_the_sum_of_their_reads():
    model = written(with_memory())
    model.add_adapter("b", SparseMemoryConfig(**SIZES))
    written(model, "b", seed=1)
    seen, batch = [], tiny_batch(4, 9, 3)
    batch = {key: value[:1].repeat(4, 1) for key, value in batch.items()}
    _, norm = final_norm(model)
    norm.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    model(**batch, adapter_names=["__base__", "default", "b", ("default", "b")])
    base, one, two, both = seen[0]
    torch.testing.assert_close(both - base, (one - base) + (two - base), atol=1e-4, rtol=0)
    assert not torch.equal(both, one)


def test_a_mixed_batch_generates_what_each_row_generates_alone():
    model = written(with_memory())
    model.add_adapter("b", SparseMemoryConfig(**SIZES))
    written(model, "b", seed=1)
    batch, options = tiny_batch(3, 7, 1), {"max_new_tokens": 6, "do_sample": False}
    batch["attention_mask"][:] = 1
    names = ["b", "__base__", "default"]
    mixed = model.generate(**batch, adapter_names=names, **options)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        assert torch.equal(model.generate(**one, adapter_names=[name], **options)[0], mixed[row])
    beams = model.generate(**batch, adapter_names=names, num_beams=2, **options)
    assert beams.shape[0] == 3


@pytest.mark.parametrize(
    ("names", "training", "message"),
    [
        (["c", "default"], False, "must give one of"),
        ([("default", "c"), "default"], False, "must give one of"),
        ([], False, "must give one of"),
        (["default"] * 3, False, "has 3 names for 2 rows"),
        (["default", "default"], True, "cannot train"),
    ],
)
def test_bad_adapter_names_are_refused(names, training, message):
    model = written(with_memory()).train(training)
    with pytest.raises(ValueError, match=message):
        model(**tiny_batch(), adapter_names=names)
    # the next call works as before
    model.eval()
    assert torch.equal(model(**tiny_batch()).logits, written(with_memory())(**tiny_batch()).logits)


@ON_ALL
def test_generation_with_the_cache_equals_generation_without(architecture):
    """Law 8."""
    model, ids = scoped(architecture), tiny_batch(1, 7, 0)["input_ids"][:, :5]
    options = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**options, use_cache=True), model.generate(**options, use_cache=False))


def test_active_memories_add_up():
    model = written(with_memory())
    model.add_adapter("b", SparseMemoryConfig(**SIZES))
    written(model, "b", seed=1)
    residuals = {}
    _, norm = final_norm(model.get_base_model())
    norm.register_forward_hook(lambda _m, args, _out: residuals.__setitem__("now", args[0]))
    seen = {}
    with torch.no_grad():
        for names in (["default"], ["b"], ["default", "b"]):
            model.base_model.set_adapter(names)
            model(**tiny_batch())
            seen[tuple(names)] = residuals["now"]
        with model.disable_adapter():
            model(**tiny_batch())
    alone = seen["default",] + seen["b",] - residuals["now"]
    torch.testing.assert_close(seen["default", "b"], alone, atol=1e-4, rtol=1e-4)
    # but only one may train
    with pytest.raises(ValueError, match=r"several sparse memories are active \(b, default\)"):
        RowAdamW(model, rule="tf")


def test_no_activation_of_the_base_is_kept_for_the_backward_pass():
    model = written(with_memory()).train()
    batch = tiny_batch(8, 9, 0)
    saved = []
    base_names = {id(p.data_ptr()) for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(**batch, labels=batch["input_ids"]).loss
    assert loss.requires_grad
    tokens, width = batch["input_ids"].numel(), model.config.hidden_size
    # norm and head keep a few tensors of the last residual's size; four blocks would keep dozens
    kept = [t for t in saved if t.numel() == tokens * width and id(t.data_ptr()) not in base_names]
    assert len(kept) <= 4
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_trains_the_same_rows():
    moved = []
    for checkpointing in (False, True):
        model = with_memory().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        optimizer = RowAdamW(model, lr=0.1, rule="grad", top_t=8)
        batch = tiny_batch(4, 9, 0)
        for _ in range(2):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
        moved.append([memory.values.detach().clone() for memory in memory_layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))
    assert all(table.any() for table in moved[0])


def test_an_aborted_forward_pass_leaves_no_states():
    model, batch = written(with_memory()), tiny_batch(4, 9, 0)
    base = tiny_model()(**batch).logits
    _, norm = final_norm(model.get_base_model())
    stop = norm.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("stop")), prepend=True
    )
    with pytest.raises(RuntimeError, match="stop"):
        model(**tiny_batch(2, 5, 1))
    stop.remove()
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base)
    assert torch.equal(model(**batch).logits, written(with_memory())(**batch).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles():
    model, batch = scoped(), tiny_batch(4, 9, 0)
    with torch.no_grad():
        expected = model(**batch).logits
        compiled = torch.compile(model, backend="eager")(**batch).logits
    torch.testing.assert_close(compiled, expected)


def test_saved_loaded_unloaded(tmp_path):
    """Law 10, with one scope for the whole memory. The file contains no padded scope."""
    model, batch = scoped(), tiny_batch(4, 9, 0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    first, last = memory_layers(loaded).values()
    assert (first.has_scope, last.has_scope) == (False, True)
    # loading into an adapter whose scope has another size
    other = with_memory()
    other.load_adapter(tmp_path, "default")
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    base = loaded.unload()
    assert torch.equal(base(**batch).logits, tiny_model()(**batch).logits)
    assert tail.tail_of(base) is None


def test_a_model_without_a_final_norm_uses_write_own(caplog):
    chain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = get_peft_model(chain, SparseMemoryConfig(**{**SIZES, "task_type": None}, target_modules=["0"]))
    assert "so write='own' is used" in caplog.text
    assert model.peft_config["default"].write == "own"
    assert [memory.write for memory in memory_layers(model).values()] == ["own"]


# Training on cached states


def taught(architecture, tokenizer, cache_bytes, **options):
    config = SparseMemoryConfig(**{**SIZES, "num_keys": 16})
    model = get_peft_model(tiny_model(architecture), config)
    settings = {"background": GENERAL, "lr": 0.3, "batch_size": 4, "max_steps": 9} | options
    return finetune(model, FACTS, tokenizer=tokenizer, cache_bytes=cache_bytes, **settings)


def rows_of(model):
    return [memory.values.detach().clone() for memory in memory_layers(model).values()]


@pytest.mark.slow
@ON_ALL
@WITHOUT_BF16
def test_law_12_cached_equals_not_cached(architecture, tokenizer, tmp_path):
    """States cached in memory, cached in a file, and not cached: the rows are bit-identical."""
    done = [taught(architecture, tokenizer, 2**30)]
    done.append(taught(architecture, tokenizer, 1, output_dir=tmp_path / "run"))
    assert len(list((tmp_path / "run").glob("states-*.f32"))) == 1
    done.append(taught(architecture, tokenizer, 0))
    first, *others = [rows_of(one.model) for one in done]
    assert all(table.any() for table in first)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    *_, cached = memory_layers(done[0].model).values()
    *_, not_cached = memory_layers(done[2].model).values()
    assert torch.equal(cached.get_buffer("scope_centres"), not_cached.get_buffer("scope_centres"))


@pytest.mark.slow
@ON_ALL
@WITHOUT_BF16
def test_plain_trainer_trains_the_rows_that_finetune_trains(architecture, tokenizer, tmp_path):
    """Trainer runs the whole model, with padding. The rows agree up to rounding."""
    from sparsemem.data.records import collate

    ours = taught(architecture, tokenizer, 2**30, schedule="constant", warmup_steps=0, max_steps=4)
    model = get_peft_model(tiny_model(architecture), SparseMemoryConfig(**{**SIZES, "num_keys": 16}))
    background = calibrate(model, [collate(GENERAL[n : n + 8], 0) for n in range(0, 60, 8)])
    for mine, theirs in zip(memory_layers(model).values(), memory_layers(ours.model).values(), strict=True):
        mine.scope = None if theirs.scope is None else theirs.scope.copy()
    optimizer = RowAdamW(
        model, 0.3, rule="grad", top_t=1024, moments="table", betas=(0.9, 0.95), max_grad_norm=1.0,
        background=background,
    )  # fmt: skip
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, max_steps=4, report_to=[], seed=0, data_seed=0,
        max_grad_norm=0.0, lr_scheduler_type="constant", remove_unused_columns=False, use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(
        model,
        arguments,
        train_dataset=FACTS,
        data_collator=lambda items: collate(items, 0),
        optimizers=(optimizer, None),
    ).train()
    for mine, theirs in zip(rows_of(model), rows_of(ours.model), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)
        assert mine.abs().max() > 0.1


@WITHOUT_BF16
def test_a_resumed_cached_run_is_bit_identical(tokenizer, tmp_path):
    """Law 7. The resumed run reuses the file of states."""
    whole = taught("llama", tokenizer, 1, output_dir=tmp_path / "whole")
    part = {"output_dir": tmp_path / "part"}
    taught("llama", tokenizer, 1, max_steps=6, **part, schedule="constant")
    (states,) = (tmp_path / "part").glob("states-*.f32")
    written_at = states.stat().st_mtime_ns
    resumed = taught("llama", tokenizer, 1, resume=True, **part, schedule="constant")
    assert states.stat().st_mtime_ns == written_at
    constant = taught("llama", tokenizer, 1, schedule="constant")
    pairs = zip(rows_of(resumed.model), rows_of(constant.model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(rows_of(whole.model)[0], rows_of(resumed.model)[0])


def test_trainable_base_parameters_switch_the_cache_off(tokenizer):
    """With modules_to_save, the base model needs gradients, so states cannot be cached."""
    config = SparseMemoryConfig(**{**SIZES, "num_keys": 16}, modules_to_save=["embed_tokens"])
    model = get_peft_model(tiny_model(), config)
    before = model.get_input_embeddings().weight.detach().clone()
    done = finetune(model, FACTS, tokenizer=tokenizer, background=GENERAL, max_steps=2, batch_size=4)
    assert not torch.equal(done.model.get_input_embeddings().weight, before)


def test_validation_uses_cached_states_too(tokenizer):
    done = taught("llama", tokenizer, 2**30, validation=FACTS[:3])
    assert done.validation_loss < torch.tensor(float(VOCABULARY)).log()


def test_a_patch_of_a_tail_memory_is_reverted_and_applied(tokenizer, tmp_path):
    """Law 6, with known states of the task in the scope."""
    done = taught("llama", tokenizer, 2**30, keep=GENERAL[:5])
    model, batch = done.model, tiny_batch(4, 9, 0)
    (memory,) = (m for m in memory_layers(model).values() if m.has_scope)
    assert len(memory.scope_task_known)
    done.patch.save(tmp_path / "patch.safetensors")
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch = RowPatch.load(tmp_path / "patch.safetensors")
    patch.revert(model)
    assert torch.equal(model(**batch).logits, tiny_model()(**batch).logits)
    patch.apply(model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


def test_taught_states_are_in_scope_and_others_are_not(tokenizer):
    done = taught("llama", tokenizer, 2**30)
    (g,) = scope_gate(done.model, {"input_ids": torch.tensor([FACTS[0]["input_ids"]])}).values()
    assert g[0, 2] > 0.5
    (g,) = scope_gate(done.model, {"input_ids": torch.tensor([GENERAL[3]["input_ids"]])}).values()
    assert (g == 0).float().mean() > 0.5


# of torch before 2.13
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_on_cached_states_the_head_weight_is_cast_once_as_autocast_would():
    model = scoped()
    head = TailHead(model, pad_token_id=0)
    states = torch.cat([rows for rows, _ in head.rows_of(FACTS)])
    weight = model.get_output_embeddings().weight
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            ours = [head.logits(states) for _ in range(3)]
        head.head = torch.nn.Sequential(head.head)
        autocasts = head.logits(states)
    casts = [e for e in seen.events() if e.name == "aten::_to_copy" and e.input_shapes[0] == [*weight.shape]]
    assert len(casts) == 1
    assert ours[0].dtype == torch.bfloat16
    assert all(torch.equal(one, autocasts) for one in ours)
