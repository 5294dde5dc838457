"""Which checkpoints of a run are complete, whether they belong to it, and where they can be written.

Choices: Trainer writes `trainer_state.json` last. After it, `files.json` gets the sizes of all files, so that
a checkpoint that was being deleted is recognised too. `run.json` beside the checkpoints has the settings and
digests of the data of their run.
"""

import json
import logging
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..artifacts import comparable_base, fingerprint_base
from ..atomic import read_json, write_json
from ..processes import is_first, num_processes, summed
from ..provenance import differences

logger = logging.getLogger(__name__)

_STATE, _FILES, _RUN = "trainer_state.json", "files.json", "run.json"


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint, or None. Incomplete ones are named in a warning."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if _step(path) >= 0]
    skipped = []
    for path in sorted(paths, key=_step, reverse=True):
        if _is_complete(path):
            if skipped:
                logger.warning("incomplete: %s; continuing from %s", ", ".join(skipped), path.name)
            return str(path)
        skipped.append(path.name)
    if paths:
        logger.warning("no complete checkpoint in %s: training begins from the start", folder)
    return None


def list_files(checkpoint: Path) -> None:
    """Write the sizes of a checkpoint's files into it, after all of them."""
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name not in (_STATE, _FILES)
    }
    write_json(checkpoint / _FILES, sizes)


def check_folder(folder: Path, resume: bool) -> None:
    """Check that a run can be written into a folder, which is made if it does not exist.

    Raises:
        ValueError: it cannot, or it holds checkpoints that are not resumed.
    """
    if not resume and any(folder.glob("checkpoint-*")):
        raise ValueError(
            f"output_dir {str(folder)!r} holds checkpoints; pass resume=True or give another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(
            f"folder {str(folder)!r} cannot be written ({error.strerror}); give another folder"
        ) from error


def run_of(model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the course of a run, as JSON values.

    Args:
        model: before training.
        settings: JSON values: options and digests of the data.
    """
    base = fingerprint_base(model) if comparable_base(model) else None
    return json.loads(json.dumps({**settings, "model": base, "processes": num_processes()}))


def keep_run(folder: Path, run: dict[str, Any], *, resumes: bool) -> None:
    """Write what decides the run beside its checkpoints, or compare it with what is there.

    Raises:
        ValueError: the run continues a checkpoint and differs; the message names what changed.
    """
    if resumes and (folder / _RUN).is_file():
        changes = differences(read_json(folder / _RUN), run)
        if changes:
            raise ValueError(
                f"resume=True: the run in {folder} is another one ({changes}); give the same data and "
                "arguments, or another output_dir"
            )
    elif is_first():
        write_json(folder / _RUN, run)


def _is_complete(checkpoint: Path) -> bool:
    with suppress(OSError, ValueError):
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        sizes = json.loads((checkpoint / _FILES).read_text()) if (checkpoint / _FILES).is_file() else {}
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    return False


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


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
