"""Kill a process at a chosen moment."""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from started import Started


def killed(
    work: Callable[..., Any],
    *arguments: Any,
    ready: Callable[[], bool],
    wait: float = 0.0,
    seconds: float = 600.0,
) -> bool:
    """Call `work(*arguments)` in another process, and send it SIGKILL `wait` seconds after `ready` is true.

    Args:
        work: what the process does: a function that can be pickled, so one at the level of its module.
        ready: asked by this process every millisecond.
        seconds: in which the process must be ready.

    Returns:
        Whether the process was killed; False if it had ended before.

    Raises:
        AssertionError: the process failed, or was not ready in time.
    """
    with Started(work, *arguments) as process:
        end = time.monotonic() + seconds
        while not ready():
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr
                return False
            assert time.monotonic() < end, f"the process was not ready in {seconds} seconds"
            time.sleep(0.001)
        time.sleep(wait)
    return process.returncode != 0


def killed_while(make: Callable[..., Callable[[int], Any]], *arguments: Any, wait: float = 0.0) -> None:
    """Call save(0), save(1), and so on in another process, and kill it `wait` seconds after save(0).

    Args:
        make: called there with `arguments`; returns `save`.
    """
    with TemporaryDirectory() as folder:
        saved = Path(folder, "saved")
        assert killed(_without_end, saved, make, *arguments, ready=saved.exists, wait=wait)


def _without_end(saved: Path, make: Callable[..., Callable[[int], Any]], *arguments: Any) -> None:
    save, number = make(*arguments), 0
    while True:
        save(number)
        if number == 0:
            saved.touch()
        number += 1
