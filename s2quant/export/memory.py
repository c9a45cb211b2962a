"""How much memory a run takes, and staying within a 12 GB card.

What a run of the 4B model holds on the device, by its sizes (`quantize --plan` prints those of the weights):

- While it speaks the calibration lines: all of the bf16 model, 9.12 GB, and keys and values of each utterance in
  progress: 2 x 36 layers x 8 heads x 128 x 2 bytes = 147 kB a position, 0.15 GB at 1024 positions. Eight utterances
  and the codec (1.6 GB) do not fit into 12 GB; two, with voices encoded on the host, do.
- While it quantizes: one block and the next (0.2 GB each), some copies of the largest Hessian (9728 x 9728 in float32,
  0.38 GB each: up to five while it is summed), a batch of activations, and the calibration stream (256 x 1024 x 2560 x
  2 bytes = 1.3 GB, and 6.4 GB of what its batches are within a block), which can rest on the host; and 1 GB for each
  pair of bits and group_size, in which linears of like sizes are solved by launches that are captured once.

So low memory means: fewer utterances at a time, the codec and the stream on the host, where nothing of it is kept
within a block, launches that are not captured, and a cap on what torch may take, so that a run which needs more stops
instead of being lucky.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from s2quant.runtime.memory import limit_memory, release_memory

LOW_MEMORY_BYTES = 12_000_000_000
LOW_MEMORY_SLOTS = 2


@contextmanager
def device_cap(device: torch.device | None) -> Iterator[None]:
    """Keep torch under LOW_MEMORY_BYTES of a device, context included; beyond, it reports a lack of memory.

    Args:
        device: The device; None or a CPU: nothing is capped.

    Yields:
        Nothing.
    """
    if device is None or device.type != "cuda":
        yield
        return
    limit_memory(device, LOW_MEMORY_BYTES)
    try:
        yield
    finally:
        limit_memory(device, math.inf)


def take_peak_bytes(device: torch.device) -> int | None:
    """Read the peak of the GPU's memory since the last call, and start again.

    Args:
        device: The device.

    Returns:
        Bytes; None on a CPU.
    """
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    release_memory()  # of what was just dropped, cycles too
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def host_peak_bytes() -> int:
    """Read the largest resident set that this process ever had, mapped files included.

    Returns:
        Bytes.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
