# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""What GPTQ does column by column, as two Triton kernels: scales of a group, and 128 columns in their order.

Both do gptqmodel's operations one by one in float32, each rounded to nearest: no multiplication is fused with an
addition (`enable_fp_fusion`), divisions are exact. So they give the bits of its own loops, which take dozens of launches
and five waits for the GPU per group, and of its CUDA kernel, which has to be compiled by nvcc.

Legend: M outputs, G groups.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

BLOCK = 128  # columns of a block, as gptqmodel has it
ROWS = 4  # of a program, one warp each
TO_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: added to a small number and subtracted, it rounds half to even
BEYOND = tl.constexpr(1024.0)  # steps from zero; no code is there


@triton.jit
def scales_kernel(x, scale, num_one_sided, num_rows, stride, top, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Find the symmetric scale of each row of a group, twice gptqmodel's where no weight is negative."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    column = tl.arange(0, GROUP)
    values = tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], inside[:, None], 0.0)
    least, most = tl.min(values, axis=1), tl.max(values, axis=1)
    low, high = tl.minimum(least, 0.0), tl.maximum(most, 0.0)
    high = tl.maximum(tl.abs(low), high)
    low = tl.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = tl.where(empty, -1.0, low), tl.where(empty, 1.0, high)
    found = tl.div_rn(high - low, tl.zeros_like(high) + top)
    one_sided = (least >= 0) & (most > 0)
    tl.store(scale + row, tl.where(one_sided, found * 2, found), inside)
    tl.atomic_add(num_one_sided, tl.sum((one_sided & inside).to(tl.int64)))


@triton.jit
def block_kernel(
    work, hinv, scale, zero, group_of, quantized, errors, losses, num_rows, top,
    work_stride, hinv_stride, hinv_step, scale_stride, zero_stride, quantized_stride, errors_stride, losses_stride,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Quantize the columns of a block in their order, each error spread over the columns after it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < num_rows
    column = tl.arange(0, BLOCK)
    whole = inside[:, None] & (column >= 0)[None, :]
    values = tl.load(work + row[:, None] * work_stride + column[None, :], whole, 0.0)
    all_quantized = tl.zeros((ROWS, BLOCK), tl.float32)
    all_errors = tl.zeros((ROWS, BLOCK), tl.float32)
    all_losses = tl.zeros((ROWS, BLOCK), tl.float32)
    for pivot in range(BLOCK):
        here = (column == pivot)[None, :]
        value = tl.sum(tl.where(here, values, 0.0), axis=1)
        group = tl.load(group_of + pivot)
        step = tl.load(scale + group * scale_stride + row, inside, 1.0)
        middle = tl.load(zero + group * zero_stride + row, inside, 0.0)
        pivotal = tl.zeros_like(value) + tl.load(hinv + pivot * hinv_stride + pivot * hinv_step)
        steps = tl.div_rn(value, step)
        steps = tl.where(steps > BEYOND, BEYOND, tl.where(steps < -BEYOND, -BEYOND, steps))  # keeps what is no number
        code = (steps + TO_NEAREST) - TO_NEAREST + middle
        code = tl.where(code > top, top, tl.where(code < 0, 0.0, code))
        rounded = step * (code - middle)
        residual = value - rounded
        error = tl.div_rn(residual, pivotal)
        loss = tl.div_rn(residual * residual, pivotal * pivotal)
        all_quantized = tl.where(here, rounded[:, None], all_quantized)
        all_errors = tl.where(here, error[:, None], all_errors)
        all_losses = tl.where(here, loss[:, None], all_losses)
        spread = tl.load(hinv + pivot * hinv_stride + column * hinv_step, column >= pivot, 0.0)[None, :]
        values = tl.where((column >= pivot)[None, :], values - error[:, None] * spread, values)
    tl.store(work + row[:, None] * work_stride + column[None, :], values, whole)
    tl.store(quantized + row[:, None] * quantized_stride + column[None, :], all_quantized, whole)
    tl.store(errors + row[:, None] * errors_stride + column[None, :], all_errors, whole)
    tl.store(losses + row[:, None] * losses_stride + column[None, :], all_losses, whole)


def group_scales(x: Tensor, top: int, num_one_sided: Tensor) -> Tensor:
    """Find the scales of one group.

    Args:
        x: float32 [M, group], rows anywhere, columns side by side; the group's size is a power of two.
        top: Largest code.
        num_one_sided: int64 [], to which rows without a negative weight, and with a positive one, are added.

    Returns:
        float32 [M].
    """
    assert x.dtype == torch.float32 and x.stride(1) == 1, (x.dtype, x.stride())
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(len(x), ROWS),)
    scales_kernel[grid](
        x, scale, num_one_sided, len(x), x.stride(0), float(top),
        GROUP=x.shape[1], ROWS=ROWS, num_warps=ROWS, enable_fp_fusion=False,
    )  # fmt: skip
    return scale


def block_update(
    work: Tensor,
    hinv: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_of: Tensor,
    quantized: Tensor,
    errors: Tensor,
    losses: Tensor,
    top: int,
) -> None:
    """Quantize 128 columns, in place, as gptqmodel's operation of that name.

    Args:
        work: float32 [M, 128], the weights; what is left of them afterwards.
        hinv: float32 [128, 128], of the Cholesky factor of the inverse Hessian.
        scale: float32 [G, M].
        zero: float32 [G, M].
        group_of: int32 [128], the group of each column.
        quantized: float32 [M, 128], filled: the weights that the codes stand for.
        errors: float32 [M, 128], filled: each column's error over the factor's diagonal.
        losses: float32 [M, 128], filled: the squares of those.
        top: Largest code.
    """
    assert work.shape[1] == BLOCK and hinv.shape == (BLOCK, BLOCK), (work.shape, hinv.shape)
    grid = (triton.cdiv(len(work), ROWS),)
    block_kernel[grid](
        work, hinv, scale, zero, group_of, quantized, errors, losses, len(work), float(top),
        work.stride(0), hinv.stride(0), hinv.stride(1), scale.stride(0), zero.stride(0),
        quantized.stride(0), errors.stride(0), losses.stride(0),
        BLOCK=BLOCK, ROWS=ROWS, num_warps=ROWS, enable_fp_fusion=False,
    )  # fmt: skip
