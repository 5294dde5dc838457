import copy
import math
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import get_peft_model

from fake_device import FakeDevice
from sparsemem import (
    Background,
    RowAdamW,
    RowSGD,
    SparseMemoryConfig,
    count_accesses,
    memory_layers,
    select_rows,
)
from sparsemem.layer import values as log

OPTIMIZERS = [
    pytest.param(lambda m, **o: RowSGD(m, 0.1, momentum=0.9, weight_decay=0.01, **o), id="sgd"),
    pytest.param(lambda m, **o: RowAdamW(m, 0.1, weight_decay=0.01, **o), id="adamw-row"),
    pytest.param(lambda m, **o: RowAdamW(m, 0.1, moments="element", **o), id="adamw-element"),
    pytest.param(lambda m, **o: RowAdamW(m, 0.1, moments="table", **o), id="adamw-table"),
]


def _batch(seed=0, rows=4, length=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 200, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.fixture
def model(tiny_llama):
    config = SparseMemoryConfig(task_type="CAUSAL_LM", num_keys=8, num_heads=2, top_k=3, key_dim=8)
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), config)


def _step(model, optimizer, seed=0):
    optimizer.zero_grad()
    model(**_batch(seed)).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["kl", "tfidf", "tf", "grad", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_selected_rows_and_their_state_ever_change(model, make, rule, dtype):
    """Law 2, over several steps with weight decay, momentum and clipping, in float32 and bfloat16."""
    for memory in memory_layers(model).values():
        memory.values.data = torch.randn_like(memory.values).to(dtype)
    background = count_accesses(model, [_batch(9)])
    optimizer = make(model, top_t=5, rule=rule, background=background, max_grad_norm=0.5)
    everything = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ever, moved = ({name: set() for name in memory_layers(model)} for _ in range(2))
    for seed in range(4):
        before = {name: memory.values.detach().clone() for name, memory in memory_layers(model).items()}
        states = {name: copy.deepcopy(optimizer.state[m.values]) for name, m in memory_layers(model).items()}
        _step(model, optimizer, seed)
        for name, memory in memory_layers(model).items():
            chosen = set(optimizer.selected[name].tolist())
            changed = set((memory.values != before[name]).any(1).nonzero().flatten().tolist())
            assert 0 < len(chosen) <= 5
            # a selected row may stay the same: only the last token reads it, or bfloat16 rounds the update
            # away
            assert changed <= chosen
            moved[name] |= changed
            ever[name] |= chosen
            _assert_state_of_others_rests(states[name], optimizer.state[memory.values], chosen)
    for name, tensor in model.state_dict().items():
        if not name.endswith(".values"):
            assert torch.equal(tensor, everything[name]), name
    for name, memory in memory_layers(model).items():
        assert moved[name]
        never = sorted(set(range(64)) - ever[name])
        key = f"base_model.model.{name}.sparse_memory_layers.default.values"
        assert torch.equal(memory.values[never], everything[key][never])
        state = optimizer.state[memory.values]
        assert "slots" not in state or set(state["slots"].tolist()) == ever[name]


def _assert_state_of_others_rests(before, after, chosen):
    if "slots" not in before:
        return
    place = {slot: index for index, slot in enumerate(after["slots"].tolist())}
    for index, slot in enumerate(before["slots"].tolist()):
        if slot not in chosen:
            for key in before.keys() - {"table"}:
                assert torch.equal(before[key][index], after[key][place[slot]]), key


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda m: RowSGD(m, 0.1, momentum=0.9, weight_decay=0.01, top_t=10**6, rule="tf"),
         lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01)),
        (lambda m: RowAdamW(m, 0.1, moments="element", weight_decay=0.01, top_t=10**6, rule="tf"),
         lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.01)),
    ],
    ids=["sgd", "adamw"],
)  # fmt: skip
def test_rows_selected_in_every_step_change_as_in_torch(tiny_llama, ours, torchs):
    # with one memory layer, the reads are the same in every step
    config = {"num_keys": 8, "num_heads": 2, "top_k": 3, "key_dim": 8, "layers_to_transform": [3]}
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(task_type="CAUSAL_LM", **config))
    twin = copy.deepcopy(model)
    optimizer = ours(model)
    reference = torchs([memory.values for memory in memory_layers(twin).values()])
    for _ in range(3):
        _step(model, optimizer)
        reference.zero_grad()
        twin(**_batch()).loss.backward()
        reference.step()
    for memory, other in zip(memory_layers(model).values(), memory_layers(twin).values(), strict=True):
        rows = optimizer.state[memory.values]["slots"]
        torch.testing.assert_close(memory.values[rows], other.values[rows], rtol=1e-4, atol=1e-6)


