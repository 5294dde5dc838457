"""Which modules of a model a memory reads, whatever the architecture."""

import pytest
from tinies import tiny

from sparsemem.adapter.blocks import default_targets, state_modules
from sparsemem.background.question_key import DEPTHS, key_layers
from tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "opt", "mixtral", "gpt_oss"])
def test_states_at_a_depth_are_inputs_of_one_module_in_each_block(architecture):
    model = tiny_model(architecture, num_layers=30)
    paths = state_modules(model, (0.53, 0.67, 0.77))
    blocks = [[int(part) for part in path.split(".") if part.isdigit()] for path in paths]
    assert blocks == [[16], [20], [23]]
    assert all(model.get_submodule(path) is not None for path in paths)
    assert key_layers(model) == state_modules(model, DEPTHS)


def test_depths_of_a_shallow_model_fall_together():
    assert state_modules(tiny_model(num_layers=2), (0.1, 0.53, 0.67, 1.0)) == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]


def test_blocks_that_run_with_images_alone_are_not_read():
    # blocks 3, 8, 13, ... of Llama 3.2 Vision
    assert default_targets(tiny("mllama")) == ["model.layers.2.mlp"]
    assert state_modules(tiny("mllama"), (0.1, 0.8)) == ["model.layers.0.mlp", "model.layers.2.mlp"]
