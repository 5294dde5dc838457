"""Measure how much memory a block of code uses."""

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import torch

INTERVAL = 0.02


@dataclass
class Peak:
    """The largest growth of memory, in bytes; set at the end of the block."""

    peak_bytes: int = 0


@contextmanager
def peak_memory(model: torch.nn.Module) -> Iterator[Peak]:
    """Measure how much memory grows within the block: the GPU's if the model is on it, else the process's.

    The process's resident set is sampled every INTERVAL seconds. Before that, freed memory is returned to the
    system and all weights are read once, so that neither counts as growth.
    """
    peak = Peak()
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.peak_bytes = torch.cuda.max_memory_allocated() - before
        return
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    for parameter in model.parameters():
        parameter.detach().sum()
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def sample() -> None:
        while not done.wait(INTERVAL):
            peak.peak_bytes = max(peak.peak_bytes, process.memory_info().rss - before)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
