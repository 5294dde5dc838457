"""One thing at a time with the model: teaching, answering and probing take turns on one thread."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

logger = logging.getLogger(__name__)


class Worker:
    """A thread that does one job after the other.

    Attributes:
        job: the long job that runs or waits: `{"kind", "phase", "step", "steps"}`; None: none.
        error: of the last long job, until the next one begins.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="worker")
        self._lock = threading.Lock()
        self.job: dict[str, Any] | None = None
        self.error: str | None = None

    def start(self, kind: str, work: Callable[[Callable[[str, int, int], None]], object]) -> bool:
        """Begin a long job in the background; False: another one is under way.

        Args:
            work: gets a function that it tells its progress: phase, step, number of steps.
        """
        with self._lock:
            if self.job is not None:
                return False
            self.job = {"kind": kind, "phase": "Waiting", "step": 0, "steps": 0}
            self.error = None
        self._pool.submit(self._run, kind, work)
        return True

    def do(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """Do something short, when its turn comes."""
        return self._pool.submit(work, *arguments)

    def stop(self) -> None:
        """Wait for what runs; drop what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, kind: str, work: Callable[[Callable[[str, int, int], None]], object]) -> None:
        def progress(phase: str, step: int, steps: int) -> None:
            self.job = {"kind": kind, "phase": phase, "step": step, "steps": steps}

        try:
            work(progress)
        except (ValueError, OSError, RuntimeError) as error:
            logger.exception("%s failed", kind)
            self.error = " ".join(str(error).split())
        finally:
            self.job = None
