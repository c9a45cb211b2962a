# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""What GPTQ does column by column, as a Triton kernel: scales of the groups of a block, then its columns in order.

It does gptqmodel's operations one by one in float32, each rounded to nearest: no multiplication is fused with an
addition (`enable_fp_fusion`), divisions are exact. So it gives the bits of its own loops, which take dozens of launches
and five waits for the GPU per group, and of its CUDA kernel, which has to be compiled by nvcc.

Legend: M outputs, K inputs, G groups.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from s2quant.quantize.solver import BLOCK

ROWS = 4  # of a program, one warp each
TO_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: added to a small number and subtracted, it rounds half to even
BEYOND = tl.constexpr(1024.0)  # steps from zero; no code is there


@triton.jit
def scale_of(values, mine, top):
    """Find the symmetric scale of each row's columns of a group, twice gptqmodel's where no weight is negative."""
    least = tl.min(tl.where(mine, values, float("inf")), axis=1)
    most = tl.max(tl.where(mine, values, -float("inf")), axis=1)
    low, high = tl.minimum(least, 0.0), tl.maximum(most, 0.0)
    high = tl.maximum(tl.abs(low), high)
    low = tl.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = tl.where(empty, -1.0, low), tl.where(empty, 1.0, high)
    found = tl.div_rn(high - low, tl.zeros_like(high) + top)
    one_sided = (least >= 0) & (most > 0)
    return tl.where(one_sided, found * 2, found), one_sided


@triton.jit(do_not_specialize=["start", "count"])
def block_kernel(
    weight, updated, inverse, scales, codes, differences, losses, num_one_sided, num_rows, num_columns, start, count,
    top, middle,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Quantize the columns of a block in their order, each error spread over the block's columns after it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < num_rows
    column = tl.arange(0, BLOCK)
    whole = inside[:, None] & (column < count)[None, :]
    place = row[:, None] * num_columns + start + column[None, :]
    local = row[:, None] * BLOCK + column[None, :]
    values = tl.load(updated + local, whole, 0.0)
    steps, found = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS,), tl.int64)
    for group in tl.static_range(BLOCK // GROUP):
        if group * GROUP < count:
            mine = (column // GROUP == group)[None, :]
            step, one_sided = scale_of(values, mine, top)
            tl.store(scales + (start // GROUP + group).to(tl.int64) * num_rows + row, step, inside)
            found += (one_sided & inside).to(tl.int64)
            steps = tl.where(mine, step[:, None], steps)
    tl.atomic_add(num_one_sided, tl.sum(found))
    all_codes = tl.zeros((ROWS, BLOCK), tl.float32)
    all_found = tl.zeros((ROWS, BLOCK), tl.float32)
    all_losses = tl.zeros((ROWS, BLOCK), tl.float32)
    for pivot in range(count):
        here = (column == pivot)[None, :]
        value = tl.sum(tl.where(here, values, 0.0), axis=1)
        step = tl.sum(tl.where(here, steps, 0.0), axis=1)
        line = inverse + pivot * BLOCK
        pivotal = tl.zeros_like(value) + tl.load(line + pivot)
        place_on_grid = tl.div_rn(value, step)
        place_on_grid = tl.where(place_on_grid > BEYOND, BEYOND, place_on_grid)  # keeps what is no number
        place_on_grid = tl.where(place_on_grid < -BEYOND, -BEYOND, place_on_grid)
        code = (place_on_grid + TO_NEAREST) - TO_NEAREST + middle
        code = tl.where(code > top, top, tl.where(code < 0, 0.0, code))
        quantized = step * (code - middle)
        residual = value - quantized
        error = tl.div_rn(residual, pivotal)
        loss = tl.div_rn(residual * residual, pivotal * pivotal)
        all_codes = tl.where(here, code[:, None], all_codes)
        all_found = tl.where(here, quantized[:, None], all_found)
        all_losses = tl.where(here, loss[:, None], all_losses)
        spread = tl.load(line + column, (column >= pivot) & (column < count), 0.0)[None, :]
        values = tl.where((column >= pivot)[None, :], values - error[:, None] * spread, values)
    tl.store(codes + place, all_codes.to(tl.uint8), whole)
    tl.store(differences + local, tl.load(weight + place, whole, 0.0) - all_found, whole)
    tl.store(losses + row, tl.load(losses + row, inside, 0.0) + tl.sum(all_losses, axis=1), inside)


def quantize_block(
    weight: Tensor,
    updated: Tensor,
    inverse: Tensor,
    scales: Tensor,
    codes: Tensor,
    differences: Tensor,
    losses: Tensor,
    num_one_sided: Tensor,
    start: int,
    count: int,
    group_size: int,
    top: int,
) -> None:
    """Find the scales of a block's groups, and quantize its columns.

    Args:
        weight: float32 [M, K], contiguous, as it was at first.
        updated: float32 [M, 128], contiguous: the block's weights, the best ones given the columns before it.
        inverse: float32 [128, 128], contiguous: the block's part, on the diagonal, of the upper triangular Cholesky
            factor of the inverse Hessian.
        scales: float32 [G, M], contiguous, filled for these groups.
        codes: uint8 [M, K], contiguous, filled for these columns.
        differences: float32 [M, 128], contiguous, filled for these columns: what was lost, `weight` - quantized.
        losses: float32 [M], to which the squares of the errors over the inverse's diagonal are added; NaN where a
            weight is no number.
        num_one_sided: int64 [], to which groups (of one output) without a negative weight, and with a positive one,
            are added.
        start: First column of the block, where a group begins.
        count: Its columns, whole groups, at most 128.
        group_size: Columns of a group: a power of two.
        top: Largest code.
    """
    assert start % group_size == count % group_size == 0 and 0 < count <= BLOCK, (start, count, group_size)
    assert all(tensor.is_contiguous() for tensor in (weight, updated, inverse, scales, codes, differences))
    with torch.cuda.device_of(weight):  # where Triton launches
        block_kernel[(triton.cdiv(len(weight), ROWS),)](
            weight, updated, inverse, scales, codes, differences, losses, num_one_sided, len(weight), weight.shape[1],
            start, count, float(top), float((top + 1) // 2),
            GROUP=group_size, BLOCK=BLOCK, ROWS=ROWS, num_warps=ROWS, enable_fp_fusion=False,
        )  # fmt: skip