def test_the_moment_per_row_is_the_mean_square(model):
    optimizer = RowAdamW(model, 0.1, top_t=4, rule="tf", betas=(0.0, 0.0), eps=1e-30)
    before = {n: m.values.detach().clone() for n, m in memory_layers(model).items()}
    _step(model, optimizer)
    for name, memory in memory_layers(model).items():
        rows = optimizer.selected[name]
        moved = (memory.values - before[name])[rows]
        torch.testing.assert_close(moved.square().mean(1).sqrt(), torch.full((len(rows),), 0.1))


def test_the_moment_per_table_keeps_the_proportions_of_gradients(model):
    optimizer = RowAdamW(model, 0.1, top_t=4, rule="tf", moments="table", betas=(0.0, 0.9), eps=1e-30)
    twin = copy.deepcopy(model)
    sgd = RowSGD(twin, 1.0, top_t=4, rule="tf")
    _step(model, optimizer)
    _step(twin, sgd)
    for name, memory in memory_layers(model).items():
        rows = optimizer.selected[name]
        moved, gradient = memory.values[rows], memory_layers(twin)[name].values[rows]
        torch.testing.assert_close(moved, 0.1 * gradient / gradient.square().mean().sqrt())


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_saved_state_is_restored_exactly(model, make, tmp_path):
    optimizer = make(model, top_t=5, rule="random")
    for memory in memory_layers(model).values():
        memory.values.data = memory.values.bfloat16()
    _step(model, optimizer, 1)
    twin = copy.deepcopy(model)
    other = make(twin, top_t=5, rule="random")
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in (2, 3):
        _step(model, optimizer, seed)
        _step(twin, other, seed)
    for memory, same in zip(memory_layers(model).values(), memory_layers(twin).values(), strict=True):
        assert torch.equal(memory.values, same.values)
        state, copied = optimizer.state[memory.values], other.state[same.values]
        assert all(torch.equal(state[key], copied[key]) for key in state)
        assert state["slots"].dtype == torch.int64


def test_clipping_uses_the_norm_over_selected_rows(model):
    moved = {}
    for limit in (None, 1e-3):
        twin = copy.deepcopy(model)
        optimizer = RowSGD(twin, 1.0, top_t=5, rule="tf", max_grad_norm=limit)
        _step(twin, optimizer)
        moved[limit] = torch.cat([m.values.flatten() for m in memory_layers(twin).values()]).norm().item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert moved[None] > 1e-3


def test_other_parameters_have_their_own_learning_rate(tiny_llama):
    config = {"num_keys": 8, "num_heads": 2, "top_k": 3, "key_dim": 8, "init_weights": False}
    config = SparseMemoryConfig(task_type="CAUSAL_LM", trainable="values+scale", **config)
    for options, step in (({}, 1e-3), ({"rest_lr": 0.02}, 0.02)):
        model = get_peft_model(tiny_llama(), config)
        optimizer = RowAdamW(model, 0.8, top_t=5, rule="tf", **options)
        _step(model, optimizer)
        for memory in memory_layers(model).values():
            # the first step of AdamW is as large as its learning rate
            assert abs(float(memory.scale.detach()) - 1) == pytest.approx(step, rel=1e-2)


def test_the_norm_of_the_rows_gradients_is_stored(model):
    optimizer = RowSGD(model, 1.0, top_t=5, rule="tf", max_grad_norm=1e-3)
    assert optimizer.last_grad_norm is None
    twin = copy.deepcopy(model)
    _step(twin, RowSGD(twin, 1.0, top_t=5, rule="tf"))
    _step(model, optimizer)
    unclipped = torch.cat([m.values.flatten() for m in memory_layers(twin).values()]).norm()
    torch.testing.assert_close(optimizer.last_grad_norm, unclipped)


def _moved_by_adamw(model):
    """By layer, the rows that one step of torch's AdamW changes."""
    before = {name: memory.values.detach().clone() for name, memory in memory_layers(model).items()}
    other = torch.optim.AdamW([memory.values for memory in memory_layers(model).values()], 0.1)
    _step(model, other)
    return {n: (m.values != before[n]).any(1).nonzero().flatten() for n, m in memory_layers(model).items()}


@pytest.mark.parametrize("end", ["gone", "released", "kept"])
def test_a_later_optimizer_of_another_kind_trains(model, end, caplog):
    """It works as if there had been no row optimizer, whether that one still exists or not."""
    twin = copy.deepcopy(model)
    optimizer = RowAdamW(model, 0.1, top_t=5, rule="tf")
    model(**_batch(3)).loss.backward()
    optimizer.zero_grad()
    if end == "gone":
        del optimizer
    elif end == "released":
        optimizer.release()
    moved, expected = _moved_by_adamw(model), _moved_by_adamw(twin)
    for name, memory in memory_layers(model).items():
        assert len(moved[name]) > 5
        assert torch.equal(moved[name], expected[name])
        assert memory.log is None
    assert ("belonged to a RowAdamW" in caplog.text) == (end == "kept")
    if end == "kept":
        with pytest.raises(ValueError, match="another optimizer now owns the rows"):
            optimizer.step()


