import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sparsemem import ProductKeyMemory, SparseMemoryConfig, memory_layers
from sparsemem.adapter.blocks import default_targets
from sparsemem.adapter.model import SparseMemoryLayer, hand_out_mask
from tiny import ARCHITECTURES, HIDDEN, tiny_batch, tiny_model

SMALL = {"num_keys": 8, "num_heads": 2, "top_k": 4, "key_dim": 8, "task_type": "CAUSAL_LM"}
RANDOM = {**SMALL, "init_weights": False}
MLP_NAME = {"llama": "mlp", "qwen2": "mlp", "gpt2": "mlp", "gpt_neox": "mlp", "opt": "fc2"}


class Chain(nn.Module):
    """10 -> 20 -> 2, as in PEFT's own tests."""

    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x):
        return self.lin1(self.lin0(x).relu())


def with_memory(model=None, **fields):
    return get_peft_model(
        tiny_model() if model is None else model, SparseMemoryConfig(**{**RANDOM, **fields})
    )


def masks_of_calls(model):
    """For each later call of the model: the masks that its memories have when the head runs."""
    seen, memories = [], list(memory_layers(model).values())
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *_: seen.append([memory.token_mask for memory in memories]))
    return seen


@torch.no_grad()
def logits(model, batch=None):
    return model(**(tiny_batch() if batch is None else batch)).logits


def trainable(model):
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


# Where memories go


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "opt"])
def test_default_targets_are_three_late_mlps(architecture):
    model = tiny_model(architecture, num_layers=30)
    targets = default_targets(model, None)
    assert [target.split(".")[-2:] for target in targets] == [
        [str(index), MLP_NAME[architecture]] for index in (23, 26, 28)
    ]
    assert all(isinstance(model.get_submodule(target), nn.Module) for target in targets)


@pytest.mark.parametrize(("num_layers", "expected"), [(1, [0]), (2, [1]), (4, [2, 3]), (24, [18, 21, 22])])
def test_shallow_models_get_fewer_layers(num_layers, expected):
    targets = default_targets(tiny_model(num_layers=num_layers), None)
    assert [int(target.split(".")[2]) for target in targets] == expected


@pytest.mark.parametrize("layers", [[0, 3], [3, 0], 2])
def test_named_layers(layers):
    model = with_memory(layers_to_transform=layers)
    wanted = sorted([layers] if isinstance(layers, int) else layers)
    assert list(memory_layers(model)) == [f"model.layers.{index}.mlp" for index in wanted]
    assert model.peft_config["default"].layers_to_transform == layers


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"layers_to_transform=\[1, 4\]: no layer 4, allowed are 0 to 3"):
        with_memory(layers_to_transform=[1, 4])


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_a_mixture_of_experts_is_one_mlp(architecture):
    base = tiny_model(architecture)
    before = logits(base)
    model = with_memory(base, init_weights=True)
    assert [(m.d_in, m.d_out) for m in memory_layers(model).values()] == [(HIDDEN, HIDDEN)] * 2
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(with_memory(tiny_model(architecture))), before)


def test_experts_and_vision_blocks_are_not_the_decoder_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = nn.ModuleList(Block() for _ in range(7))
            self.text = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})

        def get_decoder(self):
            return self.text

    assert default_targets(Towers(), [0, 2]) == ["text.layers.0.mlp", "text.layers.2.mlp"]
    del Towers.get_decoder
    assert default_targets(Towers(), 1) == ["text.layers.1.mlp"]
    assert default_targets(Towers(), 2, "layers") == ["text.layers.2.mlp"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["mlp"]}, [f"model.layers.{i}.mlp" for i in range(4)]),
        (
            {"target_modules": ["mlp"], "layers_to_transform": [1, 3]},
            ["model.layers.1.mlp", "model.layers.3.mlp"],
        ),
        (
            {"target_modules": ["mlp"], "layers_to_transform": 1, "layers_pattern": "layers"},
            ["model.layers.1.mlp"],
        ),
        (
            {"target_modules": r".*\.[02]\.mlp\.down_proj"},
            [f"model.layers.{i}.mlp.down_proj" for i in (0, 2)],
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2}, ["model.layers.2.self_attn.q_proj"]),
        ({"target_modules": ["mlp"], "exclude_modules": r".*\.[0-2]\.mlp"}, ["model.layers.3.mlp"]),
        ({"target_modules": ["lm_head"], "write": "own"}, ["lm_head"]),
    ],
)
def test_targets_in_pefts_own_forms(fields, expected):
    model = with_memory(**fields)
    assert list(memory_layers(model)) == expected
    assert not torch.equal(logits(model), logits(tiny_model()))


