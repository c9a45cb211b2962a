"""Timing on a device: graphs of many launches, replayed; on a CPU, the wall clock."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable

import torch

REPLAYS = 7


def bandwidth(device: torch.device, num_bytes: int, warm_s: float = 0.5, repeats: int = 40) -> dict[str, float]:
    """Measure how fast memory is copied and read, by kernels: bytes per second, medians of launches after a warm-up.

    A graph's own node for a copy, which a first measurement here timed cold (2.77 TB/s on an H200 whose kernels read
    4.26 at the margin), need not be done by the multiprocessors; it is measured beside, as `memcpy_bytes_per_s`, with
    what the first launches gave before the clocks were up. Data is random: zeros take less power.
    """
    source = torch.empty(num_bytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    sums = torch.empty((), device=device)
    floats = source.view(torch.float32)
    parts: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: torch.bitwise_or(source, 0, out=target), 2 * num_bytes),
        "read": (lambda: torch.amax(floats, dim=0, out=sums), num_bytes),
        "memcpy": (lambda: target.copy_(source), 2 * num_bytes),
    }
    found = {}
    for name, (launch, moved) in parts.items():
        if device.type != "cuda":
            found[f"{name}_bytes_per_s"] = moved / timed(launch, device, 1)
            continue
        graph = captured(launch)
        cold = replay_times(graph, 3)
        started = time.perf_counter()
        while time.perf_counter() - started < warm_s:
            graph.replay()
            torch.cuda.synchronize()
        times = replay_times(graph, repeats)
        found[f"{name}_bytes_per_s"] = moved / statistics.median(times)
        found[f"{name}_bytes_per_s_best"] = moved / min(times)
        found[f"{name}_bytes_per_s_cold"] = moved / cold[0]
    return found


def card_state() -> str | None:
    """Read the card's clocks, power and limits; None where nothing tells them."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


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
    return statistics.median(replay_times(graph, repeats))


def replay_times(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    """Give the seconds of each of some replays, by device events."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times
