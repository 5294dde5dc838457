"""torch.compile and torch.export of a memory layer's forward pass."""

import pytest
import torch

from sparsemem.layer.memory import ProductKeyMemory
from tiny import scope_of

D = 8


@pytest.fixture(params=["open", "scope", "replacement", "silu"])
def memory(request):
    torch.manual_seed(0)
    kinds = {"replacement": {"mode": "replacement"}, "silu": {"value_gate": "silu"}}
    options = kinds.get(request.param, {})
    shape = {"num_keys": 5, "num_heads": 2, "top_k": 3, "key_dim": 8}
    memory = ProductKeyMemory(D, D, **shape, **options, init_weights=False).eval()
    if request.param in ("scope", "replacement"):
        memory.scope = scope_of(torch.eye(D)[:2], [0.1, 0.2], [0.5, 0.6])
    return memory


def _inputs(seq=6):
    return torch.randn(3, seq, D), torch.randn(3, seq, D)


@torch.no_grad()
def test_an_exported_layer_gives_the_same_for_any_length(memory):
    length = {1: torch.export.Dim("length", min=2, max=64)}
    exported = torch.export.export(memory, _inputs(), dynamic_shapes={"x": length, "base": length}).module()
    for seq in (6, 11):
        inputs = _inputs(seq)
        torch.testing.assert_close(exported(*inputs), memory(*inputs))
        if memory.has_scope:
            outside = memory.relevance(inputs[0].flatten(0, 1)) == 0
            assert outside.any()
            assert not outside.all()
            # law 9
            flat = (tensor.flatten(0, 1)[outside] for tensor in (exported(*inputs), inputs[1]))
            assert torch.equal(*flat)


@torch.no_grad()
def test_a_layer_compiles_to_one_graph(memory):
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager")
    inputs = _inputs()
    torch.testing.assert_close(compiled(*inputs), memory(*inputs))


@pytest.mark.filterwarnings("default")
def test_a_compiled_layer_trains():
    torch.manual_seed(0)
    shape = {"num_keys": 16, "num_heads": 2, "top_k": 3, "key_dim": 8}
    memory = ProductKeyMemory(D, D, **shape, init_weights=False)
    compiled = torch.compile(memory, backend="aot_eager")
    inputs, gradients = _inputs(), []
    for one in (memory, compiled):
        memory.zero_grad()
        one(*inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in memory.parameters()])
    for plain, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, graph, rtol=1e-4, atol=1e-5)
