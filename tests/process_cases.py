"""What a process of several asks of itself before it ends; imported in that process."""

from __future__ import annotations

import os
import time
from pathlib import Path


def check_group_ended(limit_s: float = 10.0) -> None:
    """Fail if threads of a process group are alive: one that drops a tensor while Python ends aborts the process."""
    until = time.monotonic() + limit_s
    while left := [name for name in _thread_names() if "gloo" in name]:  # one just ended may be named for a moment
        assert time.monotonic() < until, f"the group's threads are alive: {left}"
        time.sleep(0.01)


def _thread_names() -> list[str]:
    names = []
    for thread in os.listdir("/proc/self/task"):
        try:
            names.append(Path("/proc/self/task", thread, "comm").read_text().strip())
        except OSError:  # ended meanwhile
            continue
    return names
