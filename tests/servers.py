"""Servers as processes of their own, for the tests."""

import re
import time
from contextlib import contextmanager

from started import sparsemem_with


@contextmanager
def server(command, *arguments, seconds=600):
    """(address, process) of `sparsemem COMMAND ... --port 0`, ended by SIGTERM if it still runs."""

    def address():
        assert process.poll() is None, process.stderr
        return re.search(r"http://[^/\s]+", process.stderr)

    with sparsemem_with(command, *arguments, "--port", 0) as process:
        yield wait_for(address, seconds)[0], process
        process.terminate()
        process.wait(seconds)


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.02)
    return found
