# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""What GPTQ does column by column, as two Triton kernels: scales of the groups of a block, and its columns in order.

Both do gptqmodel's operations one by one in float32, each rounded to nearest: no multiplication is fused with an
addition (`enable_fp_fusion`), divisions are exact. So they give the bits of its own loops, which take dozens of
launches and five waits for the GPU per group, and of its CUDA kernel, which has to be compiled by nvcc.

Legend: M outputs, K inputs, G groups.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

BLOCK = 128  # columns of a block, as gptqmodel has it
ROWS = 4  # of a program, one warp each
TO_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: added to a small number and subtracted, it rounds half to even
BEYOND = tl.constexpr(1024.0)  # steps from zero; no code is there


@triton.jit
def scales_kernel(
    weight, scales, num_one_sided, num_rows, stride, first_group, top, GROUP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Find the symmetric scale of each row of a group, twice gptqmodel's where no weight is negative."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = first_group + tl.program_id(1)
    inside = row < num_rows
    column = group * GROUP + tl.arange(0, GROUP)
    values = tl.load(weight + row.to(tl.int64)[:, None] * stride + column[None, :], inside[:, None], 0.0)
    least, most = tl.min(values, axis=1), tl.max(values, axis=1)
    low, high = tl.minimum(least, 0.0), tl.maximum(most, 0.0)
    high = tl.maximum(tl.abs(low), high)
    low = tl.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = tl.where(empty, -1.0, low), tl.where(empty, 1.0, high)
    found = tl.div_rn(high - low, tl.zeros_like(high) + top)
    one_sided = (least >= 0) & (most > 0)
    tl.store(scales + group.to(tl.int64) * num_rows + row, tl.where(one_sided, found * 2, found), inside)
    tl.atomic_add(num_one_sided, tl.sum((one_sided & inside).to(tl.int64)))


@triton.jit
def block_kernel(
    weight, factor, scales, codes, errors, losses, num_rows, num_columns, start, count, top, middle,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Quantize the columns of a block in their order, each error spread over the columns after it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < num_rows
    column = tl.arange(0, BLOCK)
    whole = inside[:, None] & (column < count)[None, :]
    place = row[:, None] * num_columns + start + column[None, :]
    values = tl.load(weight + place, whole, 0.0)
    all_codes = tl.zeros((ROWS, BLOCK), tl.float32)
    all_errors = tl.zeros((ROWS, BLOCK), tl.float32)
    all_losses = tl.zeros((ROWS, BLOCK), tl.float32)
    for pivot in range(count):
        here = (column == pivot)[None, :]
        value = tl.sum(tl.where(here, values, 0.0), axis=1)
        step = tl.load(scales + ((start + pivot) // GROUP).to(tl.int64) * num_rows + row, inside, 1.0)
        diagonal = factor + (start + pivot).to(tl.int64) * num_columns + start
        pivotal = tl.zeros_like(value) + tl.load(diagonal + pivot)
        steps = tl.div_rn(value, step)
        steps = tl.where(steps > BEYOND, BEYOND, tl.where(steps < -BEYOND, -BEYOND, steps))  # keeps what is no number
        code = (steps + TO_NEAREST) - TO_NEAREST + middle
        code = tl.where(code > top, top, tl.where(code < 0, 0.0, code))
        residual = value - step * (code - middle)
        error = tl.div_rn(residual, pivotal)
        loss = tl.div_rn(residual * residual, pivotal * pivotal)
        all_codes = tl.where(here, code[:, None], all_codes)
        all_errors = tl.where(here, error[:, None], all_errors)
        all_losses = tl.where(here, loss[:, None], all_losses)
        spread = tl.load(diagonal + column, (column >= pivot) & (column < count), 0.0)[None, :]
        values = tl.where((column >= pivot)[None, :], values - error[:, None] * spread, values)
    tl.store(codes + place, all_codes.to(tl.uint8), whole)
    tl.store(errors + row[:, None] * BLOCK + column[None, :], all_errors, inside[:, None] & (column >= 0)[None, :])
    tl.store(losses + row, tl.load(losses + row, inside, 0.0) + tl.sum(all_losses, axis=1), inside)


def block_scales(
    weight: Tensor, scales: Tensor, num_one_sided: Tensor, start: int, count: int, group_size: int, top: int
) -> None:
    """Find the scales of the groups of a block.

    Args:
        weight: float32 [M, K], contiguous.
        scales: float32 [G, M], filled for these groups.
        num_one_sided: int64 [], to which groups (of one output) without a negative weight, and with a positive one,
            are added.
        start: First column of the block, where a group begins.
        count: Its columns, whole groups.
        group_size: Columns of a group: a power of two.
        top: Largest code.
    """
    assert start % group_size == count % group_size == 0 and weight.is_contiguous(), (start, count, group_size)
    grid = (triton.cdiv(len(weight), ROWS), count // group_size)
    scales_kernel[grid](
        weight, scales, num_one_sided, len(weight), weight.shape[1], start // group_size, float(top),
        GROUP=group_size, ROWS=ROWS, num_warps=ROWS, enable_fp_fusion=False,
    )  # fmt: skip


def block_codes(
    weight: Tensor,
    factor: Tensor,
    scales: Tensor,
    codes: Tensor,
    errors: Tensor,
    losses: Tensor,
    start: int,
    count: int,
    group_size: int,
    top: int,
) -> None:
    """Quantize the columns of a block.

    Args:
        weight: float32 [M, K], contiguous.
        factor: float32 [K, K], contiguous: the Cholesky factor of the inverse Hessian, upper triangular.
        scales: float32 [G, M].
        codes: uint8 [M, K], contiguous, filled for these columns.
        errors: float32 [M, 128], filled: each column's error over the factor's diagonal, 0 beyond the block.
        losses: float32 [M], to which the squares of those are added; NaN where a weight is no number.
        start: First column of the block, where a group begins.
        count: Its columns, at most 128.
        group_size: Columns of a group.
        top: Largest code.
    """
    assert factor.is_contiguous() and errors.shape == (len(weight), BLOCK) and 0 < count <= BLOCK, (start, count)
    block_kernel[(triton.cdiv(len(weight), ROWS),)](
        weight, factor, scales, codes, errors, losses, len(weight), weight.shape[1], start, count, float(top),
        float((top + 1) // 2), GROUP=group_size, BLOCK=BLOCK, ROWS=ROWS, num_warps=ROWS, enable_fp_fusion=False,
    )  # fmt: skip
