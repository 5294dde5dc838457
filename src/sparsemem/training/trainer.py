"""The Trainer of `finetune`: it trains the whole model, or a tail memory on cached states."""

import ctypes
import gc
import inspect
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ..optim.rows import RowOptimizer
from ..optim.skipping import SkippedSteps
from ..precision import autocast, takes
from ..processes import summed
from .cached import TailHead
from .checkpoints import list_files


class FinetuneTrainer(Trainer):
    """A Trainer that prints nothing, supports row optimizers, and computes logits only where there is loss.

    Args:
        head: computes the loss of a tail memory from states of supervised positions; None: the model does.
        options: of Trainer.
    """

    def __init__(self, head: TailHead | None, **options: Any) -> None:
        super().__init__(**options)
        self.head = head
        own = getattr(self.optimizer, "skipped", None)
        # a row optimizer skips steps by itself
        self.skipped: SkippedSteps = SkippedSteps() if own is None else own
        self._bad = False
        if head is not None:
            self.model_accepts_loss_kwargs = True
        # the default callbacks print every log to stdout, which is for results
        self.remove_callback(PrinterCallback)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress)
        if isinstance(self.optimizer, RowOptimizer):
            # a row optimizer averages over processes itself, and DDP refuses a model in which only rows train
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        at_end = self.accelerator.gradient_state.end_of_dataloader
        if self.args.world_size == 1 or not at_end or not samples:
            return samples, num_items
        size, held = self.args.per_device_train_batch_size, len(self.train_dataset)  # type: ignore[arg-type]
        number = num_own(held, size, self.args.process_index, self.args.world_size)
        samples[-1] = first_records(samples[-1], number)
        return samples, self._get_num_items_in_batch(samples, device)

    def compute_loss(self, model, inputs, *args, **kwargs):
        # with cached states every position has a label, and no look at them has to wait for the device
        labels = inputs["labels"]
        nothing = not len(labels) if self.head is not None else not (labels != -100).any()
        if nothing and isinstance(self._own_optimizer(), RowOptimizer):
            # without a forward pass, so that nothing counts as read
            return no_loss(self.model)  # type: ignore[arg-type]
        if self.head is not None:
            states = {key: inputs[key] for key in ("states", "shift_labels")}
            return super().compute_loss(self.head, states, *args, **kwargs)  # type: ignore[arg-type]
        if not predicts_next(self.model):  # type: ignore[arg-type]
            return self._next_token_loss(model, inputs, *args, **kwargs)
        # logits are a fifth of a small model's computation, and most positions have no loss
        if takes(self.model, "logits_to_keep"):  # type: ignore[arg-type]
            labels = inputs["labels"][:, 1:]
            kept = (labels != -100).any(dim=0).nonzero().squeeze(1)
            inputs = {**inputs, "logits_to_keep": kept, "shift_labels": labels[:, kept].contiguous()}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _next_token_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        loss = functional.cross_entropy(
            outputs.logits.float().flatten(0, 1), labels.flatten(), reduction="sum"
        )
        loss = loss / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if loss.isfinite():
            return loss
        self._bad = True
        # Trainer's running sum would stay NaN
        return torch.zeros_like(loss)

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer calls this just before the optimizer's step. A bad step is skipped in all processes."""
        norm = super()._get_grad_norm(model, grad_norm)
        bad = self._bad or (norm is not None and not math.isfinite(norm))
        if self.args.world_size > 1:
            bad = bool(summed(torch.tensor(float(bad), device=self.args.device)) > 0)
        self._bad = bad
        optimizer = self._own_optimizer()
        if isinstance(optimizer, RowOptimizer):
            if bad:
                optimizer.skip_step()
            return norm
        # torch's fused AdamW skips a step if this is not 0, as for a gradient scaler
        optimizer.found_inf = torch.ones((), device=self.args.device) if bad else None
        self.skipped.add(bad)
        return norm

    def _save_checkpoint(self, model, trial):
        if self.skipped.in_a_row:
            # the weights may be the reason; the last good checkpoint is not to be rotated away
            return
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                list_files(folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError
            if isinstance(error, RuntimeError) and "write" not in str(error) and "pos" not in str(error):
                raise
            line = " ".join(str(error).split())
            raise OSError(
                f"{folder} cannot be written ({line}); earlier checkpoints are unchanged; check the free "
                "space and continue with resume"
            ) from error

    def log(self, logs, start_time=None):
        if "loss" in logs and self._bad:
            logs, self._bad = {**logs, "loss": math.nan}, False
        # Trainer logs the norm of `.grad`, which value rows do not have
        optimizer = self._own_optimizer()
        if "grad_norm" in logs and isinstance(optimizer, RowOptimizer):
            logs = {**logs, "grad_norm": float(optimizer.last_grad_norm)}  # type: ignore[arg-type]
        super().log(logs, start_time)

    def _own_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def evaluate(self, *args, **kwargs):
        # evaluation draws a random number, and a resumed run does not repeat earlier evaluations
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        # unlike accelerate's mixed precision, this does not replace model.forward
        return autocast(self.model)  # type: ignore[arg-type]

    def floating_point_ops(self, inputs):
        # Trainer would count a pass through the model, which training on states does not make
        return 0 if self.head is not None else super().floating_point_ops(inputs)


METRICS_FILE = "metrics.jsonl"


class StopAtLoss(TrainerCallback):
    """Stop at a loss. It is computed from Trainer's own log, which checkpoints contain."""

    def __init__(self, stop_loss: float | None, window: int) -> None:
        self.stop_loss, self.window = stop_loss, window

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.stop_loss is None or state.global_step < self.window:
            return
        if recent_loss(state.log_history, self.window) < self.stop_loss:
            control.should_training_stop = True
            # a run resumed from a checkpoint at this step would train further
            control.should_save = False


class MetricsFile(TrainerCallback):
    """Write Trainer's log as JSON lines; a resumed run begins with the lines in its checkpoint's log.

    With several processes only the first one writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(f"{json.dumps(entry)}\n" for entry in state.log_history))

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        with self.path.open("a") as file:
            file.write(f"{json.dumps(state.log_history[-1])}\n")


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds since it was created, plus those of the earlier parts of a resumed run."""

    def __init__(self) -> None:
        self.begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def state(self) -> dict:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def add_earlier(self, reached: TrainerState) -> None:
        """Add the seconds that are stored in a checkpoint's state, if there are any."""
        held: dict = (reached.stateful_callbacks or {}).get("Stopwatch") or {}  # type: ignore[union-attr]
        self.begun -= held.get("attributes", {}).get("seconds", 0.0)


class Progress(ProgressCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def recent_loss(log_history: list[dict], window: int) -> float:
    """Mean of the last `window` training losses without those of skipped steps; NaN if there are none."""
    losses = [entry["loss"] for entry in log_history if "loss" in entry][-window:]
    losses = [loss for loss in losses if math.isfinite(loss)]
    return sum(losses) / len(losses) if losses else math.nan


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


def predicts_next(model: nn.Module) -> bool:
    """Whether the model's own loss is transformers' loss of the next token. Decoders that were made as a part
    of an encoder-decoder model compare each token to itself, and GIT leaves out as many as an image has."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = inspect.unwrap(type(base).forward).__code__.co_names
    return "loss_function" in names and "image_patch_tokens" not in names


def no_loss(model: nn.Module) -> Tensor:
    """A loss of 0 that gives every trained parameter a gradient of 0, as other processes give it one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.stack([parameter.flatten()[0].float() * 0 for parameter in trained]).sum()


INTERVAL = 0.02


@dataclass
class Peak:
    """The largest growth of memory, in bytes; set at the end of the block."""

    peak_bytes: int = 0


@contextmanager
def peak_memory(model: torch.nn.Module) -> Iterator[Peak]:
    """Measure how much memory grows within the block: the GPU's if the model is on it, else the process's.

    The process's resident set is sampled every INTERVAL seconds. Before that, freed memory is returned to the
    system and all weights are read once, so that neither counts as growth.
    """
    peak = Peak()
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.peak_bytes = torch.cuda.max_memory_allocated() - before
        return
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    for parameter in model.parameters():
        # quantised weights have classes of their own, which cannot all sum
        if type(parameter) is torch.nn.Parameter:
            parameter.detach().sum()
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def sample() -> None:
        while not done.wait(INTERVAL):
            peak.peak_bytes = max(peak.peak_bytes, process.memory_info().rss - before)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
