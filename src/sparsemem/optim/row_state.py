"""The optimizer state of value rows. Only rows that were ever selected have one."""

import torch
from torch import Tensor


def rows_of(
    state: dict[str, Tensor], table: Tensor, rows: Tensor, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Extend the optimizer state of a table by those of `rows` that are new.

    The state has "slots", the rows that were ever selected: [n] int64, ascending, on the CPU. For each
    entry of `shapes` it has one tensor [n, *shape] on the device of the table; new rows start at 0.

    Args:
        state: of this table, changed in place.
        table: [num_slots, d_out].
        rows: [t] int64 on the CPU, ascending.
        shapes: by name, the shape of the state of one row.

    Returns:
        The state, and for each of `rows` its index in the state, [t] on the device of the table.
    """
    if "slots" not in state:
        state["slots"] = rows.new_zeros(0)
        for key, shape in shapes.items():
            state[key] = torch.zeros(0, *shape, device=table.device)
    slots = state["slots"]
    fresh = rows[~torch.isin(rows, slots)]
    if len(fresh):
        state["slots"], order = torch.cat([slots, fresh]).sort()
        order = order.to(table.device)
        for key in shapes:
            added = state[key].new_zeros(len(fresh), *state[key].shape[1:])
            state[key] = torch.cat([state[key], added])[order]
    return state, torch.searchsorted(state["slots"], rows).to(table.device)
