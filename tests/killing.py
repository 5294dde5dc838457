"""Kill a process at a chosen moment, without starting a new interpreter for each kill."""

import contextlib
import mmap
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm


def killed(
    work: Callable[[], Any],
    ready: Callable[[], bool],
    wait: float = 0.0,
    *,
    again: Callable[[], Any] = lambda: None,
    seconds: float = 60.0,
    tries: int = 3,
) -> bool:
    """Do `work` in a fork of this process, and send it SIGKILL `wait` seconds after `ready` is true.

    A fork of a process with threads may inherit a lock that no thread of it holds, and wait forever. So a
    child that is not ready in time is killed, and another one is tried.

    Args:
        work: what the child does.
        ready: asked by the parent every millisecond.
        again: called before another child is tried, to remove what the former one left.
        seconds: in which a child must be ready.
        tries: number of children.

    Returns:
        Whether the child was killed; False if it had ended before.

    Raises:
        AssertionError: no child was ready in time.
    """
    for attempt in range(tries):
        if attempt:
            again()
        with warnings.catch_warnings():
            # newer Python warns of what is said above
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            _work_alone(work)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if ready():
                time.sleep(wait)
                return _kill(child)
            if os.waitpid(child, os.WNOHANG)[0]:
                return False
            time.sleep(0.001)
        _kill(child)
    raise AssertionError(f"none of {tries} children was ready in {seconds} seconds")


def _work_alone(work: Callable[[], Any]) -> None:
    # the threads of OpenMP are not in the child, and tqdm's own lock is shared with the parent
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    try:
        work()
    finally:
        os._exit(0)


def _kill(child: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


class Forever:
    """Work without an end, for a child: save(0), save(1), and so on."""

    def __init__(self, save: Callable[[int], Any]) -> None:
        self._save, self._shared = save, mmap.mmap(-1, 1)

    def __call__(self) -> None:
        number = 0
        while True:
            self._save(number)
            self._shared[0] = 1
            number += 1

    def begun(self) -> bool:
        """Whether the child has done save(0)."""
        return self._shared[0] == 1
