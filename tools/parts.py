"""Where the seconds of a command go: functions named by their place, each timed with its device waited for.

What a function calls that is timed itself is not counted twice. Waiting makes the whole slower than it is, so a
command's own time is taken without this.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

QUANTIZING = (
    "s2quant.quantize.loop:quantize_stages",
    "s2quant.quantize.loop:sum_hessian",
    "s2quant.quantize.loop:rtn_quantize",
    "s2quant.quantize.loop:gptq_quantize",
    "s2quant.quantize.loop:held_rows",
    "s2quant.quantize.loop:output_squares",
    "s2quant.quantize.loop:_replace",
    "s2quant.quantize.stages:load_into",
    "s2quant.quantize.stream:Stream.advance",
    "s2quant.quantize.stream:Stream._at",
    "s2quant.quantize.hessian:gram",
    "s2quant.quantize.store:StageStore.save",
    "s2quant.quantize.exchange:Exchange.solve",
    "s2quant.quantize.exchange:Exchange._share",
    "s2quant.quantize.gptq:_import_gptqmodel",
)
SOLVER = (
    "s2quant.quantize.gptq:prepare",
    "s2quant.quantize.gptq:solve",
    "s2quant.quantize.solver:upper_factor",
    "s2quant.quantize.kernels:quantize_block",
)


class Parts:
    """Seconds and calls by function, of all threads.

    Args:
        names: "module:function" or "module:Class.method".
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        self.calls = dict.fromkeys(names, 0)
        self._stack = threading.local()
        for name in names:
            module, _, path = name.partition(":")
            owner: Any = importlib.import_module(module)
            *outer, last = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            setattr(owner, last, self._timed(name, getattr(owner, last)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            inner = self._stack.__dict__.setdefault("inner", [])
            inner.append(0.0)
            began = now()
            try:
                return function(*args, **kwargs)
            finally:
                whole = now() - began
                self.seconds[name] += whole - inner.pop()
                self.calls[name] += 1
                if inner:
                    inner[-1] += whole

        return timed

    def table(self) -> list[dict[str, Any]]:
        """Give the functions that were called, longest first."""
        rows = [{"part": n, "seconds": s, "calls": self.calls[n]} for n, s in self.seconds.items() if self.calls[n]]
        return sorted(rows, key=lambda row: -row["seconds"])


def now() -> float:
    """Wait for what this thread has asked the GPU for, if there is one in use, and read the clock, in seconds."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return time.perf_counter()
