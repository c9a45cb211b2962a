# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""The linears' layouts read with Triton's own operations, for the interpreter and for whole matrices; small helpers."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from s2quant.runtime.kernels.ptx_sums import exchange

OVER_ROWS: tl.constexpr = tl.constexpr(exchange((1, 2, 4, 8)))
SWAPPED: tl.constexpr = tl.constexpr(exchange((8,), add=False))


@triton.jit
def rows_of_bf16(weight, second, row, inputs, K: tl.constexpr, GATED: tl.constexpr):
    """Read [16, S] of a bf16 weight, or 8 rows of each of two."""
    if GATED:
        low = tl.load(weight + (row // 16 * 8 + row % 8)[:, None] * K + inputs[None, :])
        high = tl.load(second + (row // 16 * 8 + row % 8)[:, None] * K + inputs[None, :])
        values = tl.where((row % 16 < 8)[:, None], low, high)
    else:
        values = tl.load(weight + row[:, None] * K + inputs[None, :])
    return values.to(tl.float32)


@triton.jit
def rows_packed(words, scales, row, inputs, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Read [16, S] of a packed weight."""
    steps = K // 128
    tile = row // 16
    high = row % 16 // 8
    g = row % 8
    step = inputs // 128
    t = inputs % 32 // 8
    lane = g[:, None] * 4 + t[None, :]
    if BITS == 4:
        word = ((tile[:, None] * steps + step[None, :]) * 2 + (inputs % 128 // 64)[None, :]) * 128
        word += lane * 4 + (inputs % 64 // 32 * 2 + inputs % 8 // 4)[None, :]
        shift = 4 * (high[:, None] + 2 * (inputs % 4 // 2)[None, :]) + 16 * (inputs % 2)[None, :]
        code = ((tl.load(words + word) >> shift) & 15) - 8
    else:
        word = ((tile[:, None] * steps + step[None, :]) * 4 + (inputs % 128 // 32)[None, :]) * 128
        word += lane * 4 + (inputs % 8 // 2)[None, :]
        shift = 8 * high[:, None] + 16 * (inputs % 2)[None, :]
        code = (((tl.load(words + word) >> shift) & 255) ^ 128) - 128
    scale = ((tile[:, None] * steps + step[None, :]) * 8 + g[:, None]) * (128 // GROUP)
    scale = (scale + (inputs % 128 // GROUP)[None, :]) * 2 + high[:, None]
    return code.to(tl.float32) * tl.load(scales + scale).to(tl.float32)


@triton.jit
def plain_tile(
    weight, second, x, row, column, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr
):
    """Multiply a tile with 8 rows of x, float32 [16, 8], with nothing but Triton's own operations."""
    total = tl.zeros((16, 8), tl.float32)
    S: tl.constexpr = 128 if K % 128 == 0 else 64
    for start in range(0, K, S):
        inputs = start + tl.arange(0, S)
        if KIND == "bf16":
            values = rows_of_bf16(weight, second, row, inputs, K, GATED)
        else:
            values = rows_packed(weight, second, row, inputs, K, 4 if KIND == "w4" else 8, GROUP)
        rows = tl.load(x + column[:, None] * K + inputs[None, :]).to(tl.float32)
        total += tl.sum(values[:, None, :] * rows[None, :, :], axis=2)
    return total


@triton.jit
def plain_flat(
    weight, second, x, row, column, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr
):
    """Multiply rows of the weight with as many rows of x, one with one, float32 [T]."""
    total = tl.zeros(row.shape, tl.float32)
    S: tl.constexpr = 128 if K % 128 == 0 else 64
    for start in range(0, K, S):
        inputs = start + tl.arange(0, S)
        if KIND == "bf16":
            values = rows_of_bf16(weight, second, row, inputs, K, GATED)
        else:
            values = rows_packed(weight, second, row, inputs, K, 4 if KIND == "w4" else 8, GROUP)
        total += tl.sum(values * tl.load(x + column[:, None] * K + inputs[None, :]).to(tl.float32), axis=1)
    return total


@triton.jit
def over_rows(x, SPAN: tl.constexpr, PLAIN: tl.constexpr):
    """Sum every 16 neighbours of [T], and give the sum to each; on a GPU 16 lanes, without shared memory."""
    if PLAIN:
        sums = tl.sum(tl.reshape(x, (SPAN // 16, 16)), axis=1)
        y = tl.reshape(tl.broadcast_to(sums[:, None], (SPAN // 16, 16)), (SPAN,))
    else:
        y = tl.inline_asm_elementwise(OVER_ROWS, "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
    return y


@triton.jit
def swapped(x):
    """Give every lane the number of the lane that is 8 away in its 16; on a GPU only."""
    return tl.inline_asm_elementwise(SWAPPED, "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
