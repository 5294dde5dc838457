"""Trainer callbacks: stop at a loss, write the log to a file, measure time, show progress."""

import json
import math
import time
from pathlib import Path

from transformers import ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

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
