"""How long something takes on a device: medians over repetitions, between events of the device itself where it has any."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

WARM_UPS = 3


def seconds_of(work: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median seconds of one call, by the device's clock on a GPU; what the host needs to launch it is part of it only if the
    device waits for that."""
    for _ in range(WARM_UPS):
        work()
    if device == "cpu":
        times = []
        for _ in range(min(repeats, 5)):
            started_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - started_s)
        return statistics.median(times)
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in marks)) / 1e3


def captured_seconds_of(works: Sequence[Callable[[], object]], device: str, repeats: int = 10) -> float:
    """Median seconds of one of `works`, which do the same on other memory, so that no cache serves them. All are captured into
    one graph: launching costs nothing."""

    def all_of_them() -> None:
        for work in works:
            work()

    if device == "cpu":
        return seconds_of(all_of_them, device, repeats) / len(works)
    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return seconds_of(graph.replay, device, repeats) / len(works)


def wall_seconds_of(work: Callable[[], object], device: str, repeats: int) -> float:
    """Mean seconds of one of many calls in a row, by the host's clock, the device being done at the end."""
    for _ in range(WARM_UPS):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(repeats):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started_s) / repeats