def test_all_linear_counts_layers_that_have_a_memory_already():
    model = with_memory(target_modules="all-linear")
    assert len(memory_layers(model)) == 4 * 7
    assert "lm_head" not in memory_layers(model)
    model.add_adapter("second", SparseMemoryConfig(**{**RANDOM, "target_modules": "all-linear"}))
    model.set_adapter("second")
    assert len(memory_layers(model)) == 4 * 7


def test_widths_are_those_of_the_target():
    model = get_peft_model(
        Chain(), SparseMemoryConfig(**{**RANDOM, "task_type": None}, target_modules=["lin0"])
    )
    (layer,) = (m for m in model.modules() if isinstance(m, SparseMemoryLayer))
    assert (layer.in_features, layer.out_features) == (10, 20)
    assert memory_layers(model)["lin0"].values.shape == (64, 20)
    assert model(torch.randn(3, 10)).shape == (3, 2)
    assert model(torch.randn(10)).shape == (2,)
    assert model(torch.randn(2, 4, 3, 10)).shape == (2, 4, 3, 2)


def test_a_target_without_linear_maps_is_refused():
    with pytest.raises(ValueError, match=r"model\.embed_tokens \(Embedding\) holds no linear map"):
        with_memory(target_modules=["embed_tokens"])


def test_a_module_called_by_keyword_or_returning_more_than_its_output():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, hidden_states):
            return self.down(self.up(hidden_states)), "router"

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd()

        def forward(self, x):
            return self.odd(hidden_states=x)

    torch.manual_seed(0)
    base, x = Around(), torch.randn(2, 3, 4)
    expected = base(x)[0]
    model = get_peft_model(base, SparseMemoryConfig(**{**RANDOM, "task_type": None}, target_modules=["odd"]))
    output, router = model(x)
    assert router == "router"
    torch.testing.assert_close(
        output, expected + memory_layers(model)["odd"].read(x.view(-1, 4)).view(2, 3, 4)
    )


# What the memory does to the output


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "opt"])
def test_no_op_at_insertion_and_while_disabled(architecture):
    """Law 1."""
    batch = tiny_batch()
    before = logits(tiny_model(architecture), batch)
    assert torch.equal(logits(with_memory(tiny_model(architecture), init_weights=True), batch), before)
    model = with_memory(tiny_model(architecture))
    written = logits(model, batch)
    assert not torch.allclose(written, before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), before)
        with model.disable_adapter():
            assert torch.equal(logits(model, batch), before)
        assert torch.equal(logits(model, batch), before)
    assert torch.equal(logits(model, batch), written)
    assert torch.equal(logits(model.unload(), batch), before)


@pytest.mark.parametrize("value_gate", ["none", "silu"])
@pytest.mark.parametrize("mode", ["additive", "replacement"])
@pytest.mark.parametrize("target", ["mlp", "q_proj", "down_proj"])
def test_output_adds_the_memory_to_the_target_or_replaces_it(mode, value_gate, target):
    base = tiny_model(num_layers=1)
    fields = {"mode": mode, "value_gate": value_gate, "scale_init": 0.5, "write": "own"}
    model = with_memory(base, target_modules=[target], **fields)
    (layer,) = (m for m in model.modules() if isinstance(m, SparseMemoryLayer))
    (memory,) = memory_layers(model).values()
    x = torch.randn(2, 5, layer.in_features)
    with torch.no_grad():
        y = memory.read(x.flatten(0, 1)).view(2, 5, layer.out_features)
        torch.testing.assert_close(layer(x), y if mode == "replacement" else layer.base_layer(x) + y)
        memory.values.zero_()
        assert torch.equal(layer(x), 0 * y if mode == "replacement" else layer.base_layer(x))


def test_two_active_adapters_add_up():
    model = with_memory(layers_to_transform=[2], write="own")
    wide = {**RANDOM, "num_keys": 5, "num_heads": 1, "top_k": 3, "write": "own"}
    model.add_adapter("wide", SparseMemoryConfig(**wide))
    (layer,) = (
        m for m in model.modules() if isinstance(m, SparseMemoryLayer) and len(m.sparse_memory_layers) > 1
    )
    x = torch.randn(1, 3, HIDDEN)
    with torch.no_grad():
        base = layer.base_layer(x)
        alone = []
        for name in ("default", "wide"):
            model.set_adapter(name)
            alone.append(layer(x) - base)
        model.base_model.set_adapter(["default", "wide"])
        torch.testing.assert_close(layer(x), base + alone[0] + alone[1])


# What trains


FROZEN = {"query", "query_bias", "keys", "key_bias", "scale"}


