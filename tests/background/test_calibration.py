import logging

import pytest
import torch
from peft import get_peft_model

from sparsemem import (
    Background,
    SparseMemoryConfig,
    calibrate,
    clear_scope,
    count_accesses,
    memory_layers,
    observe,
    scope_gate,
    set_scope,
)
from sparsemem.background import calibration, scoping
from sparsemem.background.calibration import addressing_report
from tiny import SMALL, batch, tiny_model


def test_calibrate_gives_the_same_result_for_the_same_seed(tiny_llama):
    runs = []
    for seed in (0, 0, 1):
        model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
        calibrate(model, [batch(s) for s in range(4)], seed=seed)
        runs.append([memory.keys.clone() for memory in memory_layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_calibrate_refuses_a_memory_with_written_rows(model, background):
    memories = memory_layers(model)
    list(memories.values())[-1].values.data[3, 0] = 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(**batch(50)).logits
    with pytest.raises(ValueError, match=r"has rows that are not zero.*revert its patches first"):
        calibrate(model, [batch(7)], seed=5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**batch(50)).logits, logits)
    # counting does not change the addressing, so it is allowed
    count_accesses(model, [batch(7)])


def test_a_corpus_too_large_to_keep_is_read_twice(tiny_llama, monkeypatch):
    made = []
    for kept_bytes in (calibration.KEPT_BYTES, 0):
        monkeypatch.setattr(calibration, "KEPT_BYTES", kept_bytes)
        model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
        made.append(calibrate(model, [batch(s) for s in range(4)]))
    assert made[0].corpus == made[1].corpus
    for name, layer in made[0].layers.items():
        assert torch.equal(layer.counts, made[1][name].counts)
        assert torch.equal(layer.df, made[1][name].df)


def test_a_surrounding_autocast_changes_nothing(tiny_llama):
    made = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            background = calibrate(model, [batch(s) for s in range(4)])
            set_scope(model, [batch(50)], background)
        made.append([memory.state_dict() for memory in memory_layers(model).values()])
    for plain, cast in zip(*made, strict=True):
        assert all(torch.equal(plain[key], cast[key]) for key in plain)


def test_statistics_do_not_depend_on_how_the_corpus_is_batched(model):
    whole = batch(3, rows=8)
    parts = [{key: value[i : i + 2] for key, value in whole.items()} for i in range(0, 8, 2)]
    one, four = calibrate(model, [whole]), calibrate(model, parts)
    for name in memory_layers(model):
        torch.testing.assert_close(one[name].mean, four[name].mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(one[name].covariance, four[name].covariance, rtol=1e-4, atol=1e-7)
        assert one[name].num_states == four[name].num_states == int(whole["attention_mask"].sum())


def test_counts_are_the_reads_of_unpadded_tokens(model, background):
    for name, memory in memory_layers(model).items():
        tokens = sum(int(batch(seed)["attention_mask"].sum()) for seed in range(8))
        assert int(background[name].counts.sum()) == tokens * memory.num_heads * memory.top_k
        assert int(background[name].df.max()) <= background[name].num_batches == 8
        again = count_accesses(model, [batch(seed) for seed in range(8)])
        assert torch.equal(background[name].counts, again[name].counts)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(architecture):
    """Law 5. GPT-2 has absolute positions. Without position_ids it would count padding as positions."""
    model = get_peft_model(tiny_model(architecture), SparseMemoryConfig(**SMALL))
    general = [batch(seed) for seed in range(6)]
    background = calibrate(model, general)
    right = batch(20)
    left = {key: value.clone() for key, value in right.items()}
    for value in left.values():
        value[0] = value[0].roll(4)
    sides = []
    for part in (right, left):
        counts = count_accesses(model, [part])
        set_scope(model, [part], background)
        gates = {name: memory.scope for name, memory in memory_layers(model).items()}
        sides.append([(counts[name].counts, gates[name].copy()) for name in gates if gates[name] is not None])
    for (counts, scope), (other_counts, other) in zip(*sides, strict=True):
        assert torch.equal(counts, other_counts)
        torch.testing.assert_close(scope.centres, other.centres, rtol=1e-3, atol=1e-4)


def test_counting_ignores_left_padding_too(model, background):
    right = batch(1)
    left = {
        "input_ids": torch.roll(right["input_ids"][:1], 4, 1),
        "attention_mask": torch.roll(right["attention_mask"][:1], 4, 1),
    }
    for name, layer in count_accesses(model, [left]).layers.items():
        memory = memory_layers(model)[name]
        assert int(layer.counts.sum()) == 8 * memory.num_heads * memory.top_k


def test_an_iterator_is_refused(model):
    with pytest.raises(ValueError, match="can be read only once"):
        calibrate(model, (batch(s) for s in range(3)))
    with pytest.raises(ValueError, match="is empty"):
        calibrate(model, [])


def test_a_collapsed_addressing_gives_a_warning(tiny_llama, caplog):
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL | {"num_keys": 32}))
    one = batch(0, rows=1)
    with caplog.at_level(logging.WARNING):
        background = calibrate(model, [one])
    assert "collapsed" in caplog.text
    report = addressing_report(next(iter(background.layers.values())))
    assert report["used"] < 0.5