def test_the_row_optimizer_created_last_owns_the_rows(model):
    first = RowAdamW(model, 0.1, top_t=5, rule="tf")
    second = RowSGD(model, 0.1, top_t=5, rule="tf")
    model(**_batch()).loss.backward()
    with pytest.raises(ValueError, match="another optimizer now owns the rows"):
        first.step()
    del first
    second.step()
    assert all(memory.values.any() for memory in memory_layers(model).values())


def test_a_copy_of_the_model_has_no_optimizer(model):
    optimizer = RowAdamW(model, 0.1, top_t=5, rule="tf")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(memory.log is None for memory in memory_layers(twin).values())
    assert all(memory.log is not None for memory in optimizer.layers.values())


@pytest.mark.parametrize("trainable", ["values", "values+scale"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_gradient_scaler_only_skips_infinite_steps(tiny_llama, trainable, unscale, wrapped):
    config = {"num_keys": 8, "num_heads": 2, "top_k": 3, "key_dim": 8, "init_weights": False}
    config = SparseMemoryConfig(task_type="CAUSAL_LM", trainable=trainable, **config)
    model = get_peft_model(tiny_llama(), config)
    twin = copy.deepcopy(model)
    options = {"top_t": 5, "rule": "grad", "max_grad_norm": 1e-3}
    ours, plain = RowSGD(model, 1.0, **options), RowSGD(twin, 1.0, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    # AcceleratedOptimizer needs the state that this creates
    Accelerator(cpu=True)
    stepper = AcceleratedOptimizer(ours, device_placement=False, scaler=scaler) if wrapped else None

    def scaled_step(seed, factor=1.0):
        for _ in range(2):
            (scaler.scale(model(**_batch(seed)).loss) * factor).backward()
        if unscale:
            scaler.unscale_(ours)
        if stepper is not None:
            stepper.step()
        else:
            scaler.step(ours)
            scaler.update()
        model.zero_grad()

    for seed in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        scaled_step(seed, math.inf)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert scaler.get_scale() == 1024 / 2 ** (seed + 1)
        scaled_step(seed)
        for _ in range(2):
            twin(**_batch(seed)).loss.backward()
        plain.step()
        twin.zero_grad()
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)
    for name, memory in memory_layers(model).items():
        assert len(ours.selected[name]) == 5
        assert memory.log is not None


def test_alpha_and_saved_modules_train_with_adamw(tiny_llama):
    config = SparseMemoryConfig(
        task_type="CAUSAL_LM", num_keys=8, num_heads=2, top_k=3, key_dim=8, trainable="values+scale",
        init_weights=False, modules_to_save=["lm_head"],
    )  # fmt: skip
    model = get_peft_model(tiny_llama(tie_word_embeddings=False), config)
    optimizer = RowAdamW(model, 0.01, top_t=5, rule="tf")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        _step(model, optimizer)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    kinds = {name.rpartition(".")[2] if "sparse_memory" in name else name.split(".")[2] for name in changed}
    assert kinds == {"values", "scale", "lm_head"}
    reloaded = RowAdamW(model, 0.01, top_t=5, rule="tf")
    reloaded.load_state_dict(optimizer.state_dict())
    _step(model, reloaded)


def test_learning_rate_schedules_work(model):
    optimizer = RowSGD(model, 1.0, top_t=5, rule="tf")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    _step(model, optimizer)
    schedule.step()
    before = [m.values.detach().clone() for m in memory_layers(model).values()]
    _step(model, optimizer)
    assert all(torch.equal(b, m.values) for b, m in zip(before, memory_layers(model).values(), strict=True))


def test_a_step_without_reads_changes_nothing(model):
    optimizer = RowAdamW(model, 0.1, top_t=5, rule="tf")
    optimizer.step()
    assert not any(m.values.any() for m in memory_layers(model).values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"rest_lr": 0.0}, "rest_lr=0.0"),
        ({"top_t": 0}, "top_t=0"),
        ({"rule": "best"}, "rule='best'"),
        ({"rule": "kl"}, "needs background="),
        ({"moments": "block", "rule": "tf"}, "moments='block'"),
        ({"betas": (1.0, 0.9), "rule": "tf"}, r"betas\[0\]=1.0"),
        ({"max_grad_norm": -1, "rule": "tf"}, "max_grad_norm=-1"),
        ({"weight_decay": -1, "rule": "tf"}, "weight_decay=-1"),
    ],
)
def test_bad_options_are_named(model, options, words):
    with pytest.raises(ValueError, match=words):
        RowAdamW(model, **{"lr": 0.1, **options})


