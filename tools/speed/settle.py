"""Choose how linears are cut up by what whole frames take, among the ways that were fastest by themselves.

A product timed in a row of its own kind knows nothing of a frame: there its weights are asked for while the kernel
before is at work, and its registers keep the kernel behind it out. So the best few of the part "tune" are put into a
frame, linear by linear, the one with the most bytes first, and what makes the frame fastest stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from s2quant.runtime.kernels import shapes
from s2quant.runtime.kernels.choice import Plan
from s2quant.runtime.kernels.launch import How
from s2quant.runtime.kernels.shapes import Key
from s2quant.runtime.kernels.weights import Block, Shape
from tools.speed.linears import Job, numbers, table_key, weight_like

FRAMES = {
    "s2-pro": (
        *(("w4a16", 1), ("bf16", 1), ("w4a16", 64), ("w4a16", 32), ("w4a16", 8)),
        *(("w8a16", 1), ("bf16", 64), ("bf16", 32)),
    ),
    "tiny": (("w4a16", 1),),
}
GAIN = 0.002  # of a frame: what is less may be chance
TRIALS = 4  # ways of a linear, the fastest by themselves


@dataclass(frozen=True)
class Choice:
    """One linear of a frame.

    Args:
        key: Its place in the table.
        plans: Ways to cut it up, the one in use first.
    """

    key: Key
    plans: tuple[Plan, ...]


def table_of(plan: Plan) -> dict[Key, Any]:
    """Give the table in which a plan stands."""
    return shapes.TUNED_MANY if isinstance(plan, Block) else shapes.TUNED


def choices(jobs: list[Job], tuned: list[dict[str, Any]]) -> list[Choice]:
    """List the linears of a frame that have more than one way, the largest first.

    Args:
        jobs: The linears of the frame, as they are cut up.
        tuned: Rows of the part "tune".

    Returns:
        The choices.
    """
    tried = {tuple(row["key"]): [way[1:] for way in row["tried"][:TRIALS]] for row in tuned if "tried" in row}
    found: dict[Key, Choice] = {}
    for case, rows, plan, _ in jobs:
        weight = weight_like(case)
        key = table_key(weight, plan, rows)
        ways = [plan, *(plan_of(plan, way) for way in tried.get(key, []))]
        if key not in found:
            found[key] = Choice(key, tuple(dict.fromkeys(ways)))
    return sorted((one for one in found.values() if len(one.plans) > 1), key=lambda one: -one.key[1] * one.key[2])


def plan_of(like: Plan, values: list[int]) -> Plan:
    """Make a plan of a row of the table."""
    if isinstance(like, Block):
        tiles, splits, stages, warps = values
        return Block(tiles=tiles, splits=splits, stages=stages, warps=warps)
    warps, tiles, depth, columns = values
    return Shape(warps=warps, tiles=tiles, depth=depth, columns=columns)


def jobs_of(jobs: list[Job], tuned: list[dict[str, Any]], how: How) -> Iterator[Job]:
    """List what will need compiled.

    Args:
        jobs: The linears of a frame.
        tuned: Rows of the part "tune".
        how: How the frame is launched.

    Yields:
        Every way of every linear.
    """
    ways = {choice.key: choice.plans for choice in choices(jobs, tuned)}
    for case, rows, plan, _ in jobs:
        for way in ways.get(table_key(weight_like(case), plan, rows), ()):
            yield case, rows, way, how


def settle(found: list[Choice], milliseconds: Callable[[], float], in_time: Callable[[], bool]) -> list[dict[str, Any]]:
    """Try every way of every linear in the frame, and keep the best in the table.

    Args:
        found: The linears.
        milliseconds: Times the frame as the table has it.
        in_time: Tells whether there is time for one more.

    Returns:
        A row per linear: its key, the frame's time with each way, what was kept.
    """
    rows = []
    least = milliseconds()
    for choice in found:
        if not in_time():
            break
        table, kept, times = table_of(choice.plans[0]), choice.plans[0], [least]
        for plan in choice.plans[1:]:
            table[choice.key] = plan
            times.append(milliseconds())
            if times[-1] < least * (1 - GAIN):
                least, kept = times[-1], plan
        table[choice.key] = kept
        tried = [[round(time, 4), *numbers(plan)] for time, plan in zip(times, choice.plans, strict=True)]
        rows.append({"key": list(choice.key), "tried": tried, "kept": numbers(kept)})
    return rows
