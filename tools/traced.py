"""What the GPU of a process waits for while stages are quantized: torch's profiler over a few of them, summed up.

Time in which no kernel runs is put down to what the process's main thread was in. The profiler makes launches slower,
so more time is idle than without it.
"""

from __future__ import annotations

import functools
import gzip
import importlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "## "
STAGE = "s2quant.quantize.loop:quantize_stage"
PARTS = (
    STAGE,
    "s2quant.quantize.loop:held_rows",
    "s2quant.quantize.loop:sum_hessian",
    "s2quant.quantize.loop:output_squares",
    "s2quant.quantize.loop:join_rows",
    "s2quant.quantize.loop:_replace",
    "s2quant.quantize.stream:Stream.inputs",
    "s2quant.quantize.stream:Stream.advance",
    "s2quant.quantize.hessian:Hessian.product",
    "s2quant.quantize.hessian:Hessian.matrix",
    "s2quant.quantize.gptq:check_weight",
    "s2quant.quantize.gptq:prepare",
    "s2quant.quantize.gptq:solve",
    "s2quant.quantize.gptq:store_scales",
    "s2quant.quantize.solver:upper_factor",
    "s2quant.quantize.solver:block_inverses",
    "s2quant.quantize.exchange:Exchange.sum",
    "s2quant.quantize.exchange:Exchange.share_batches",
    "s2quant.quantize.exchange:Exchange.solve",
    "s2quant.quantize.exchange:Exchange.merge",
    "s2quant.quantize.exchange:Exchange.once",
)
MOST_KERNELS = 20


class Trace:
    """Traces some of the stages that this process quantizes.

    Args:
        path: The JSON file to write.
        first: The first stage that is traced.
        last: The last one; a stage has to follow.
    """

    def __init__(self, path: Path, first: int = 2, last: int = 4) -> None:
        self.path, self.first, self.last, self.stage = path, first, last, -1
        self.profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        for name in PARTS:
            module, _, path_in_it = name.partition(":")
            owner: Any = importlib.import_module(module)
            *outer, function = path_in_it.split(".")
            for part in outer:
                owner = getattr(owner, part)
            setattr(owner, function, self._marked(name, path_in_it, getattr(owner, function)))

    def _marked(self, name: str, said: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def marked(*arguments: Any, **named: Any) -> Any:
            if name == STAGE:
                self._next()
            with record_function(f"{MARK}{said}"):
                return function(*arguments, **named)

        return marked

    def _next(self) -> None:
        self.stage += 1
        if self.stage == self.first:
            self.profiler.start()
        if self.stage == self.last + 1:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.profiler.stop()
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.json.gz"
                self.profiler.export_chrome_trace(str(trace))
                with gzip.open(trace) as file:
                    found = summed_up(json.load(file)["traceEvents"])
            self.path.write_text(json.dumps(found, indent=1) + "\n")


def summed_up(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the stages of a trace but for the first, whose beginning the profiler's own start disturbs.

    Args:
        events: Of a Chrome trace; times in microseconds.

    Returns:
        ms: from the beginning of the second stage to that of the last, over the number of stages between; busy_ms: of
        it kernels of any stream run; idle_ms: by what the main thread was in, innermost last; kernels_ms by name.
    """
    marks = [event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith(MARK)]
    stages = sorted((mark for mark in marks if mark["name"] == f"{MARK}quantize_stage"), key=lambda mark: mark["ts"])
    begin, end, count = stages[1]["ts"], stages[-1]["ts"], len(stages) - 2
    own = sorted((mark for mark in marks if mark["tid"] == stages[0]["tid"]), key=lambda mark: mark["ts"])
    kernels = [event for event in events if event.get("cat") == "kernel" and begin <= event["ts"] < end]
    idle: Counter[str] = Counter()
    for start, until in gaps(kernels, begin, end):
        middle = (start + until) / 2
        inside = [mark["name"].removeprefix(MARK) for mark in own if mark["ts"] <= middle < mark["ts"] + mark["dur"]]
        idle[" > ".join(inside)] += until - start
    by_name: Counter[str] = Counter()
    for kernel in kernels:
        by_name[kernel["name"]] += kernel["dur"]
    return {
        "stages": count,
        "ms": (end - begin) / count / 1e3,
        "busy_ms": (end - begin - sum(idle.values())) / count / 1e3,
        "idle_ms": {part: time / count / 1e3 for part, time in idle.most_common()},
        "kernels_ms": {name[:100]: time / count / 1e3 for name, time in by_name.most_common(MOST_KERNELS)},
    }


def gaps(kernels: Iterable[Mapping[str, Any]], begin: float, end: float) -> list[tuple[float, float]]:
    """Find the times without a kernel.

    Args:
        kernels: With ts and dur.
        begin: Where to begin.
        end: Where to end.

    Returns:
        Beginning and end of each.
    """
    found, free = [], begin
    for kernel in sorted(kernels, key=lambda kernel: kernel["ts"]):
        if kernel["ts"] > free:
            found.append((free, kernel["ts"]))
        free = max(free, kernel["ts"] + kernel["dur"])
    return [*found, (free, end)] if free < end else found
