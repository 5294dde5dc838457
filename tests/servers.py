"""Servers as processes of their own, for the tests."""

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def server(command, *arguments, seconds=300):
    """(address, process) of `sparsemem COMMAND ... --port 0`, ended by SIGTERM if it still runs."""
    line = [sys.executable, "-m", "sparsemem", command, *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        line, env=ENVIRONMENT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    said, reader = [], None
    try:
        for text in process.stderr:
            said.append(text)
            if found := re.search(r"http://[^/\s]+", text):
                break
        else:
            raise AssertionError("".join(said))
        timer.cancel()
        # what it says later must not fill the pipe
        reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
        reader.start()
        process.said = said
        yield found[0], process
    finally:
        timer.cancel()
        if process.poll() is None:
            process.terminate()
            process.wait(30)
        if reader is not None:
            reader.join()
        process.stderr.close()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.05)
    return found