@pytest.mark.parametrize(
    ("option", "expected"),
    [("values", {"values"}), ("values+scale", {"values", "scale"}), ("memory", {"values", *FROZEN})],
)
def test_what_trains_and_what_is_a_buffer(option, expected):
    model = with_memory(trainable=option)
    assert trainable(model) == expected
    for memory in memory_layers(model).values():
        assert {name for name, _ in memory.named_parameters()} == expected
        assert FROZEN - expected <= {name for name, _ in memory.named_buffers()}
    logits_with_grad = model(**tiny_batch()).logits
    logits_with_grad.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_peft_calls_never_make_frozen_tensors_trainable():
    model = with_memory(value_gate="silu")
    model.add_adapter("other", SparseMemoryConfig(**RANDOM))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.model.layers.{i}.mlp.sparse_memory_layers.default.values" for i in (2, 3)
    }
    with model.disable_adapter():
        assert trainable(model) == set()
    model.set_adapter("other")
    model.set_requires_grad(["default", "other"], requires_grad=True)
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    model.train()
    assert trainable(model) == {"values"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)


def test_modules_to_save_train_with_the_rows():
    model = with_memory(modules_to_save=["lm_head"])
    assert trainable(model) == {"values", "weight"}
    assert {n for n, p in model.named_parameters() if p.requires_grad and "values" not in n} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }


# Adding, switching and deleting adapters


def test_adapters_of_different_shape_are_switched_and_deleted():
    model = with_memory(layers_to_transform=[2])
    model.add_adapter("b", SparseMemoryConfig(**{**RANDOM, "num_keys": 5, "layers_to_transform": [1, 2]}))
    first = logits(model)
    assert [m.num_slots for m in memory_layers(model).values()] == [64]
    model.set_adapter("b")
    second = logits(model)
    assert [m.num_slots for m in memory_layers(model).values()] == [25, 25]
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("b")
    assert torch.equal(logits(model), first)
    assert not any(".b." in name for name in model.state_dict())
    model.add_adapter("b", SparseMemoryConfig(**RANDOM))
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("default")
    assert list(memory_layers(model)) == ["model.layers.2.mlp", "model.layers.3.mlp"]
    model.delete_adapter("b")
    assert torch.equal(logits(model.base_model), logits(tiny_model()))
    with pytest.raises(ValueError, match="has no active sparse memory"):
        memory_layers(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: next(m for m in model.modules() if isinstance(m, BaseTunerLayer)).merge(),
    ],
)
def test_merging_is_refused(call):
    model = with_memory()
    before = logits(model)
    with pytest.raises(ValueError, match="cannot be merged into the base weights"):
        call(model)
    assert torch.equal(logits(model), before)


def test_a_batch_that_mixes_memories_with_write_own_is_refused():
    model = with_memory(write="own")
    model.add_adapter("b", SparseMemoryConfig(**RANDOM, write="own"))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"adapter_names=\['default', 'b'\]: one batch cannot mix"):
            call(**tiny_batch(), adapter_names=["default", "b"])


def test_a_target_after_the_blocks_cannot_write_last():
    with pytest.raises(ValueError, match="lm_head does not lie in a decoder block"):
        with_memory(target_modules=["lm_head"])


def test_unload_restores_the_base_for_a_new_memory():
    base = tiny_model()
    names = list(base.state_dict())
    unloaded = with_memory(base, modules_to_save=["lm_head"]).unload()
    assert unloaded is base
    assert list(base.state_dict()) == names
    assert not any(isinstance(m, BaseTunerLayer) for m in base.modules())
    assert not base._forward_pre_hooks
    again = with_memory(base, init_weights=True)
    assert torch.equal(logits(again), logits(tiny_model()))
    assert len(memory_layers(again)) == 2


def test_wrapping_twice_warns_as_in_peft():
    model = with_memory(init_weights=True)
    with (
        pytest.warns(UserWarning, match="modify a model with PEFT for a second time"),
        pytest.warns(UserWarning, match="Already found a `peft_config` attribute"),
    ):
        twice = get_peft_model(model.get_base_model(), SparseMemoryConfig(**SMALL), adapter_name="two")
    assert torch.equal(logits(twice), logits(tiny_model()))
    assert model.unload() is twice.unload()
    assert not model.get_base_model()._forward_pre_hooks


def test_base_tensors_have_the_names_that_lora_gives_them():
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["down_proj"], layers_to_transform=[2]))
    ours = with_memory(target_modules=["down_proj"], layers_to_transform=[2])
    assert [n for n in ours.state_dict() if "sparse_memory_" not in n] == [
        n for n in lora.state_dict() if "lora_" not in n
    ]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_complete_and_independent(duplicate):
    model = with_memory()
    twin, before = duplicate(model), logits(model)
    assert torch.equal(logits(twin), before)
    for memory in memory_layers(twin).values():
        memory.values.data.zero_()
    assert torch.equal(logits(model), before)
    seen = masks_of_calls(twin)
    twin(**tiny_batch(length=5))
    assert [mask.shape[1] for mask in seen[-1]] == [5, 5]
    assert torch.equal(logits(twin.unload()), logits(tiny_model()))
    assert torch.equal(logits(model), before)


