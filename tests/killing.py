"""Kill a process at a chosen moment, without starting a new interpreter for each kill.

multiprocessing's fork server is a process that has imported the package and does nothing else: it has one
thread, so its children inherit no lock that nobody will release. A fork of the tests' own process could.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from tqdm import tqdm

import sparsemem

# pyarrow's allocator would start a thread of its own in the server
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
ROOMS = sorted(f"sparsemem.{room}" for room in set(sparsemem._ROOM.values()))
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "pytest", "datasets", *ROOMS])


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
    process = PROCESSES.Process(target=_alone, args=(work, arguments), daemon=True)
    process.start()
    try:
        end = time.monotonic() + seconds
        while not ready():
            if process.exitcode is not None:
                assert process.exitcode == 0, "the process failed: its error is on stderr"
                return False
            assert time.monotonic() < end, f"the process was not ready in {seconds} seconds"
            time.sleep(0.001)
        time.sleep(wait)
    finally:
        process.kill()
        process.join()
    return process.exitcode != 0


def killed_while(make: Callable[..., Callable[[int], Any]], *arguments: Any, wait: float = 0.0) -> None:
    """Call save(0), save(1), and so on in another process, and kill it `wait` seconds after save(0).

    Args:
        make: called there with `arguments`; returns `save`.
    """
    reader, writer = PROCESSES.Pipe(duplex=False)
    with reader, writer:
        assert killed(_without_end, writer, make, *arguments, ready=reader.poll, wait=wait)


def _alone(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    parent = psutil.Process().parent()
    assert parent is not None
    assert parent.num_threads() == 1, "the fork server has threads"
    torch.set_num_threads(1)
    # tqdm's own is a semaphore, which a killed process leaves behind
    tqdm.set_lock(threading.RLock())
    work(*arguments)


def _without_end(writer: Connection, make: Callable[..., Callable[[int], Any]], *arguments: Any) -> None:
    save, number = make(*arguments), 0
    while True:
        save(number)
        if number == 0:
            writer.send_bytes(b"saved")
        number += 1
