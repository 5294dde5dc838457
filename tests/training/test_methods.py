import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparsemem import (
    RowAdamW,
    SparseMemoryConfig,
    calibrate,
    clear_scope,
    memory_layers,
    observe,
    set_scope,
    set_trainable,
)
from sparsemem.adapter.memories import gated_layers
from sparsemem.data.records import batches, encode
from sparsemem.training import methods
from sparsemem.training.loading import RunData
from sparsemem.training.methods import memory_config, retrofit_config
from sparsemem.training.options import Options

SIZES = {"num_keys": 8, "num_heads": 2, "top_k": 4, "key_dim": 8}


@pytest.fixture
def taught(tokenizer):
    return batches(encode([{"prompt": "Velmora?", "completion": "Ostrinth"}] * 3, tokenizer), 2, 0)


@pytest.fixture
def words(tokenizer):
    return encode([{"text": f"{n} plain words, {n * n}."} for n in range(40)], tokenizer)


@pytest.fixture
def general(words):
    return batches(words, 8, 0)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """Prepare a model on one fact, told three times."""
    examples = encode([{"prompt": "Velmora?", "completion": "Ostrinth"}] * 3, tokenizer)

    def run(model, method, background=None, **options):
        data = RunData(tokenizer, examples, general=background)
        return methods.prepare(model, data, Options(method, **options), tmp_path)

    return run


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_trains_all_seven_projections(tiny_llama, prepare):
    model, optimizer, before, _ = prepare(tiny_llama(), "lora")
    names = trained_names(model)
    assert len(names) == 4 * 7 * 2
    assert all("lora_" in name for name in names)
    assert optimizer.defaults["weight_decay"] == 0
    assert optimizer.defaults["lr"] == 2e-4
    assert before is None


def test_full_trains_everything(tiny_llama, prepare):
    base = tiny_llama().requires_grad_(False)
    model, optimizer, _, _ = prepare(base, "full", lr=1e-3)
    assert model is base
    assert trained_names(model) == dict(model.named_parameters()).keys()
    assert optimizer.defaults["lr"] == 1e-3


def test_the_memory_reads_late_layers_but_for_what_is_chosen(tiny_llama):
    def made(**chosen):
        return memory_layers(get_peft_model(tiny_llama(), memory_config(**chosen)))

    *_, name = made()
    assert list(made()) == ["model.layers.2.mlp", "model.layers.3.mlp"]
    assert made()[name].num_slots == 64**2
    assert made()[name].write == "last"
    assert list(made(layers_to_transform=[0, 2], top_k=None)) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    # no more reads than there are slots
    assert made(num_keys=3)[name].top_k == 9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smf", "smf-open"])
def test_sparse_memory_trains_value_rows(tiny_llama, taught, method, prepare, words):
    model, optimizer, before, _ = prepare(tiny_llama(), method, background=words)
    assert isinstance(optimizer, RowAdamW)
    assert all(name.endswith("values") for name in trained_names(model))
    assert [memory.has_scope for memory in gated_layers(memory_layers(model)).values()] == [method == "smf"]
    assert before is not None
    assert not any(value.numel() for name, value in before.items() if "scope_" in name)
    ids = taught[0]["input_ids"]
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)


def test_a_model_with_a_memory_trains_on_and_its_scope_grows(tiny_llama, general, prepare):
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SIZES))
    background = calibrate(model, general)
    prepare(model, "smf", background=background)
    sizes = [len(memory.scope_centres) for memory in memory_layers(model).values()]
    again, _, before, _ = prepare(model, "smf", background=background)
    assert again is model
    assert [len(memory.scope_centres) for memory in memory_layers(model).values()] == [
        2 * size for size in sizes
    ]
    assert before is not None
    with pytest.raises(ValueError, match="clear_scope"):
        prepare(model, "smf-open", background=background)
    clear_scope(model)
    prepare(model, "smf-open", rule="tf")


def test_text_calibrates_an_unwritten_memory_only(tiny_llama, prepare, words):
    model = get_peft_model(tiny_llama(), SparseMemoryConfig(**SIZES))
    prepare(model, "smf-open", background=words)
    next(iter(memory_layers(model).values())).values.data[0] = 1
    with pytest.raises(ValueError, match="the memory is in use"):
        prepare(model, "smf-open", background=words)


