"""Processes that begin with the package imported: to start Python, torch and transformers takes 6 s.

multiprocessing's fork server is a process that has imported them and does nothing else. It has one thread, so
its children inherit no lock that nobody will release; a fork of the tests' own process could.
"""

import atexit
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from tqdm import tqdm

import sparsemem

ROOMS = sorted(f"sparsemem.{room}" for room in set(sparsemem._ROOM.values()))
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "pytest", "datasets", "sparsemem.cli.main", *ROOMS])
# What must be known before the imports. pyarrow's allocator would start a thread.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


class Started:
    """A process that calls `work(*arguments)`, with what tests need of subprocess.Popen.

    As a context manager it kills the process at the end, if it still runs.

    Args:
        work: a function that can be pickled, so one at the level of its module.
        stdin: the text that it can read.
        environment: more variables.
        folder: its working directory.

    Attributes:
        stdout, stderr: what it has written until now; after `with`, all of it.
        returncode: None while it runs; as of Popen, -9 after SIGKILL.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        *arguments: Any,
        stdin: str = "",
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._files = tempfile.TemporaryDirectory()
        self._text: list[str] = []
        paths = [Path(self._files.name, name) for name in ("stdin", "stdout", "stderr")]
        for path, text in zip(paths, (stdin, "", ""), strict=True):
            path.write_text(text, encoding="utf-8")
        begin = (work, arguments, paths, dict(environment or {}), folder or Path.cwd())
        with mock.patch.dict(os.environ, ENVIRONMENT):
            forkserver.ensure_running()
        self._process = PROCESSES.Process(target=_begin, args=begin, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        return self._text[0] if self._text else self._read("stdout")

    @property
    def stderr(self) -> str:
        return self._text[1] if self._text else self._read("stderr")

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises: subprocess.TimeoutExpired: it still runs after `timeout` seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        # its parent, the server, may have seen its end before
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        if self.returncode is None:
            self.kill()
        self.wait()
        self._text = [self.stdout, self.stderr]
        self._files.cleanup()

    def _read(self, name: str) -> str:
        return Path(self._files.name, name).read_text(encoding="utf-8", errors="replace")


def sparsemem_with(*words: object, **options: Any) -> Started:
    """`sparsemem WORDS`, started."""
    return Started(_command, *map(str, words), **options)


def several(number: int, work: Callable[..., Any], *arguments: Any, seconds: float = 600.0) -> None:
    """Call `work(*arguments)` in several processes at once, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world["ACCELERATE_USE_CPU"] = "1"
    with ExitStack() as stack:
        processes = []
        for rank in map(str, range(number)):
            process = Started(work, *arguments, environment={**world, "RANK": rank, "LOCAL_RANK": rank})
            processes.append(stack.enter_context(process))
        for process in processes:
            assert process.wait(seconds) == 0, process.stderr


def _command(*words: str) -> None:
    from sparsemem_cli import main

    sys.argv = ["sparsemem", *words]
    main()


def _begin(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    paths: list[Path],
    environment: dict[str, str],
    folder: Path,
) -> None:
    server = psutil.Process().parent()
    assert server is not None
    assert server.num_threads() == 1, "the fork server has threads"
    for number, path in enumerate(paths):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    # tqdm's own is a semaphore, which a killed process leaves behind
    tqdm.set_lock(threading.RLock())
    try:
        work(*arguments)
    finally:
        # as at the end of an ordinary process
        atexit._run_exitfuncs()
