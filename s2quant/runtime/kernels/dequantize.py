# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""A packed weight as a bf16 matrix, for as many rows as make a matrix product cheaper than reading codes."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from s2quant.runtime.kernels.layout import STEP_INPUTS, Packed
from s2quant.runtime.kernels.plain import rows_packed
from s2quant.runtime.kernels.ptx import TILE


@triton.jit
def dequantize_kernel(words, scales, out, num_outputs, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Write a tile of 16 outputs and 128 inputs."""
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    inputs = tl.program_id(1) * 128 + tl.arange(0, 128)
    values = rows_packed(words, scales, row, inputs, K, BITS, GROUP)
    where = row.to(tl.int64)[:, None] * K + inputs[None, :]
    tl.store(out + where, values.to(out.dtype.element_ty), (row < num_outputs)[:, None] & (inputs < K)[None, :])


def dequantize(packed: Packed) -> Tensor:
    """Compute the bf16 weight.

    Args:
        packed: The packed weight, on a CUDA device.

    Returns:
        bf16 [M, K], inputs in the packed order.
    """
    out = torch.empty(packed.out_features, packed.in_features, dtype=torch.bfloat16, device=packed.words.device)
    grid = (-(-packed.out_features // TILE), packed.in_features // STEP_INPUTS)
    dequantize_kernel[grid](
        packed.words,
        packed.scales,
        out,
        packed.out_features,
        K=packed.in_features,
        BITS=packed.bits,
        GROUP=packed.group_size,
    )
    return out
