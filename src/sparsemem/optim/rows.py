"""RowSGD and RowAdamW: row optimizers that update rows as SGD or AdamW does."""

from typing import Any

import torch
from torch import Tensor, nn

from ..background.background import Background
from ..choices import MOMENTS
from .row_optimizer import REST_LR, RowOptimizer, check_fraction, check_not_negative, check_positive
from .selection import Rule


class RowSGD(RowOptimizer):
    """SGD with momentum on the selected rows. The momentum of a row changes only when the row is selected.

    Args:
        model: a model with memory layers. The rows of the active adapter train.
        lr, momentum, weight_decay: as for torch.optim.SGD. They apply to selected rows only.
        rest_lr: learning rate of everything else that trains (alpha, keys, modules_to_save). It is updated by
            AdamW without weight decay.
        top_t, rule, background: as for `select_rows`, for each layer; `background` is that of all layers.
        max_grad_norm: clip to this norm, computed over the gradients of the selected rows and of everything
            else that trains. None: no clipping.
        seed: for rule "random".

    Raises:
        ValueError: an option is out of range, the rule needs a background and there is none, the background
            does not fit the memory, the model has no active sparse memory, or its rows are frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rest_lr: float = REST_LR,
        top_t: int = 512,
        rule: Rule = "kl",
        background: Background | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        check_fraction("momentum", momentum)
        check_not_negative("weight_decay", weight_decay)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        options: dict[str, Any] = {"top_t": top_t, "rule": rule, "background": background}
        options |= {"rest_lr": rest_lr, "max_grad_norm": max_grad_norm, "seed": seed}
        super().__init__(model, defaults, **options)

    def _update(self, table: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        where = rows.to(table.device)
        current = table[where].float()
        gradient = gradient + group["weight_decay"] * current
        if group["momentum"]:
            state, place = rows_of(self.state[table], table, rows, {"momentum": (table.shape[1],)})
            gradient = group["momentum"] * state["momentum"][place] + gradient
            state["momentum"][place] = gradient
        table[where] = (current - group["lr"] * gradient).to(table.dtype)


class RowAdamW(RowOptimizer):
    """AdamW on the selected rows. Bias correction uses the number of steps in which the row was selected.

    Args:
        model, rest_lr, top_t, rule, background, max_grad_norm, seed: as for `RowSGD`.
        lr, betas, eps, weight_decay: as for torch.optim.AdamW. They apply to selected rows only.
        moments: how many second moments there are. "row": one per row, of the mean of its squared gradient.
            "element": one per element, as in AdamW. "table": one per value table, so that larger gradients
            give larger updates, in proportion.

    Raises:
        ValueError: as for `RowSGD`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: str = "row",
        rest_lr: float = REST_LR,
        top_t: int = 512,
        rule: Rule = "kl",
        background: Background | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        if moments not in MOMENTS:
            raise ValueError(f"moments={moments!r} must be one of {', '.join(map(repr, MOMENTS))}")
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            check_fraction(name, beta)
        check_positive("eps", eps)
        check_not_negative("weight_decay", weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moments": moments}
        options: dict[str, Any] = {"top_t": top_t, "rule": rule, "background": background}
        options |= {"rest_lr": rest_lr, "max_grad_norm": max_grad_norm, "seed": seed}
        super().__init__(model, defaults, **options)

    def _shapes(self, table: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shape of the state of one row, by name."""
        width, kind = table.shape[1], group["moments"]
        second = {} if kind == "table" else {"exp_avg_sq": (width,) if kind == "element" else (1,)}
        return {"exp_avg": (width,), "steps": (1,), **second}

    def _update(self, table: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        kind = group["moments"]
        state, place = rows_of(self.state[table], table, rows, self._shapes(table, group))
        beta1, beta2 = group["betas"]
        steps = state["steps"][place] + 1
        first_moment = torch.lerp(state["exp_avg"][place], gradient, 1 - beta1)
        state["steps"][place], state["exp_avg"][place] = steps, first_moment
        if kind == "table":
            second = state.setdefault("table", torch.zeros(2, device=table.device))
            second += torch.stack([gradient.square().mean() - second[0], 1 - second[1]]) * (1 - beta2)
            second_moment = second[0] / second[1]
        else:
            square = gradient.square() if kind == "element" else gradient.square().mean(1, keepdim=True)
            state["exp_avg_sq"][place] = torch.lerp(state["exp_avg_sq"][place], square, 1 - beta2)
            second_moment = state["exp_avg_sq"][place] / (1 - beta2**steps)
        # in place, because new tensors of this size cost more than the arithmetic
        step = (first_moment / (1 - beta1**steps)).div_(second_moment.sqrt() + group["eps"]).mul_(group["lr"])
        where = rows.to(table.device)
        current = table[where].float()
        if group["weight_decay"]:
            current.mul_(1 - group["lr"] * group["weight_decay"])
        table[where] = current.sub_(step).to(table.dtype)


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
