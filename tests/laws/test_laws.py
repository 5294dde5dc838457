"""Laws 1 to 10 on real models and files. Other tests of laws:

law 3 in layer/test_values.py, 4 in layer/test_product_keys.py, 7 in training/test_finetune.py, 11 and 12 in
adapter/test_tail.py.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model

from killing import killed_while
from sparsemem import RowAdamW, RowPatch, SparseMemoryConfig, calibrate, memory_layers, set_scope
from sparsemem.layer.memory import ProductKeyMemory
from sparsemem.layer.product_keys import sub_key_scores
from started import Started
from tiny import ARCHITECTURES, SMALL, batch, checkpoint, tiny_batch, tiny_model

ON_DEVICE = pytest.mark.usefixtures("on_device")
TINY = {"task_type": "CAUSAL_LM", "num_keys": 4, "num_heads": 2, "top_k": 3, "key_dim": 8}


def _answers(seed=0, rows=4):
    data = tiny_batch(rows, 10, seed)
    labels = torch.full_like(data["input_ids"], -100)
    labels[:, 4:7] = data["input_ids"][:, 4:7]
    return {**data, "labels": labels}


def _taught(architecture="llama", scope=True, steps=3):
    """A model with a trained memory, and a copy of its base model."""
    base = tiny_model(architecture)
    twin = copy.deepcopy(base)
    torch.manual_seed(0)
    model = get_peft_model(base, SparseMemoryConfig(**TINY))
    background = calibrate(model, [_answers(seed) for seed in range(8)])
    if scope:
        set_scope(model, [_answers(50)], background)
    optimizer = RowAdamW(model, 0.5, top_t=8, rule="kl", background=background)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**_answers(50)).loss.backward()
        optimizer.step()
    assert all(memory.values.any() for memory in memory_layers(model).values())
    return model.eval(), twin


@ON_DEVICE
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_law_1_insertion_and_calibration_change_no_logit(architecture, dtype):
    base = tiny_model(architecture).to(dtype)
    expected = base(**tiny_batch()).logits
    model = get_peft_model(base, SparseMemoryConfig(**TINY))
    assert torch.equal(model(**tiny_batch()).logits, expected)
    calibrate(model, [_answers(seed) for seed in range(3)])
    assert torch.equal(model(**tiny_batch()).logits, expected)


@ON_DEVICE
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_law_2_under_accumulation_and_checkpointing(tiny_llama, accumulate, checkpointing):
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
    background = calibrate(model, [batch(seed) for seed in range(4)])
    if checkpointing:
        checkpoint(model.base_model.model, use_reentrant=False)
        model.enable_input_require_grads()
    model.train()
    optimizer = RowAdamW(model, 0.1, top_t=5, background=background, weight_decay=0.1, max_grad_norm=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ever = {name: set() for name in memory_layers(model)}
    for step in range(3):
        optimizer.zero_grad()
        for part in range(accumulate):
            (model(**batch(10 * step + part)).loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, rows in optimizer.selected.items():
            ever[name] |= set(rows.tolist())
    for name, tensor in model.state_dict().items():
        layer = next((n for n in ever if name.endswith(f"{n}.sparse_memory_layers.default.values")), None)
        changed = (
            set() if layer is None else set((tensor != before[name]).any(1).nonzero().flatten().tolist())
        )
        assert changed <= ever.get(layer, set())
        if layer is None:
            assert torch.equal(tensor, before[name]), name
        else:
            assert changed


@ON_DEVICE
@pytest.mark.parametrize("mode", ["additive", "replacement"])
@pytest.mark.parametrize("value_gate", ["none", "silu"])
@pytest.mark.parametrize("widths", [(12, 12), (10, 7)])
def test_law_3_memory_equals_the_naive_version_in_value_and_gradients(mode, value_gate, widths):
    """In float32, with tolerance 1e-5."""
    torch.manual_seed(0)
    memory = ProductKeyMemory(
        *widths, num_keys=5, num_heads=3, top_k=4, key_dim=6,
        mode=mode, value_gate=value_gate, init_weights=False,
    )  # fmt: skip
    x, base = torch.randn(2, 6, widths[0]), torch.randn(2, 6, widths[1])

    def naive(x):
        q = (x.flatten(0, 1) @ memory.query.T + memory.query_bias).view(-1, 3, 2, 3)
        q = q / q.norm(dim=-1, keepdim=True)
        scores = sub_key_scores(q, memory.keys, memory.key_bias)
        top, slots = (scores[..., 0, :, None] + scores[..., 1, None, :]).flatten(-2).topk(4)
        y = (memory.values[slots] * top.softmax(-1)[..., None]).sum((1, 2))
        if value_gate == "silu":
            y = (y * torch.nn.functional.silu(x.flatten(0, 1) @ memory.gate_in.T)) @ memory.gate_out.T
        y = (memory.scale * y).view_as(base)
        return y if mode == "replacement" else base + y

    results = []
    for read in (lambda x: memory(x, base), naive):
        memory.zero_grad()
        x_in = x.clone().requires_grad_()
        out = read(x_in)
        out.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in memory.named_parameters()}
        results.append({"out": out.detach(), "x": x_in.grad, **gradients})
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5, msg=name)


@ON_DEVICE
@pytest.mark.parametrize("rule", ["kl", "tfidf", "grad"])
def test_law_5_one_batch_equals_its_accumulated_parts(tiny_llama, rule):
    base = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
    background = calibrate(base, [batch(seed) for seed in range(4)])
    data = batch(20, rows=16)
    num_items = int((data["labels"] != -100).sum())
    selected, rows = [], []
    for size in (16, 4):
        model = copy.deepcopy(base)
        optimizer = RowAdamW(model, 0.1, top_t=6, rule=rule, background=background)
        for start in range(0, 16, size):
            part = {key: value[start : start + size] for key, value in data.items()}
            model(**part, num_items_in_batch=num_items).loss.backward()
        with torch.no_grad():
            model(**data)
        optimizer.step()
        selected.append(optimizer.selected)
        rows.append([memory.values.detach().clone() for memory in memory_layers(model).values()])
    for name in selected[0]:
        assert torch.equal(selected[0][name], selected[1][name])
    for one, parts in zip(*rows, strict=True):
        torch.testing.assert_close(one, parts, rtol=1e-3, atol=1e-5)


@ON_DEVICE
def test_law_5_padding_never_counts(tiny_llama):
    base = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
    short = batch(1, rows=2, length=9)
    short["attention_mask"][:] = 1
    padded = {
        key: torch.nn.functional.pad(value, (0, 5), value={"labels": -100, "attention_mask": 0}.get(key, 7))
        for key, value in short.items()
    }
    counts = []
    for data in (short, padded):
        model = copy.deepcopy(base)
        optimizer = RowAdamW(model, 0.1, rule="tf")
        model(**data).loss.backward()
        memories = optimizer.layers.values()
        counts.append([m.log.counts(m.num_slots, m.values.device) for m in memories])
    assert all(torch.equal(a, b) for a, b in zip(*counts, strict=True))


def _worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ddp_step(rank, 2, str(folder / "two"))
    dist.destroy_process_group()


def ddp_step(rank, world, out):
    """Take one step on this process's share of 16 rows. Save the tables and the selected rows to a file."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), SparseMemoryConfig(**TINY))
    background = calibrate(model, [_answers(seed) for seed in range(4)])
    optimizer = RowAdamW(model, 0.1, top_t=6, background=background)
    data = _answers(20, rows=16)
    num_items = int((data["labels"] != -100).sum())
    mine = {key: value[rank * 16 // world : (rank + 1) * 16 // world] for key, value in data.items()}
    # Trainer scales the loss by the number of processes, because gradients are averaged over them
    (model(**mine, num_items_in_batch=num_items).loss * world).backward()
    optimizer.step()
    tables = {name: memory.values.detach() for name, memory in memory_layers(model).items()}
    torch.save({"selected": optimizer.selected, "tables": tables}, f"{out}.{rank}")


@pytest.mark.slow
def test_law_5_two_processes_equal_one(tmp_path):
    with Started(_worker, 0, tmp_path) as first, Started(_worker, 1, tmp_path) as second:
        ddp_step(0, 1, str(tmp_path / "one"))
        codes = [first.wait(), second.wait()]
    assert codes == [0, 0], first.stderr + second.stderr
    one = torch.load(tmp_path / "one.0")
    for rank in range(2):
        two = torch.load(tmp_path / f"two.{rank}")
        for name in one["selected"]:
            assert torch.equal(one["selected"][name], two["selected"][name])
            torch.testing.assert_close(one["tables"][name], two["tables"][name], rtol=1e-3, atol=1e-5)


@ON_DEVICE
def test_law_6_apply_then_revert_restores_every_byte():
    model, _ = _taught()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    empty = {name: torch.zeros_like(memory.values) for name, memory in memory_layers(model).items()}
    patch = RowPatch.diff(model, since=empty)
    patch.revert(model)
    assert not any(memory.values.any() or memory.has_scope for memory in memory_layers(model).values())
    patch.apply(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@ON_DEVICE
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_law_8_cache_changes_no_token(architecture):
    model, _ = _taught(architecture)
    prompt = {key: value[:, :5] for key, value in _answers(50).items() if key != "labels"}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    cached, plain = (model.generate(**prompt, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    ids = _answers(50)["input_ids"][:1]
    whole = model(input_ids=ids, use_cache=False).logits
    first = model(input_ids=ids[:, :4], use_cache=True)
    second = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-4)


@ON_DEVICE
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_law_9_out_of_scope_is_bit_identical_to_the_base(architecture, dtype):
    model, base = _taught(architecture)
    model, base = model.to(dtype), base.to(dtype)
    inside = {key: value for key, value in _answers(50).items() if key != "labels"}
    assert not torch.equal(model(**inside).logits, base(**inside).logits)
    # narrow the scope to the taught states, so that all other texts are out of scope
    for memory in memory_layers(model).values():
        own = memory.scope_hi - memory.scope_lo
        memory.scope_lo[: len(own)] = 0.98
        memory.scope_hi[: len(own)] = 0.99
    for seed in range(100, 105):
        other = tiny_batch(3, 9, seed)
        assert torch.equal(model(**other).logits, base(**other).logits)
        assert torch.equal(model(**other, use_cache=False).logits, base(**other, use_cache=False).logits)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
        assert torch.equal(model.generate(**other, **options), base.generate(**other, **options))


@ON_DEVICE
def test_law_10_reloaded_logits_are_bit_identical(tmp_path):
    model, _ = _taught()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(again(**_answers(50)).logits, model(**_answers(50)).logits)
    for one, other in zip(memory_layers(model).values(), memory_layers(again).values(), strict=True):
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def _saves(path, kind):
    from sparsemem import Background
    from sparsemem.background.background import LayerBackground
    from sparsemem.patches.patch import LayerPatch

    def save(number):
        size = 200 + number % 2 * 2000
        if kind == "patch":
            rows = torch.full((size, 64), float(number))
            RowPatch({"l": LayerPatch(torch.arange(size), rows, rows + 1, "a")}, "b", {"n": size}).save(path)
        else:
            counts, df = torch.full((size,), number), torch.full((size,), number)
            Background({"l": LayerBackground(counts, df, number)}).save(path)

    return save


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["patch", "background"])
def test_law_10_a_killed_save_leaves_the_old_or_the_new_file(tmp_path, kind):
    from sparsemem import Background

    path = tmp_path / "artefact.safetensors"
    for attempt in range(8):
        killed_while(_saves, path, kind, wait=0.013 * attempt)
        if kind == "patch":
            layer = RowPatch.load(path).layers["l"]
            assert torch.equal(layer.after, layer.before + 1)
            assert len(layer.after.unique()) == 1
        else:
            layer = Background.load(path)["l"]
            assert layer.counts.unique().item() == layer.df.unique().item() == layer.num_batches
