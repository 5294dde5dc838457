"""Several processes that train one model (torchrun): what they sum, average and take from the first of them.

Every function is the identity where there is one process.
"""

import os
from typing import Any

import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that decides and writes; torchrun says so before they have met."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def summed(tensor: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if num_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def averaged(tensor: Tensor) -> Tensor:
    """The mean over processes, in place."""
    return summed(tensor).div_(num_processes()) if num_processes() > 1 else tensor


def of_first(tensor: Tensor) -> Tensor:
    """The first process's values, in place; the shapes agree."""
    if num_processes() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def object_of_first(value: Any) -> Any:
    """Anything that pickles, as the first process has it."""
    if num_processes() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]
