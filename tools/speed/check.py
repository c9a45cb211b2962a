"""The run of `tools/speed_check.py`: its options, its clock, what was found, and how a failure is kept."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from s2quant.runtime.kernels.launch import MEASURED, measured

SHARES = {  # seconds of 360 that a part may take; what one leaves is there for those after it
    "bandwidth": 6, "compile": 45, "kernels": 33, "exact": 42, "frames": 40, "variants": 25, "tune": 35, "settle": 80,
    "profile": 10, "linears": 40,
}  # fmt: skip
WHOLE_S = 360
PARTS = tuple(SHARES)


def for_slots(how: Any, batch: int) -> Any:
    """Launch as frames are launched: what differs by the number of slots, differs here, too."""
    its = measured(batch)
    return replace(how, **{key: value for key, value in vars(its).items() if value != getattr(MEASURED, key)})


def as_first(how: Any) -> Any:
    """Launch as when the kernels first ran on a GPU, all right: early, and nothing else."""
    later = [name for name in vars(how) if isinstance(getattr(how, name), bool) and name != "early"]
    return replace(how, early_dense=0, attention_warps=4, attention_stages=3, **dict.fromkeys(later, False))


class Check:
    """The options, what was found so far, and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.perf_counter()
        self.device = torch.device(options.device)
        self.size: str = options.size
        self.big = options.size == "s2-pro"
        self.until = self.deadline = self.started + options.seconds
        self.facts: dict[str, Any] = {}
        self.models: dict[str, Any] = {}
        self.wrong_ways: set[str] = set()  # variants that gave wrong products
        self.how = MEASURED if options.how == "best" else as_first(MEASURED)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def begin(self, part: str) -> None:
        """Give a part its time."""
        now = time.perf_counter()
        later = PARTS[PARTS.index(part) :]
        share = SHARES[part] / sum(SHARES[name] for name in later if name in self.options.only)
        planned = SHARES[part] * self.options.seconds / WHOLE_S
        self.deadline = min(self.until, now + max(planned, share * (self.until - now)))

    def late(self, what: str) -> bool:
        """Say whether the part's time is over, and that something is left out."""
        if time.perf_counter() <= self.deadline:
            return False
        self.say(f"no time for {what}")
        return True

    def keep(self) -> None:
        """Write what was found."""
        path = self.options.out / "speed.json"
        path.with_suffix(".part").write_text(json.dumps(self.facts, indent=1, default=str) + "\n")
        path.with_suffix(".part").replace(path)

    def say(self, text: str) -> None:
        """Print with the time."""
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def items(self, part: str, names: list[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Go through items while there is time; what is appended to the part's list is written after each."""
        found: list[dict[str, Any]] = []
        self.facts[part] = found
        for name in names:
            if self.late(name):
                found.append({"left_out": name})
                self.keep()
                continue
            yield name, found
            self.keep()

    def tried(self, row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Add what a piece of work gives to a row, or how it failed; a GPU that is lost ends the part."""
        try:
            row |= work()
        except Exception as error:  # noqa: BLE001 - one item that fails must not lose the rest
            row["failed"] = f"{type(error).__name__}: {str(error)[:1500]}"
            self.say(traceback.format_exc()[-2500:])
            if self.cuda:
                torch.cuda.synchronize()
        return row