def test_background_of_another_addressing_is_refused(model):
    background = count_accesses(model, [_batch()])
    for memory in memory_layers(model).values():
        memory.keys.data.add_(1)
    with pytest.raises(ValueError, match="another addressing"):
        RowAdamW(model, 0.1, background=background)
    names = list(memory_layers(model))
    four = {name: torch.ones(4).long() for name in names}
    short = Background.from_counts(four, four, 1)
    with pytest.raises(ValueError, match="4 slots"):
        RowAdamW(model, 0.1, background=short)


def test_a_model_without_memory_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="no active sparse memory"):
        RowAdamW(tiny_llama(), 0.1)


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("rule", ["kl", "tfidf", "tf", "grad", "random"])
@pytest.mark.parametrize("num_keys", [8, 32])
def test_a_step_waits_for_the_device_once_per_layer(model, tiny_llama, make, rule, num_keys):
    """Twice with "grad". No float64 is used on the device, and the rows are the same as on the CPU."""
    config = SparseMemoryConfig(task_type="CAUSAL_LM", num_keys=num_keys, num_heads=2, top_k=3, key_dim=8)
    model = get_peft_model(tiny_llama(), config)
    background = count_accesses(model, [_batch(9)])
    options = {"top_t": 5, "rule": rule, "background": background, "max_grad_norm": 0.5}
    twin, device = copy.deepcopy(model), FakeDevice()
    here = make(twin, **options)
    layers = list(zip(memory_layers(model).values(), memory_layers(twin).values(), strict=True))
    with device:
        for memory, _ in layers:
            memory.values = torch.nn.Parameter(device.put(memory.values.detach()))
        there = make(model, **options)
    for seed in range(3):
        here.zero_grad()
        twin(**_batch(seed)).loss.backward()
        with device:
            for memory, other in layers:
                for entry in other.log.entries:
                    parts = [None if part is None else device.put(part) for part in entry]
                    memory.log.add(*parts, memory.num_slots)
            device.syncs.clear()
            there.step()
            assert sum(device.syncs.values()) == len(layers) * (2 if rule == "grad" else 1), device.syncs
        here.step()
    for memory, other in layers:
        assert other.values.any()
        assert torch.equal(memory.values.held, other.values)


def test_the_gradient_rule_computes_each_gradient_once(model, monkeypatch):
    asked = []

    def row_gradients(slots, *others):
        asked.append(slots)
        return original(slots, *others)

    original = log.row_gradients
    monkeypatch.setattr(log, "row_gradients", row_gradients)
    optimizer = RowAdamW(model, 0.1, top_t=5, rule="grad")
    _step(model, optimizer)
    assert len(asked) == len(memory_layers(model))


@pytest.mark.parametrize("rule", ["kl", "tfidf", "tf", "grad", "random", lambda counts, _: counts.double()])
def test_a_large_table_trains_the_rows_that_select_rows_names(tiny_llama, rule, monkeypatch):
    """Reads sorted by slot against counts of all slots: the same selection, gradients to rounding."""
    config = SparseMemoryConfig(task_type="CAUSAL_LM", num_keys=64, num_heads=2, top_k=3, key_dim=8)
    model = get_peft_model(tiny_llama(), config)
    background = count_accesses(model, [_batch(9)])
    twin = copy.deepcopy(model)
    options = {"top_t": 5, "rule": rule, "background": background}
    ours, naive = RowAdamW(model, 0.1, **options), RowAdamW(twin, 0.1, **options)
    for seed in range(3):
        for _ in range(2):
            model(**_batch(seed)).loss.backward()
            twin(**_batch(seed)).loss.backward()
        for name, memory in memory_layers(twin).items():
            counts = memory.log.counts(4096, memory.values.device)
            if rule in ("kl", "tfidf", "tf"):
                expected = select_rows(counts, background[name], top_t=5, rule=rule).sort().values
                assert torch.equal(naive._choose(name, memory, memory.log)[0], expected)
        ours.step()
        with monkeypatch.context() as patched:
            patched.setattr(log.ReadLog, "sorted_reads", lambda *_: None)
            naive.step()
        for name, rows in ours.selected.items():
            assert torch.equal(rows, naive.selected[name])
        ours.zero_grad()
        naive.zero_grad()
    for memory, other in zip(memory_layers(model).values(), memory_layers(twin).values(), strict=True):
        torch.testing.assert_close(memory.values, other.values)
