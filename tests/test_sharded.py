"""A base model that FSDP2 shards over processes, with tables that stay whole, and its DCP checkpoint."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparsemem import RowAdamW, SparseMemoryConfig, memory_layers
from started import several
from tiny import SMALL, batch, tiny_model

STEPS = 3


def made():
    return get_peft_model(tiny_model(), SparseMemoryConfig(**SMALL)).train()


def sharded(model, but=lambda name: "sparse_memory_" in name):
    """As docs/guide.md says."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {parameter for name, parameter in model.named_parameters() if but(name)}
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    return fully_shard(model, mesh=mesh, ignored_params=whole)


def tables(model):
    return {name: memory.values.detach().clone() for name, memory in memory_layers(model).items()}


def save(folder):
    dist.init_process_group("gloo")
    rank, model = dist.get_rank(), sharded(made())
    optimizer = RowAdamW(model, 0.3, top_t=6, rule="grad")
    for step in range(STEPS):
        model(**batch(10 * step + rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/checkpoint")
    torch.save(tables(model), f"{folder}/rows.{rank}")
    dist.destroy_process_group()


def load(folder):
    dist.init_process_group("gloo")
    model = sharded(made())
    for memory in memory_layers(model).values():
        memory.values.data.fill_(9)
    state = get_model_state_dict(model)
    for tensor in state.values():
        tensor.detach().fill_(9)
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(model, state)
    torch.save((tables(model), model(**batch()).loss.item()), f"{folder}/loaded.{dist.get_rank()}")
    dist.destroy_process_group()


def refused():
    dist.init_process_group("gloo")
    model = sharded(made(), but=lambda _: False)
    with pytest.raises(ValueError, match="ignored_params"):
        RowAdamW(model, 0.3, top_t=6, rule="grad")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_base_trains_the_rows_of_one_process_and_reloads_on_another_number(tmp_path):
    several(2, save, tmp_path)
    one = made()
    optimizer = RowAdamW(one, 0.3, top_t=6, rule="grad")
    for step in range(STEPS):
        for rank in range(2):
            (one(**batch(10 * step + rank)).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second = (torch.load(tmp_path / f"rows.{rank}") for rank in range(2))
    for name, table in tables(one).items():
        assert table.any()
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], table, rtol=1e-3, atol=1e-4)
    for number in (1, 3):
        several(number, load, tmp_path)
        for rank in range(number):
            held, loss = torch.load(tmp_path / f"loaded.{rank}")
            assert all(torch.equal(held[name], first[name]) for name in first)
            assert loss == pytest.approx(one(**batch()).loss.item(), rel=1e-3)


@pytest.mark.slow
def test_a_sharded_table_is_refused(tmp_path):
    several(2, refused)
