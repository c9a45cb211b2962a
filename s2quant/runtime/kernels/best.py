# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201, ANN202 (what Triton compiles has no types to write down)
"""The best 32 of a program's candidates at once, in order, with the probability down to each.

A bitonic network: groups of 32 are sorted, half of them upwards and half downwards; then the better of every pair of
groups are the best 32 of both, and sorting those takes five steps. Candidates are a cube of 2 x 2 x ... elements, and a
step compares neighbours across one of its sides. Which side means what is chosen by where Triton keeps elements that
are loaded one by one (the last sides in a warp's lanes, then its warps, the first sides in a thread's own registers):

- the two sides that steps cross most often, 9 of the first 15 times, are the first two: no shuffle;
- the sides that tell groups apart are given up from the first on: registers, then warps, then lanes. Each gives up a
  half of what is left, so what is done between warps is done on four registers per thread.

Only values are sorted. Which of several equal candidates is the best is no question here: whoever asks counts them.
Another place of elements would make this slow, not wrong.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def _side(BITS: tl.constexpr, AT: tl.constexpr):
    """Say of every element of a cube where it is along a side, counted from the last."""
    return tl.reshape(tl.arange(0, 2), [1] * (BITS - 1 - AT) + [2] + [1] * AT)


@triton.jit
def _neighbour(x, BITS: tl.constexpr, AT: tl.constexpr, DEVICE: tl.constexpr):
    """Give every element the one across a side."""
    if DEVICE:
        bits = x.to(tl.int32, bitcast=True)
        other = (bits ^ tl.xor_sum(bits, BITS - 1 - AT, True)).to(tl.float32, bitcast=True)
    else:  # the interpreter takes an xor element by element
        high = tl.max(x, BITS - 1 - AT, keep_dims=True)
        low = tl.min(x, BITS - 1 - AT, keep_dims=True)
        other = tl.where(x == high, low, high)
    return other


@triton.jit
def _step(x, STAGE: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr, DEVICE: tl.constexpr):
    """Put neighbours across the J-th side of a group in order."""
    AT: tl.constexpr = BITS - 1 - J if J < 2 else J - 2
    TURN: tl.constexpr = BITS - 1 - STAGE if STAGE < 2 else (STAGE - 2 if STAGE < 5 else BITS - 3)
    smaller = _side(BITS, AT)
    if STAGE < 5 or BITS > 5:
        smaller = smaller ^ _side(BITS, TURN)
    other = _neighbour(x, BITS, AT, DEVICE)
    return tl.where(smaller != 0, tl.minimum(x, other), tl.maximum(x, other))


@triton.jit
def _merge(x, STAGE: tl.constexpr, BITS: tl.constexpr, DEVICE: tl.constexpr):
    """Sort runs of 2 ** STAGE elements whose halves are sorted in opposite directions; runs take turns, too."""
    for step in tl.static_range(STAGE):
        x = _step(x, STAGE, STAGE - 1 - step, BITS, DEVICE)
    return x


@triton.jit
def _add_down(sums, total, J: tl.constexpr, DEVICE: tl.constexpr):
    """Add to every element what stands before it across the J-th side."""
    AT: tl.constexpr = 4 - J if J < 2 else J - 2
    other = _neighbour(total, 5, AT, DEVICE)
    return sums + tl.where(_side(5, AT) != 0, other, 0.0), total + other


@triton.jit
def best_32(x, BITS: tl.constexpr, DEVICE: tl.constexpr):
    """Give the best 32 of float32 [2 ** BITS] in descending order, as a cube of five sides."""
    cube = tl.reshape(x, [2] * BITS)
    for stage in tl.static_range(1, 6):
        cube = _merge(cube, stage, BITS, DEVICE)
    for level in tl.static_range(BITS - 5):
        cube = _merge(tl.max(cube, 2), 5, BITS - 1 - level, DEVICE)
    return cube


@triton.jit
def shares_of(cube, largest, DEVICE: tl.constexpr):
    """Give the best 32 logits, the probability down to each, and their ranks; each [32], the order is no rank's.

    `largest` is the log of the sum of all candidates' exponentials.
    """
    total = tl.exp(cube - largest)
    sums = total
    for j in tl.static_range(5):
        sums, total = _add_down(sums, total, j, DEVICE)
    place = tl.arange(0, 32)
    rank = place // 16 + 2 * (place // 8 % 2) + 4 * (place % 8)
    return tl.reshape(cube, [32]), tl.reshape(sums, [32]), rank


@triton.jit
def last_of(logits, index, value, stays, NOWHERE: tl.constexpr):
    """Find the last of the best that stay: its logit and its index, and whether nothing is known to be left out.

    Candidates of a better logit stay, and of the same logit those up to that index.
    """
    low = tl.min(tl.where(stays, value, float("inf")), axis=0)
    after = tl.max(tl.where(stays, float("-inf"), value), axis=0)
    copies = tl.sum(tl.where(stays & (value == low), 1, 0), axis=0)
    at = tl.full((), NOWHERE, tl.int32)
    whole = after == float("-inf")
    if whole | (after == low):
        at = tl.full((), -1, tl.int32)
        while copies > 0:
            at = tl.min(tl.where((logits == low) & (index > at), index, NOWHERE), axis=0)
            copies -= 1
    return low, at, whole