def test_the_model_survives_torch_save(tmp_path):
    model = with_memory()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded), logits(model))


def test_injected_without_a_peft_model():
    model = inject_adapter_in_model(SparseMemoryConfig(**RANDOM), tiny_model())
    assert list(memory_layers(model)) == ["model.layers.2.mlp", "model.layers.3.mlp"]
    assert trainable(model) == {"values"}
    assert not torch.equal(logits(model), logits(tiny_model()))


# Precision


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_rows_follow_the_base_model_into_half_precision(dtype, upcast):
    model = get_peft_model(
        tiny_model().to(dtype), SparseMemoryConfig(**RANDOM), autocast_adapter_dtype=upcast
    )
    for memory in memory_layers(model).values():
        assert memory.values.dtype == (torch.float32 if upcast else dtype)
        assert {b.dtype for b in memory.buffers() if b.is_floating_point()} == {torch.float32}
    output = model(**tiny_batch())
    assert output.logits.dtype == dtype
    output.logits.float().square().mean().backward()
    assert all(memory.values.grad.abs().sum() > 0 for memory in memory_layers(model).values())


def test_casting_the_model_does_not_change_the_addressing():
    model = with_memory()
    x = torch.randn(9, HIDDEN)
    before = [memory.address(x) for memory in memory_layers(model).values()]
    model.to(torch.bfloat16)
    for memory, (slots, weights) in zip(memory_layers(model).values(), before, strict=True):
        assert torch.equal(memory.address(x)[0], slots)
        assert torch.equal(memory.address(x)[1], weights)


def test_a_forward_in_inference_mode_does_not_break_training():
    model = with_memory(trainable="memory", top_k=3, num_keys=7)
    with torch.inference_mode():
        model(**tiny_batch())
    model(**tiny_batch()).logits.sum().backward()


# The attention mask


def test_memories_get_the_mask_of_each_call():
    model = with_memory()
    seen, batch = masks_of_calls(model), tiny_batch()
    model(**batch)
    model(input_ids=batch["input_ids"])
    model.base_model.model(batch["input_ids"], batch["attention_mask"])
    model.base_model.model(batch["input_ids"], torch.zeros(2, 1, 7, 7))
    # without gradients nothing is counted
    logits(model, batch)
    for masks, known in zip(seen, (True, False, True, False, False), strict=True):
        for mask in masks:
            assert torch.equal(mask, batch["attention_mask"].bool()) if known else mask is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_later_call_of_a_part_of_the_model_uses_no_old_mask(fails):
    model, batch = with_memory(), tiny_batch()
    if fails:
        with pytest.raises(IndexError):
            model(input_ids=batch["input_ids"] + 1000, attention_mask=batch["attention_mask"])
    else:
        model(**batch)
    assert all(memory.token_mask is None for memory in memory_layers(model).values())


def test_masks_are_moved_to_the_device_of_each_memory():
    model, batch = with_memory(), tiny_batch()
    first, second = memory_layers(model).values()
    second.to("meta")
    hand_out_mask(model.base_model.model, (), batch)
    assert [memory.token_mask.device.type for memory in (first, second)] == ["cpu", "meta"]


def test_memories_are_product_key_memories():
    assert all(isinstance(m, ProductKeyMemory) for m in memory_layers(with_memory()).values())


def test_own_runs_nothing_below_the_lowest_memory_in_its_backward_pass():
    """Layers 1 and 3 of 4 have a memory, so the backward pass ends at the read of layer 1."""
    model = with_memory(write="own", layers_to_transform=[1, 3], trainable="values").train()
    ran, outputs = set(), {}

    def watch(name):
        def forward(_module, _args, out):
            out = out[0] if isinstance(out, tuple) else out
            outputs[name] = out.requires_grad
            if out.requires_grad:
                out.register_hook(lambda _: ran.add(name))

        return forward

    for name, module in model.get_base_model().named_modules():
        if name.startswith(("model.layers.", "model.embed_tokens")) and "sparse_memory" not in name:
            module.register_forward_hook(watch(name))
    model(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
    below = (
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1.self_attn",
        "model.layers.1.mlp.base_layer",
    )
    lower = [name for name in outputs if name.startswith(below)]
    assert len(lower) > 10
    assert not [name for name in lower if outputs[name] or name in ran]
    assert {"model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp"} <= ran
