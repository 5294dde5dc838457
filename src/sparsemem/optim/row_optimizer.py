"""RowOptimizer, the base class of RowSGD and RowAdamW: selects value rows and updates only these.

Each memory layer has a log of what the backward passes since the last step read. `step()` uses these logs. It
counts the accesses of the whole step, selects `top_t` rows per layer, computes the gradients of only these
rows, clips them by their norm, and updates the rows. All other rows and their optimizer state stay as they
are (law 2). The tables never get a `.grad`, so clipping and zeroing by Trainer do not affect them.

Several processes: counts are summed over processes, all processes use the selection of the first one, and
gradients are averaged, as in DDP. The model need not be wrapped in DDP. If it is, DDP sends neither tables
nor keys (`SparseMemoryModel._ddp_params_and_buffers_to_ignore`). DDP refuses a model of which it sends
nothing. So if only tables train, alpha of the first layer gets a gradient too, which nothing uses.

All other trainable parameters (alpha, keys, modules_to_save) are updated by torch's AdamW inside this
optimizer. They have their own learning rate, because rates that suit rows are too large for weights.

If several row optimizers are created for one table, the last one gets its gradients (see `ownership`).

fp16: `torch.amp.GradScaler` looks at `.grad`, but the gradients of rows are not there. So the optimizer has a
probe: a parameter with one element that belongs to no model. Its `.grad` shows the scaler whether a gradient
is infinite, and shows the optimizer by what factor the scaler divided. A step with infinite gradients is
skipped.

Reference: 2605.03229, stage 2. Deviation: the moments of a row change only when the row is selected. The
authors' code masks only gradients, so rows keep changing after they were deselected.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..adapter.memories import memory_layers
from ..background.background import Background
from ..layer.memory import ProductKeyMemory
from ..layer.values import ReadLog
from ..processes import averaged, several_expected, summed
from .selection import NEEDS_BACKGROUND, Rule, agreed, best_rows, check_selection, read_scores, step_reads
from .skipping import SkippedSteps

# Default learning rate of everything except rows: alpha, keys, modules_to_save.
REST_LR = 1e-3


class RowOptimizer(Optimizer):
    """Selects rows, clips their gradients and stores their state. A subclass updates rows in `_update`.

    Attributes:
        layers: the memory layers, by `memory_layers` name.
        read_logs: by layer, what the backward passes since the last step read.
        selected: by layer, the rows that the last step selected: int64 on the CPU, ascending.
        last_grad_norm: norm of the gradients of these rows before clipping, a float32 scalar. None before the
            first step.
        skipped: counts the steps that changed nothing because a gradient was NaN or infinite. After 10 in a
            row `step()` raises ValueError.
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
        check_positive("lr", defaults["lr"])
        check_positive("rest_lr", rest_lr)
        if max_grad_norm is not None:
            check_positive("max_grad_norm", max_grad_norm)
        self.layers: dict[str, ProductKeyMemory] = memory_layers(model)
        if rule in NEEDS_BACKGROUND and background is None:
            raise ValueError(f"rule={rule!r} needs background=; make one with calibrate or count_accesses")
        if background is not None:
            background.check(self.layers)
        # computed once, because it is a pass over all slots
        known = {} if background is None else {name: background[name].counts for name in self.layers}
        self._background_reads = {name: counts.sum().cpu() for name, counts in known.items()}
        frozen = [name for name, memory in self.layers.items() if not memory.values.requires_grad]
        if frozen:
            raise ValueError(
                f"model: the value rows of {frozen[0]} are frozen; load the adapter with is_trainable=True, "
                "or call model.set_adapter(name)"
            )
        sharded = [name for name, memory in self.layers.items() if isinstance(memory.values, DTensor)]
        if sharded:
            raise ValueError(
                f"model: the value rows of {sharded[0]} are sharded, but a row optimizer needs whole "
                "tables; give fully_shard ignored_params=, the parameters whose name has 'sparse_memory_'"
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
        self.skipped = SkippedSteps()
        self._bad = False
        super().__init__(groups, defaults)
        self.read_logs: dict[str, ReadLog] = {
            name: ReadLog(apart=self._apart, probe=self._probe) for name in self.layers
        }
        take_rows(self)
        first = next(iter(self.layers.values()))
        self._anchor = first if self._rest is None and several_expected() else None
        if self._anchor is not None:
            scale = self._anchor.scale.detach()
            del self._anchor.scale
            self._anchor.scale = nn.Parameter(scale)

    # Whether the logs keep the micro-batches of a step apart.
    _apart = False
    # With this, a GradScaler always calls `step()`, and sets the attributes `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

    def release(self) -> None:
        """Give the tables up: their gradients are ordinary dense gradients again, for other optimizers."""
        for name, memory in self.layers.items():
            let_go(weakref.ref(memory), self.read_logs[name])
        if self._anchor is not None:
            scale = self._anchor.scale.detach()
            del self._anchor.scale
            self._anchor.register_buffer("scale", scale)
            self._anchor = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Select rows and update them. If nothing was read since the last step, no row changes.

        Args:
            closure: computes the loss again, as in `torch.optim.Optimizer.step`.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: another optimizer owns the rows now.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._overflowed():
            self._clear_logs()
            return loss
        self._bad = False
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
        norm = self._clip([gradient for _, gradient in chosen.values()], others)
        # on an accelerator a look at the norm would wait for it; there the probe has to do
        bad = self._bad or (norm.device.type == "cpu" and not bool(norm.isfinite()))
        if bad:
            self._clear_logs()
        self.skipped.add(bad)
        if bad:
            return loss
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

    def skip_step(self) -> None:
        """Make the next `step()` change nothing, as for a gradient that is not finite."""
        self._probe.grad = torch.full_like(self._probe, torch.inf)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._clear_logs()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        # torch casts state to the dtype of the parameter. In bfloat16, slot ids and moments would be
        # destroyed.
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
        """The rows of one layer that this step changes, and their gradient.

        The selection runs on the CPU, so a step waits for the device once per layer, or twice with rule
        "grad".

        Returns:
            rows [t] int64 on the CPU, ascending; gradient [t, d_out] float32 on the device of the table.
        """
        values = memory.values
        # whether a gradient is not finite travels with the counts: to all processes, and to the CPU
        read, counts, bad = step_reads(log, memory.num_slots, self._not_finite().to(values.device))
        # with a GradScaler, the scaler decides
        self._bad |= bad and not hasattr(self, "found_inf")
        gradients = self._gradients(log, read, values) if self.rule == "grad" else None
        norms = None if gradients is None else gradients.norm(dim=-1).cpu()
        background = self.background[name] if self.background is not None else None
        options = (self.rule, norms, self.generator, self._background_reads.get(name))
        scores = read_scores(read, counts, memory.num_slots, background, *options)
        rows = agreed(best_rows(read, scores, self.top_t).sort().values, values.device)
        if gradients is None:
            return rows, self._gradients(log, rows, values)
        return rows, gradients[torch.searchsorted(read, rows).to(values.device)]

    def _gradients(self, log: ReadLog, rows: Tensor, values: Tensor) -> Tensor:
        """Gradient [t, d_out] of rows, without the factor of a GradScaler, averaged over processes."""
        gradient = log.row_gradients(rows, values)
        if self._probe.grad is not None:
            # the probe's gradient was 1 before the scaler's unscale_; without a scaler it may be infinite
            factor = self._probe.grad.where(self._probe.grad.isfinite(), 1.0)
            if getattr(self, "grad_scale", None) is not None:
                factor = factor / self.grad_scale.to(factor.device)  # type: ignore[attr-defined]
            gradient.mul_(factor.to(gradient.device))
        return averaged(gradient)

    def _overflowed(self) -> bool:
        """Whether a GradScaler found an infinite gradient in any process."""
        if not hasattr(self, "found_inf"):
            return False
        found = torch.as_tensor(self.found_inf, dtype=torch.float32).clone()  # type: ignore[attr-defined]
        return bool(summed(found) > 0)

    def _not_finite(self) -> Tensor:
        """[1] int64 on the probe's device: 1 if a gradient of this process is NaN or infinite."""
        seen = self._probe.grad
        bad = torch.zeros_like(self._probe) if seen is None else ~seen.isfinite()
        return bad.detach().long()

    def _log(self, name: str, memory: ProductKeyMemory) -> ReadLog:
        if memory.log is not self.read_logs[name]:
            raise ValueError(
                f"{type(self).__name__}: another optimizer now owns the rows of {name}; "
                "call step() of that one, or make a new row optimizer"
            )
        return self.read_logs[name]

    def _clip(self, rows: list[Tensor], others: list[Tensor]) -> Tensor:
        """Clip all gradients by their common norm, and store the norm of the rows' gradients.

        Returns:
            The common norm, a float32 scalar.
        """
        self.last_grad_norm = get_total_norm(rows)
        norm = get_total_norm([self.last_grad_norm, *(gradient.float() for gradient in others)])
        if self.max_grad_norm is None:
            return norm
        # clip_grads_with_norm_ scales the `.grad` of parameters, but the gradients of rows are not there.
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
        for gradient in (*rows, *others):
            gradient.mul_(scale.to(gradient.device))
        return norm

    def _clear_logs(self) -> None:
        self._probe.grad = None
        for log in self.read_logs.values():
            log.clear()

    def _update(self, table: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update the rows [t] of a table in place from their gradient [t, d_out]; `group` has the options."""
        raise NotImplementedError


def _check(name: str, value: float, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} must be {allowed}")


def check_positive(name: str, value: float) -> None:
    _check(name, value, value > 0, "greater than 0")


def check_not_negative(name: str, value: float) -> None:
    _check(name, value, value >= 0, "0 or greater")


def check_fraction(name: str, value: float) -> None:
    _check(name, value, 0 <= value < 1, "at least 0 and less than 1")


logger = logging.getLogger(__name__)


# All row optimizers. Each may still own tables.
_row_optimizers: "weakref.WeakSet[RowOptimizer]" = weakref.WeakSet()
# The handle of the hook on all other optimizers, once it is registered.
_watching: list[Any] = []


def take_rows(optimizer: "RowOptimizer") -> None:
    """Make the optimizer the owner of its layers' rows: their reads are recorded in its logs."""
    for name, memory in optimizer.layers.items():
        log = memory.log = optimizer.read_logs[name]
        weakref.finalize(optimizer, let_go, weakref.ref(memory), log)
    _row_optimizers.add(optimizer)
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_hand_over))


def _hand_over(optimizer: Optimizer, _args: tuple, _kwargs: dict) -> None:
    """Before an optimizer of another kind steps on a table: write the table's gradient to `.grad`."""
    if not _row_optimizers or optimizer in _row_optimizers:
        return
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for rows in list(_row_optimizers):
        for name, memory in rows.layers.items():
            log = rows.read_logs[name]
            if id(memory.values) in wanted and memory.log is log:
                logger.warning(
                    "%s steps on the rows of %s, which belonged to a %s; now only the %s updates them",
                    type(optimizer).__name__, name, type(rows).__name__, type(optimizer).__name__,
                )  # fmt: skip
                memory.values.grad = log.table_gradient(memory.values.detach())
                let_go(weakref.ref(memory), log)


def let_go(memory: "weakref.ref[ProductKeyMemory]", log: ReadLog) -> None:
    """Empty a log that no optimizer reads any more, and remove it from the memory if it is still there."""
    log.clear()
    layer = memory()
    if layer is not None and layer.log is log:
        layer.log = None