def test_a_scope_is_set_from_training_positions_and_cleared(model, background):
    data = batch(50)
    set_scope(model, [data], background)
    positions = 3 * 6
    first, last = memory_layers(model).values()
    assert not first.has_scope
    assert last.scope_centres.shape == (positions, last.d_in)
    assert last.scope_centres.norm(dim=-1).sub(1).abs().max() < 1e-5
    assert (last.scope_lo < last.scope_hi).all()
    # answer starts and other positions of answers have different thresholds
    assert len(last.scope_lo.unique()) == 2
    clear_scope(model)
    assert not any(
        memory.has_scope or memory.scope_centres.numel() for memory in memory_layers(model).values()
    )


def test_taught_states_are_in_scope(model, background):
    data = batch(50)
    set_scope(model, [data], background)
    (g,) = scope_gate(model, data).values()
    assert (g[:, 4:7] > 0.5).float().mean() > 0.8


def test_with_write_own_each_layer_has_a_scope(tiny_llama):
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SMALL, write="own"))
    background = calibrate(model, [batch(seed) for seed in range(8)])
    set_scope(model, [batch(50)], background)
    assert all(memory.has_scope for memory in memory_layers(model).values())
    assert len(scope_gate(model, batch(50))) == 2


def test_each_task_adds_at_most_a_fixed_number_of_centres(model, background, monkeypatch):
    monkeypatch.setattr(scoping, "CENTRES_SIZE", 10)
    for number in (1, 2, 3):
        set_scope(model, [batch(50 + number)], background, extend=True)
        *_, memory = memory_layers(model).values()
        assert len(memory.scope_centres) == 10 * number


def test_each_kind_of_known_state_gets_its_share(model, background, monkeypatch):
    """Many answer starts do not push out the states at other positions of answers."""
    monkeypatch.setattr(scoping, "KNOWN_SIZE", 40)
    *_, name = memory_layers(model)
    layer = background[name]
    assert len(layer.starts) >= 40
    set_scope(model, [batch(50)], background)
    *_, memory = memory_layers(model).values()
    known = [
        scoping.whiten(part[:20], memory.scope_mean, memory.scope_whitener)
        for part in (layer.starts, layer.answers)
    ]
    assert torch.equal(memory.scope_known, torch.cat(known))


def test_every_module_keeps_its_training_mode(model, background):
    """Law 1 with dropout: a module that was in evaluation mode stays in it."""
    model.train()
    layers = model.get_base_model().model.layers
    layers[0].eval()
    modes = [module.training for module in model.modules()]
    for call in (
        lambda: calibrate(model, [batch(1)]),
        lambda: observe(model, [batch(1)]),
        lambda: count_accesses(model, [batch(1)]),
        lambda: set_scope(model, [batch(1)], calibrate(model, [batch(seed) for seed in range(8)])),
    ):
        call()
        assert [module.training for module in model.modules()] == modes


def test_only_a_part_of_a_large_data_set_is_read(model, background, monkeypatch):
    data, read = [batch(seed) for seed in range(50, 60)], []
    inputs = scoping.layer_inputs
    monkeypatch.setattr(scoping, "layer_inputs", lambda m, batches: inputs(m, read_by(batches, read)))
    set_scope(model, data, background)
    assert len(read) == 10
    # 18 supervised positions per batch
    monkeypatch.setattr(scoping, "TAUGHT_SIZE", 60)
    read.clear()
    set_scope(model, data, background)
    assert len(read) == 4
    with pytest.raises(ValueError, match="batches: is empty"):
        set_scope(model, [], background)


def read_by(batches, read):
    for one in batches:
        read.append(one)
        yield one


def test_extending_keeps_the_first_scope(model, background):
    set_scope(model, [batch(50)], background)
    *_, memory = memory_layers(model).values()
    before = memory.scope
    set_scope(model, [batch(51)], background, extend=True)
    assert len(memory.scope_centres) == 36
    assert torch.equal(memory.scope_centres[:18], before.centres)


def test_scope_needs_labels_states_and_a_supervised_position(model, background):
    with pytest.raises(ValueError, match="no 'labels'"):
        set_scope(model, [batch(labels=False)], background)
    nothing = batch()
    nothing["labels"][:] = -100
    with pytest.raises(ValueError, match="no position is supervised"):
        set_scope(model, [nothing], background)
    with pytest.raises(ValueError, match="holds only counts"):
        set_scope(model, [batch()], count_accesses(model, [batch()]))


def test_background_saves_and_loads(model, background, tmp_path):
    background.save(tmp_path / "background.safetensors")
    loaded = Background.load(tmp_path / "background.safetensors")
    assert loaded.corpus == background.corpus
    for name, layer in background.layers.items():
        for key in ("counts", "df", "mean", "covariance", "sample", "starts", "answers"):
            assert torch.equal(getattr(layer, key), getattr(loaded[name], key))
        assert layer.addressing == loaded[name].addressing
