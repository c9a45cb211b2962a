"""Timing on a device: graphs of many launches, replayed; on a CPU, the wall clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPLAYS = 7


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Measure a copy on the device: bytes read and written per second."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, 10)
    return 2 * num_bytes / seconds


def timed(launch: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Give the median seconds of one of `count` launches, captured as one graph and replayed."""

    def body() -> None:
        for _ in range(count):
            launch()

    if device.type != "cuda":
        body()
        started = time.perf_counter()
        body()
        return (time.perf_counter() - started) / count
    graph = captured(body)
    return replayed(graph) / count


def captured(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Run once to warm up, then capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def replayed(graph: torch.cuda.CUDAGraph, repeats: int = REPLAYS) -> float:
    """Give the median seconds of a replay, by device events."""
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
