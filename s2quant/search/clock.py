"""How long a process took, and how much memory, part by part."""

from __future__ import annotations

import time
from typing import Any

import torch

from s2quant.export.memory import host_peak_bytes, take_peak_bytes


class Clock:
    """Starts with the first part; a process that goes on with a stopped run counts its own share alone."""

    def __init__(self) -> None:
        self.since = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int | None] = {}

    def stop(self, part: str, device: torch.device) -> None:
        """End a part; the next one begins.

        Args:
            part: Its name.
            device: Where it worked.
        """
        now = time.perf_counter()  # results are on the host by then
        self.seconds[part], self.since = now - self.since, now
        self.peak_bytes[part] = take_peak_bytes(device)

    def facts(self) -> dict[str, Any]:
        """Give the manifest's entries.

        Returns:
            seconds (wall time) and peak_device_bytes (of tensors; None on a CPU) by part, and peak_host_bytes.
        """
        return {
            "seconds": self.seconds,
            "peak_device_bytes": self.peak_bytes,
            "peak_host_bytes": host_peak_bytes(),
        }
