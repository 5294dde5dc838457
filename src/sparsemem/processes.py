"""Sum, average and broadcast between the processes that train one model (torchrun).

With one process, the functions return their argument unchanged.
"""

import os
from typing import Any

import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """The number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def several_expected() -> bool:
    """Whether several processes train, or will once torch.distributed is initialised (torchrun)."""
    return num_processes() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this is the first process, which makes decisions and writes files.

    Before torch.distributed is initialised, the answer comes from torchrun's environment variable RANK.
    """
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
    """The values of the first process, in place. The tensor must have the same shape in all processes."""
    if num_processes() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def object_of_first(value: Any) -> Any:
    """The value of the first process. It must be picklable."""
    if num_processes() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]
