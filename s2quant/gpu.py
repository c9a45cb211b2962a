"""What kernels of our own need, wherever they are used."""

from __future__ import annotations

import functools
import importlib
import os
import shutil

import torch

OLDEST = (8, 0)  # compute capability that Triton supports


@functools.cache
def kernel_obstacle(device: torch.device) -> str | None:
    """Say why Triton's kernels cannot run on a device.

    Args:
        device: The device.

    Returns:
        The reason, or None when they can; on a CPU they can where Triton interprets them.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch
    if device.type != "cuda" and not interpreted:
        return f"no Triton kernels for {device.type}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed ({error})"
    if interpreted:
        return None
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "a GPU older than Ampere (compute capability 8.0)"
    if not os.environ.get("CC") and not any(shutil.which(name) for name in ("gcc", "clang")):
        return "no C compiler, which Triton needs to launch kernels"
    return None
