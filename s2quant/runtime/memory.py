"""Host and device memory: given back, limited, and a lack of it said clearly.

A lack of memory is an `OutOfMemory`, a `UserError` with what was being done and what to do. It is raised only after
the failed work's own exception is gone, whose traceback would keep every tensor of that work alive.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from s2quant.errors import OutOfMemory, UserError, is_out_of_memory

CONTEXT_BYTES = 600_000_000  # of a limit, left to the CUDA context and libraries, which torch does not count
LOADING_TODO = "use a quantized checkpoint, a larger device or limit, or give up other engines first"
SPEAKING_TODO = (
    "speak fewer at a time, fewer frames, or with shorter references; use a quantized checkpoint; the engine can go on"
)
T = TypeVar("T")


def trim_heap() -> None:
    """Give memory that was freed on the host back to the system, where the C library (glibc) keeps it for itself."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def release_memory() -> None:
    """Give memory of what has just been dropped back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limit_memory(device: torch.device, num_bytes: float) -> None:
    """Keep this process to a share of a GPU's memory; beyond it, torch reports a lack of memory.

    Args:
        device: The device.
        num_bytes: The most bytes, with CONTEXT_BYTES for the CUDA context and libraries in them; more than the device
            has means all of it.

    Raises:
        UserError: The device is no GPU, or the limit leaves nothing for tensors.
    """
    if device.type != "cuda":
        raise UserError(f"a memory limit on {device}", "a CUDA device", "leave the limit out, or limit the process")
    if not num_bytes > CONTEXT_BYTES:
        raise UserError(
            f"a memory limit of {num_bytes / 1e9:g} GB",
            f"more than the {CONTEXT_BYTES / 1e9:g} GB that CUDA itself takes",
            "raise the limit",
        )
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.cuda.current_device() if device.index is None else device.index  # torch takes no "cuda" here
    torch.cuda.set_per_process_memory_fraction(min(1.0, (num_bytes - CONTEXT_BYTES) / total), index)


def guarded(work: Callable[[], T], doing: str, todo: str, release: Callable[[], None] = release_memory) -> T:
    """Do something whose lack of memory is said clearly.

    Args:
        work: What to do.
        doing: What that is, for the message.
        todo: What helps.
        release: Gives memory back after a failure.

    Returns:
        What the work gives.

    Raises:
        OutOfMemory: There was not enough memory.
    """
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = _first_line(error)
    release()
    raise OutOfMemory(f"{reason} (while {doing})", "enough memory", todo)


def guarded_iterator(
    items: Iterator[T], doing: str, todo: str, release: Callable[[], None] = release_memory
) -> Iterator[T]:
    """Pass on what an iterator makes; its lack of memory is said clearly.

    Args:
        items: The iterator.
        doing: What it does, for the message.
        todo: What helps.
        release: Gives memory back after a failure.

    Yields:
        Its items.

    Raises:
        OutOfMemory: There was not enough memory.
    """
    try:
        yield from items
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = _first_line(error)
    del items
    release()
    raise OutOfMemory(f"{reason} (while {doing})", "enough memory", todo)


def _first_line(error: Exception) -> str:
    return (str(error) or "out of memory").splitlines()[0]
