"""Captures of CUDA graphs that nothing beside them can break."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Iterator
from typing import Any

import torch

_ONE = threading.RLock()  # the collector is the process's


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the stream for captures that torch's own, of the current device, may not be right for.

    Args:
        device: A CUDA device.

    Returns:
        Its stream, one per device; see `warm_up_stream`.
    """
    return torch.cuda.Stream(device)


@functools.cache
def warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the stream on which what is to be captured runs once before, one per device.

    cuBLAS keeps a work space for every stream that it has ever seen, 32 MB each on a Hopper GPU.

    Args:
        device: A CUDA device.

    Returns:
        Its stream.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _capturing(
    graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream | None, tidies: bool
) -> Iterator[None]:
    if tidies:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
        return
    assert stream is not None
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


@contextlib.contextmanager
def capture(
    graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream | None = None, tidies: bool = True
) -> Iterator[None]:
    """Capture what is launched meanwhile.

    Python's garbage collector does not run meanwhile: to end an old graph is one of the calls that end a capture, too
    (seen on an H100: "operation failed due to a previous error during capture"). What other threads ask of the GPU
    does not matter. One thread captures at a time; others wait. What fails within is raised as it is: torch, which
    ends the capture then, may find that broken, too, and would raise that.

    Args:
        graph: The graph; new.
        pool: The memory pool that it shares with others, which no other stream uses.
        stream: Where it is captured; None: on torch's own stream for captures, of the current device.
        tidies: Whether the device is waited for and memory that torch keeps is given back before, as torch does it;
            else a stream is needed.
    """
    with _ONE:
        collects, on_gpu = gc.isenabled(), torch.cuda.is_available()
        before = torch.cuda.current_stream() if on_gpu else None
        first: BaseException | None = None
        gc.disable()
        try:
            with _capturing(graph, pool, stream, tidies):
                try:
                    yield
                except BaseException as error:
                    first = error
                    raise
        except Exception as error:
            if first is None or error is first:
                raise
            raise first from error
        finally:
            first = None  # its traceback has this frame
            if before is not None:
                torch.cuda.set_stream(before)  # which torch does not do where it cannot end the capture
            if collects:
                gc.enable()
