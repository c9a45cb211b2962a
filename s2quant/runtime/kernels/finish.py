# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""What follows a product of many rows; and the parts of a product whose inputs were split, added up.

Legend: M rows of x, N outputs, S splits.

Parts are added up by a second launch, `finish_kernel`: one program per row and CHUNK outputs, always in the same order.
Those that attention reads it adds up itself, in that order (`s2quant.runtime.kernels.attended`).
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from s2quant.runtime.kernels.launch import begin

CHUNK = 512  # outputs that a program of `finish_kernel` adds up
MOST_SQUARES = 32  # partial sums of squares that are read at a time


@triton.jit
def reciprocal(squares, rows, num_rows, num_squares, eps, K: tl.constexpr, MOST: tl.constexpr):
    """Compute the reciprocal root mean square of rows."""
    part = tl.arange(0, MOST)
    total = tl.zeros(rows.shape, tl.float32)
    for start in range(0, num_squares, MOST):
        inside = (rows < num_rows)[None, :] & (start + part < num_squares)[:, None]
        total += tl.sum(tl.load(squares + rows[None, :] * num_squares + start + part[:, None], inside, 0.0), axis=0)
    return 1 / tl.sqrt(total / K + eps)


@triton.jit
def put(
    y, index, rows, num_rows, num_outputs, place, norm, hidden, out, RESIDUAL: tl.constexpr, PLACED: tl.constexpr
):  # fmt: skip
    """Write results [outputs, rows], added to the hidden vector if it is one; the sums of squares of that."""
    there = index < num_outputs
    inside = there[:, None] & (rows < num_rows)[None, :]
    total = tl.zeros(rows.shape, tl.float32)
    if RESIDUAL:
        where = rows[None, :] * num_outputs + index[:, None]
        y += tl.load(hidden + where, inside, 0.0)
        tl.store(hidden + where, y, inside)
        total += tl.sum(tl.where(inside, y * y, 0.0), axis=0)
        y *= tl.load(norm + index, there, 0.0).to(tl.float32)[:, None]
    target = index
    if PLACED:
        target = tl.load(place + index, there, 0)
    tl.store(out + rows[None, :] * num_outputs + target[:, None], y.to(out.dtype.element_ty), inside)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def finish_kernel(
    parts, place, squares_in, norm, hidden, out, squares_out, num_rows, num_outputs, num_squares, eps,
    K: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    PLACED: tl.constexpr, MOST: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Add up the parts of CHUNK outputs of a row, and do what follows the product."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    index = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    begin(DEVICE)
    inside = (index < num_outputs)[:, None] & (rows < num_rows)[None, :]
    y = tl.zeros((CHUNK, 1), tl.float32)
    for split in tl.static_range(SPLITS):
        part = parts + (split * num_rows + rows)[None, :] * num_outputs + index[:, None]
        y += tl.load(part, inside, 0.0)
    if SCALED:
        y *= reciprocal(squares_in, rows, num_rows, num_squares, eps, K, MOST)[None, :]
    total = put(y, index, rows, num_rows, num_outputs, place, norm, hidden, out, RESIDUAL, PLACED)
    if RESIDUAL:
        tl.store(squares_out + rows * tl.num_programs(1) + tl.program_id(1), total)
