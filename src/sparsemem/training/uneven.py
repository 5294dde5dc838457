"""The last batches of an epoch on several processes, where there are too few records for all.

accelerate fills them with records from the beginning of the epoch, so that each process has a batch. These
would be trained twice. Here they are taken out again, so that an epoch is the same on any number of
processes. A process may be left with no record; it then takes part in the step with a loss of 0.
"""

from typing import Any

import torch
from torch import Tensor, nn


def num_own(num_examples: int, batch_size: int, rank: int, num_processes: int) -> int:
    """How many records of a process's last batch in an epoch are not there to fill it up."""
    rest = num_examples % (batch_size * num_processes) or batch_size * num_processes
    return min(max(rest - rank * batch_size, 0), batch_size)


def first_records(batch: dict[str, Any], number: int) -> dict[str, Any]:
    """A batch of `collate` or `collate_states` without the records after the first `number`.

    A batch of `collate` keeps at least one record, which has no labels if `number` is 0.
    """
    if "sizes" in batch:
        sizes = batch["sizes"][:number]
        positions = int(sizes.sum())
        states = batch["states"]
        states = states[:positions] if isinstance(states, Tensor) else states[:number]
        labels = batch["labels"][:positions]
        return {"states": states, "shift_labels": labels, "labels": labels, "sizes": sizes}
    kept = {key: value[: max(number, 1)] for key, value in batch.items()}
    if number == 0:
        kept["labels"] = torch.full_like(kept["labels"], -100)
    return kept


def no_loss(model: nn.Module) -> Tensor:
    """A loss of 0 that gives every trained parameter a gradient of 0, as other processes give it one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.stack([parameter.flatten()[0].float() * 0 for parameter in trained]).sum()
