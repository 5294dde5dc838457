"""Stop a run at SIGTERM or Ctrl-C with a checkpoint of its last step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from ..processes import num_processes, summed


class StopAtSignal(TrainerCallback):
    """After a signal: finish the step, save a checkpoint and stop.

    With several processes all of them stop at the same step, whichever got the signal.

    Attributes:
        received: the number of the signal; None if there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if _any(self.received is not None, args.device):
            control.should_training_stop = True
            control.should_save = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block the first SIGTERM or Ctrl-C is noted; a second one acts as if this was not here.

        After a block that a signal has ended:

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            SystemExit: it was SIGTERM; the exit status is 143.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {
            number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
        }

        def note(number: int, frame: Any) -> None:
            self.received = number
            signal.signal(number, before[signal.Signals(number)])

        try:
            for number in before:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)


def _any(flag: bool, device: torch.device) -> bool:
    return flag if num_processes() == 1 else bool(summed(torch.tensor(float(flag), device=device)) > 0)
