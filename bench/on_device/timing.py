"""Seconds of work on a device: between events on a GPU, where the host may be ahead; with a clock on a CPU."""

import time
from collections.abc import Callable

import torch


def once(work: Callable[[], object]) -> float:
    """Seconds that the device spends on it, the waits for the host in between included."""
    if not torch.cuda.is_initialized():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def seconds(work: Callable[[], object], times: int, warm: int = 3) -> list[float]:
    """Of each of some runs, after others that are not counted."""
    for _ in range(warm):
        work()
    return [once(work) for _ in range(times)]
