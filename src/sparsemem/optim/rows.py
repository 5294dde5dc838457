"""RowSGD and RowAdamW: optimizers that select rows and change these alone.

`step()` consumes what the backward passes since the last step left in the memory layers' read logs: it counts
the accesses of the whole step, selects `top_t` rows per layer, computes the gradient of these rows alone,
clips by the norm over them, and updates them. Every other row, and every other row's optimizer state, is not
touched: law 2. The tables never get a `.grad`, so Trainer's own clipping and zeroing find nothing there.

Several processes: counts are summed over processes, all take the first one's selection, and gradients are
averaged, as DDP would; the model need not be wrapped in DDP, and must not be when only value tables train.

Whatever else is trainable (alpha, keys, modules_to_save) gets torch's plain AdamW inside the same optimizer,
at a rate of its own: steps as large as the rows' would ruin weights.

A table's gradient goes to the optimizer that was made last. It is an ordinary gradient again when that
optimizer is gone, or when another kind of optimizer steps on the table.

fp16: rows' gradients are not in `.grad`, where `torch.amp.GradScaler` looks. So the optimizer holds a probe,
a parameter of one number that is in no model: its `.grad` tells the scaler of infinite gradients, and tells
the optimizer by how much the scaler divides. A step with infinite gradients is skipped.

Reference: 2605.03229, stage 2. Deviation: moments belong to selected rows and rest with them; the authors'
release masks gradients only, so that rows keep moving after they were deselected.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..adapter.model import memory_layers
from ..background.background import Background
from ..layer.memory import ProductKeyMemory
from ..layer.values import ReadLog
from ..processes import averaged, num_processes, of_first, summed
from .selection import NEEDS_BACKGROUND, Rule, check_selection, select_rows

logger = logging.getLogger(__name__)

MOMENTS = ("row", "element", "table")
# Of what trains beside rows: alpha, keys, modules_to_save.
REST_LR = 1e-3


class RowOptimizer(Optimizer):
    """Selection, clipping and state of rows; a subclass says how a row moves (`_update`).

    Attributes:
        layers: the memory layers, by `memory_layers` name.
        selected: by layer, the rows of the last step, int64 on the CPU, ascending.
        last_grad_norm: norm of these rows' gradients before clipping, a float32 scalar; None before a step.
    """

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        *,
        rest_lr: float,
        top_t: int,
        rule: Rule,
        background: Background | None,
        max_grad_norm: float | None,
        seed: int,
    ) -> None:
        check_selection(top_t, rule)
        _positive("lr", defaults["lr"])
        _positive("rest_lr", rest_lr)
        if max_grad_norm is not None:
            _positive("max_grad_norm", max_grad_norm)
        self.layers: dict[str, ProductKeyMemory] = memory_layers(model)
        if rule in NEEDS_BACKGROUND and background is None:
            raise ValueError(f"rule={rule!r} needs background=; make one with calibrate or count_accesses")
        if background is not None:
            background.check(self.layers)
        frozen = [name for name, memory in self.layers.items() if not memory.values.requires_grad]
        if frozen:
            raise ValueError(
                f"model: the value rows of {frozen[0]} are frozen; load the adapter with is_trainable=True, "
                "or call model.set_adapter(...)"
            )
        self.top_t, self.rule, self.background, self.max_grad_norm = top_t, rule, background, max_grad_norm
        self.generator = torch.Generator().manual_seed(seed)
        tables = [memory.values for memory in self.layers.values()]
        self._probe = nn.Parameter(torch.zeros(1, device=tables[0].device))
        held = {id(table) for table in tables}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
        groups: list[dict[str, Any]] = [{"params": [*tables, self._probe]}]
        self._rest = AdamW(rest, lr=rest_lr, weight_decay=0.0) if rest else None
        if self._rest is not None:
            groups.append({**self._rest.defaults, "params": rest})
        self.selected: dict[str, Tensor] = {}
        self.last_grad_norm: Tensor | None = None
        super().__init__(groups, defaults)
        self._logs: dict[str, ReadLog] = {}
        for name, memory in self.layers.items():
            log = self._logs[name] = memory.log = ReadLog(apart=self._apart, probe=self._probe)
            weakref.finalize(self, _let_go, weakref.ref(memory), log)
        _row_optimizers.add(self)
        _watch_other_optimizers()

    # Whether the micro-batches of a step are looked at one by one.
    _apart = False
    # A GradScaler then calls every step, and says in `grad_scale` and `found_inf` what it knows.
    _step_supports_amp_scaling = True

    def release(self) -> None:
        """Leave the tables to other optimizers: their gradients are ordinary ones again."""
        for name, memory in self.layers.items():
            _let_go(weakref.ref(memory), self._logs[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Select and update. With nothing read since the last step, value rows stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._overflowed():
            self._clear_logs()
            return loss
        chosen = {
            name: self._choose(name, memory, self._log(name, memory)) for name, memory in self.layers.items()
        }
        others = (
            [p.grad for p in self._rest.param_groups[0]["params"] if p.grad is not None] if self._rest else []
        )
        for gradient in others:
            if getattr(self, "grad_scale", None) is not None:
                gradient.div_(self.grad_scale.to(gradient.device))  # type: ignore[attr-defined]
            averaged(gradient)
        self._clip([gradient for _, gradient in chosen.values()], others)
        group = self.param_groups[0]
        for name, memory in self.layers.items():
            rows, gradient = chosen[name]
            if len(rows):
                self._update(memory.values, rows, gradient, group)
        if self._rest is not None:
            self._rest.state, self._rest.param_groups = self.state, self.param_groups[1:]
            self._rest.step()
        self._clear_logs()
        self.selected = {name: rows for name, (rows, _) in chosen.items()}
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._clear_logs()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        # torch casts state to the parameter's dtype: in bfloat16, slot ids and moments would be destroyed.
        tables = self.param_groups[0]["params"][:-1]
        for index, table in enumerate(tables):
            saved = state_dict["state"].get(index)
            if saved is not None:
                self.state[table] = {
                    key: value.to("cpu" if key == "slots" else table.device, copy=True)
                    for key, value in saved.items()
                }
        self.generator.set_state(state_dict["generator"].cpu())

    def _choose(self, name: str, memory: ProductKeyMemory, log: ReadLog) -> tuple[Tensor, Tensor]:
        """Rows of one layer that this step changes, ascending, on the CPU; and their gradient [t, d_out].

        Which rows move is known on the CPU alone, so that a step waits for the device once per layer, and
        once more with rule "grad".
        """
        values = memory.values
        counts = summed(log.counts(memory.num_slots, values.device)).cpu()
        background = self.background[name] if self.background is not None else None
        options: dict[str, Any] = {"top_t": self.top_t, "rule": self.rule, "generator": self.generator}
        if self.rule != "grad":
            rows = _agreed(select_rows(counts, background, **options).sort().values, values.device)
            return rows, self._gradients(log, rows, values)
        read = counts.nonzero().flatten()
        gradients = self._gradients(log, read, values)
        norms = torch.zeros(memory.num_slots)
        norms[read] = gradients.norm(dim=-1).cpu()
        rows = select_rows(counts, background, gradient_norms=norms, **options).sort().values
        rows = _agreed(rows, values.device)
        return rows, gradients[torch.searchsorted(read, rows).to(values.device)]

    def _gradients(self, log: ReadLog, rows: Tensor, values: Tensor) -> Tensor:
        """Gradient [t, d_out] of rows, without a scaler's factor, averaged over processes."""
        gradient = log.row_gradients(rows.to(values.device), values)
        if self._probe.grad is not None:
            # a scaler's unscale_ has divided the probe's gradient, 1; without a scaler it may be infinite
            factor = self._probe.grad.where(self._probe.grad.isfinite(), 1.0)
            if getattr(self, "grad_scale", None) is not None:
                factor = factor / self.grad_scale.to(factor.device)  # type: ignore[attr-defined]
            gradient.mul_(factor.to(gradient.device))
        return averaged(gradient)

    def _overflowed(self) -> bool:
        """Whether a GradScaler has found an infinite gradient, in any process."""
        if not hasattr(self, "found_inf"):
            return False
        found = torch.as_tensor(self.found_inf, dtype=torch.float32).clone()  # type: ignore[attr-defined]
        return bool(summed(found) > 0)

    def _log(self, name: str, memory: ProductKeyMemory) -> ReadLog:
        if memory.log is not self._logs[name]:
            raise ValueError(
                f"{type(self).__name__}: another optimizer has taken the rows of {name}; "
                "step that one, or make a new row optimizer"
            )
        return self._logs[name]

    def _clip(self, rows: list[Tensor], others: list[Tensor]) -> None:
        """Clip by the norm over all of them, and keep the rows' own."""
        self.last_grad_norm = _norm(rows)
        if self.max_grad_norm is None:
            return
        norm = _norm([self.last_grad_norm, *others])
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
        for gradient in (*rows, *others):
            gradient.mul_(scale.to(gradient.device))

    def _clear_logs(self) -> None:
        self._probe.grad = None
        for log in self._logs.values():
            log.clear()

    def _rows_of(
        self, table: Tensor, rows: Tensor, shapes: dict[str, tuple[int, ...]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The table's state, grown to hold `rows`, and where these lie in it.

        State: "slots" [n] ascending on the CPU, the rows ever selected, and one tensor [n, ...] per entry of
        shapes on the table's device.
        """
        state = self.state[table]
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

    def _update(self, table: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class RowSGD(RowOptimizer):
    """SGD with momentum on the selected rows. A row's momentum rests while the row is not selected.

    Args:
        model: with memory layers; rows of the active adapter's tables train.
        lr, momentum, weight_decay: as torch.optim.SGD; decay and momentum act on selected rows only.
        rest_lr: of what trains beside rows (alpha, keys, modules_to_save), by AdamW without weight decay.
        top_t, rule, background: see `select_rows`.
        max_grad_norm: clip by the norm over the selected rows and whatever else trains; None: no clipping.
        seed: of rule "random".

    Raises:
        ValueError: an option out of range, a rule without its background, or one of another addressing.
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
        _fraction("momentum", momentum)
        _not_negative("weight_decay", weight_decay)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        options: dict[str, Any] = {"top_t": top_t, "rule": rule, "background": background}
        options |= {"rest_lr": rest_lr, "max_grad_norm": max_grad_norm, "seed": seed}
        super().__init__(model, defaults, **options)

    def _update(self, table: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        where = rows.to(table.device)
        current = table[where].float()
        gradient = gradient + group["weight_decay"] * current
        if group["momentum"]:
            state, place = self._rows_of(table, rows, {"momentum": (table.shape[1],)})
            gradient = group["momentum"] * state["momentum"][place] + gradient
            state["momentum"][place] = gradient
        table[where] = (current - group["lr"] * gradient).to(table.dtype)


class RowAdamW(RowOptimizer):
    """AdamW on the selected rows; bias correction counts each row's own steps.

    Args:
        model, rest_lr, top_t, rule, background, max_grad_norm, seed: as `RowSGD`.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; decay acts on selected rows only.
        moments: "row": one second moment per row, of its mean squared gradient; "element": one per element;
            "table": one per value table, so that a step's rows keep the proportions of their gradients.

    Raises:
        ValueError: as `RowSGD`.
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
            _fraction(name, beta)
        _positive("eps", eps)
        _not_negative("weight_decay", weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moments": moments}
        options: dict[str, Any] = {"top_t": top_t, "rule": rule, "background": background}
        options |= {"rest_lr": rest_lr, "max_grad_norm": max_grad_norm, "seed": seed}
        super().__init__(model, defaults, **options)

    def _shapes(self, table: Tensor, group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Of each row's state."""
        width, kind = table.shape[1], group["moments"]
        second = {} if kind == "table" else {"exp_avg_sq": (width,) if kind == "element" else (1,)}
        return {"exp_avg": (width,), "steps": (1,), **second}

    def _update(self, table: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        kind = group["moments"]
        state, place = self._rows_of(table, rows, self._shapes(table, group))
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
        step = first_moment / (1 - beta1**steps) / (second_moment.sqrt() + group["eps"])
        where = rows.to(table.device)
        current = table[where].float()
        table[where] = (current * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * step).to(
            table.dtype
        )


# Those that may hold tables, and whether other optimizers are watched for taking these.
_row_optimizers: weakref.WeakSet[RowOptimizer] = weakref.WeakSet()
_watching: list[Any] = []


def _watch_other_optimizers() -> None:
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_hand_over))


def _hand_over(optimizer: Optimizer, _args: tuple, _kwargs: dict) -> None:
    """Before another optimizer's step on a table: the table's gradient is where that one looks for it."""
    if isinstance(optimizer, RowOptimizer) or not _row_optimizers:
        return
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for rows in list(_row_optimizers):
        for name, memory in rows.layers.items():
            log = rows._logs[name]
            if id(memory.values) in wanted and memory.log is log:
                logger.warning(
                    "%s steps on the rows of %s, which belonged to a %s; from now on they are its alone",
                    type(optimizer).__name__, name, type(rows).__name__,
                )  # fmt: skip
                memory.values.grad = log.table_gradient(memory.values.detach())
                _let_go(weakref.ref(memory), log)


def _let_go(memory: "weakref.ref[ProductKeyMemory]", log: ReadLog) -> None:
    """A memory whose log has nobody to read it any more keeps none."""
    log.clear()
    layer = memory()
    if layer is not None and layer.log is log:
        layer.log = None


def _agreed(rows: Tensor, device: torch.device) -> Tensor:
    """The rows that the first process has chosen; their number is that of the summed counts everywhere."""
    return rows if num_processes() == 1 else of_first(rows.to(device)).cpu()


def _norm(tensors: list[Tensor]) -> Tensor:
    """Over all of them, on the first one's device."""
    return torch.stack([t.float().norm().to(tensors[0].device) for t in tensors]).norm()


def _check(name: str, value: float, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} must be {allowed}")


def _positive(name: str, value: float) -> None:
    _check(name, value, value > 0, "greater than 0")


def _not_negative(name: str, value: float) -> None:
    _check(name, value, value >= 0, "0 or greater")


def _fraction(name: str, value: float) -> None:
    _check(name, value, 0 <= value < 1, "at least 0 and less than 1")