def test_what_does_not_fit_is_refused(tiny_llama, taught, general, prepare, words):
    lora = get_peft_model(tiny_llama(), LoraConfig())
    memory = get_peft_model(tiny_llama(), SparseMemoryConfig(**SIZES))
    background = calibrate(memory, general)
    set_scope(memory, taught, background)
    for model, method, options, message in [
        (tiny_llama(), "sgd", {}, "allowed are smf, smf-open, lora, peft, full"),
        (tiny_llama(), "smf", {"rule": "best", "background": words}, "rule='best'"),
        (tiny_llama(), "smf", {"top_t": 0, "background": words}, "top_t=0"),
        (tiny_llama(), "smf", {}, "background=None"),
        (tiny_llama(), "smf", {"background": background}, "the model has no memory"),
        (lora, "smf", {"background": words}, "adapter of type"),
        (lora, "full", {}, "has an adapter"),
        (memory, "lora", {}, "adapter of type"),
        (tiny_llama(), "peft", {"lr": 1e-4}, "it has none"),
        (lora, "peft", {}, "no rate of its own"),
        (memory, "peft", {"lr": 1e-4}, "this is a sparse memory"),
        (memory, "smf", {}, "needs background="),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(model, method, **options)


PAPER = {"num_keys": 6, "num_heads": 2, "top_k": 3, "key_dim": 8}


@pytest.mark.parametrize("mode", ["additive", "replacement"])
def test_the_papers_two_stages(tiny_llama, taught, general, mode, prepare):
    """Stage 1 trains all of the memory by dense gradients, stage 2 only value rows."""
    model = get_peft_model(tiny_llama(), retrofit_config(tiny_llama(), mode=mode, **PAPER))
    assert list(memory_layers(model)) == [f"model.layers.{index}.mlp" for index in (1, 2, 3)]
    _, dense, before, _ = prepare(model, "dense")
    assert before is None
    assert dense.defaults["lr"] == 5e-4
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(**general[0]).loss.backward()
    dense.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    memory = ("values", "query", "query_bias", "keys", "key_bias", "scale", "gate_in", "gate_out")
    parts = {name.rsplit(".", 1)[1] for name in moved}
    # in replacement mode there is no MLP output; in both modes a bias of all keys has no gradient
    assert parts <= set(memory)
    assert parts >= {"values", "query", "keys", "scale", "gate_in", "gate_out"}

    set_trainable(model, "values")
    background = observe(model, general)
    rows, optimizer, snapshot, _ = prepare(model, "smf-open", background=background, rule="kl")
    assert rows is model
    assert snapshot is not None
    assert all(name.endswith("values") for name in trained_names(model))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(**taught[0]).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved
    assert all(name.endswith(".values") for name in moved)


def test_what_trains_is_chosen_anew(tiny_llama, general):
    model = get_peft_model(tiny_llama(), retrofit_config(tiny_llama(), **PAPER))
    logits = model(**general[0]).logits
    for trainable, parts in (("values+scale", {"values", "scale"}), ("values", {"values"})):
        set_trainable(model, trainable)
        assert {name.rsplit(".", 1)[1] for name in trained_names(model)} == parts
        assert model.peft_config["default"].trainable == trainable
        assert torch.equal(model(**general[0]).logits, logits)
    with pytest.raises(ValueError, match="trainable='all' must be one of"):
        set_trainable(model, "all")


def test_dense_training_needs_a_memory(tiny_llama, prepare):
    with pytest.raises(ValueError, match="add one"):
        prepare(tiny_llama(), "dense")


def test_counts_are_of_the_model_as_it_is_and_states_of_the_base(tiny_llama, general):
    model = get_peft_model(tiny_llama(), retrofit_config(tiny_llama(), mode="replacement", **PAPER))
    unwritten = get_peft_model(tiny_llama(), SparseMemoryConfig(**PAPER))
    addresses = [memory.keys.clone() for memory in memory_layers(model).values()]
    seen, first = observe(model, general), calibrate(unwritten, general)
    last = list(memory_layers(model))[-1]
    assert torch.equal(seen[last].mean, first[last].mean)
    assert not torch.equal(seen[last].counts, first[last].counts)
    assert all(
        torch.equal(memory.keys, keys)
        for memory, keys in zip(memory_layers(model).values(), addresses, strict=True)
    )


def test_quirks_are_of_sparse_memory_alone(tiny_llama, prepare):
    with pytest.raises(
        ValueError, match=r"quirks=\['padding'\] is for sparse memory only and method is 'lora'"
    ):
        prepare(tiny_llama(), "lora", quirks=("padding",))
