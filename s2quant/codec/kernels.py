# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201, ANN202 (what Triton compiles has no types to write down)
"""What stands between two convolutions of the codec, in one pass over memory.

Legend: B batch, C channels, S positions, s stride, P past columns that the next convolution reads.

A convolution's bias, the residual branch, Snake and the columns before the first one were a kernel each, and took more
time than the convolutions. What a transposed convolution left in s rows per channel is brought into order on the way.
A program has one channel of one stream and BLOCK columns; the first of these also does what is there once: the past.

Lengths are no part of what is compiled, so that chunks of all sizes share their kernels.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

BLOCK = 1024  # columns of a program
UNIT = 4  # columns that are read at once where rows have a multiple of that: 16 bytes


@triton.jit
def _value(
    y, bias, residual, overhang, n, inside, row, channel, num_columns, y_columns, STRIDE: tl.constexpr
):  # fmt: skip
    """Compute columns n of a row: the convolution with its bias, and the residual branch."""
    if STRIDE == 1:
        x = tl.load(y + row * num_columns + n, inside, 0.0)
    else:
        x = tl.load(y + row * STRIDE * y_columns + n % STRIDE * y_columns + n // STRIDE, inside, 0.0)
    if overhang is not None:
        x += tl.load(overhang + row * STRIDE + n, inside & (n < STRIDE), 0.0)
    if bias is not None:
        x += tl.load(bias + channel)
    if residual is not None:
        x += tl.load(residual + row * num_columns + n, inside, 0.0)
    return x


@triton.jit
def _snake(x, alpha, share):
    """Apply Snake: `tl.sin` is the exact one, as in PyTorch."""
    sine = tl.sin(alpha * x)
    return sine * sine * share + x


@triton.jit(do_not_specialize=["num_units", "y_columns", "num_channels"])
def finish_kernel(
    y, bias, residual, overhang, alpha, past, total, out, num_units, y_columns, num_channels,
    PAST: tl.constexpr, STRIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Finish a convolution, and give the next one its input."""
    block, channel = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64) * num_channels + channel
    num_columns = num_units * UNIT
    factor = tl.load(alpha + channel)
    share = 1 / (factor + 1e-9)
    n = block * BLOCK + tl.arange(0, BLOCK)
    inside = n < num_columns
    x = _value(y, bias, residual, overhang, n, inside, row, channel, num_columns, y_columns, STRIDE)
    if total is not None:
        tl.store(total + row * num_columns + n, x, inside)
    to = out + row * (num_columns + PAST) + PAST
    tl.store(to + n, _snake(x, factor, share), inside)
    if (PAST > 0 or overhang is not None) and block == 0:  # what is there once
        h = tl.arange(0, HEAD)
        if PAST > 0:
            before = tl.zeros((HEAD,), tl.float32)
            if past is not None:
                old, here = past + row * PAST + h, h < PAST
                before = tl.load(old, here, 0.0)
                last = num_columns - PAST + h  # columns that are the next chunk's past; negative: still the old one
                new = here & (last >= 0)
                z = _value(y, bias, residual, overhang, last, new, row, channel, num_columns, y_columns, STRIDE)
                still = tl.load(old + num_columns, here & (last < 0), 0.0)
                kept = tl.where(last < 0, still, _snake(z, factor, share))
            tl.store(to - PAST + h, before, h < PAST)
        if overhang is not None:
            unfinished = tl.load(y + (row * STRIDE + h) * y_columns + y_columns - 1, h < STRIDE, 0.0)
        tl.debug_barrier()  # this program alone reads what it overwrites, and all of it has been read here
        if past is not None:
            tl.store(past + row * PAST + h, kept, h < PAST)
        if overhang is not None:
            tl.store(overhang + row * STRIDE + h, unfinished, h < STRIDE)


def finish(
    y: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    *,
    num_past: int = 0,
    past: Tensor | None = None,
    residual: Tensor | None = None,
    keep: bool = False,
    stride: int = 1,
    overhang: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add bias and residual branch to a convolution's output, apply Snake, and put it behind the past.

    Args:
        y: float32 [B, C, S]; with a stride [B, C * s, S / s + 1], in row c * s + j and column t what belongs to
            channel c and position t * s + j. Contiguous, as are all others.
        bias: float32 [C], or None.
        alpha: Of Snake, float32 [1, C, 1].
        num_past: P.
        past: The stream's last columns, float32 [B, C, P], overwritten with those of this chunk; None: zeros.
        residual: What is added, float32 [B, C, S], or None.
        keep: Whether the sum is wanted, too.
        stride: s.
        overhang: Partial sums of the first s columns, float32 [B, C, s], overwritten with the last column of y; None
            where a signal begins, or s is 1.

    Returns:
        The next convolution's input, float32 [B, C, P + S], and the sum [B, C, S] or None.
    """
    batch, channels = y.shape[0], alpha.numel()
    num_columns = y.shape[2] if stride == 1 else (y.shape[2] - 1) * stride
    assert y.shape[1] == channels * stride and stride <= BLOCK, (y.shape, alpha.shape, stride)
    assert bias is None or bias.numel() == channels
    assert past is None or past.shape == (batch, channels, num_past)
    assert overhang is None or (stride > 1 and overhang.shape == (batch, channels, stride))
    assert residual is None or residual.shape == (batch, channels, num_columns)
    parts = [part for part in (y, bias, alpha, past, residual, overhang) if part is not None]
    assert all(part.is_contiguous() and part.dtype == torch.float32 for part in parts)
    out = torch.empty(batch, channels, num_past + num_columns, dtype=y.dtype, device=y.device)
    total = torch.empty(batch, channels, num_columns, dtype=y.dtype, device=y.device) if keep else None
    unit = UNIT if num_columns % UNIT == 0 else 1
    finish_kernel[triton.cdiv(num_columns, BLOCK), channels, batch](
        y, bias, residual, overhang, alpha, past if num_past else None, total, out,
        num_columns // unit, y.shape[2], channels,
        PAST=num_past, STRIDE=stride, UNIT=unit, BLOCK=BLOCK,
        HEAD=triton.next_power_of_2(max(num_past, stride)), num_warps=4,
    )  # fmt: skip
    return out, total
