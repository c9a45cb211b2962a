"""How far a quantized linear's outputs are from the dense one's, on held-out rows; recorded for every module.

Legend: M outputs, K inputs, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from s2quant.packing import QuantizedWeight
from s2quant.quantize.rtn import nearest
from s2quant.recipe import LinearSettings


@dataclass(frozen=True, kw_only=True)
class Squares:
    """Sums over rows and outputs.

    Args:
        whole: Squares of the dense linear's outputs.
        ours: Squares of what quantizing adds to them.
        nearest: Squares of what rounding to nearest adds; NaN where that cannot be done.
    """

    whole: float
    ours: float
    nearest: float


def output_squares(
    rows: Tensor, weight: Tensor, quantized: QuantizedWeight, settings: LinearSettings
) -> Squares | None:
    """Compare a quantized linear, or some of its outputs, with the dense one.

    Args:
        rows: float32 [R, K], on the weight's device.
        weight: Floating point [M, K], dense.
        quantized: Of the same outputs.
        settings: What to round to nearest by.

    Returns:
        The sums, of products in float32 (on a GPU weights and what is added to them are rounded to 11 bits for that);
        None without rows.
    """
    if not len(rows):
        return None
    dense = weight.float()
    added = [quantized.dequantize(torch.float32) - dense, nearest(weight, settings) - dense]
    with _tensor_cores():
        lengths = torch.stack([F.linear(rows, matrix).norm() for matrix in (dense, *added)])
    whole, ours, rounded = (length**2 for length in lengths.double().tolist())
    return Squares(whole=whole, ours=ours, nearest=rounded)


def output_errors(squares: Squares | None) -> dict[str, float | None]:
    """Give the relative errors of a linear's outputs.

    Args:
        squares: Of all its outputs.

    Returns:
        output_error and output_error_rtn: ||X (Wq - W)^T|| / ||X W^T||; None without rows, or where rounding to nearest
        cannot be done.
    """
    if squares is None:
        return {"output_error": None, "output_error_rtn": None}
    whole = max(squares.whole, 1e-60)
    return {
        "output_error": math.sqrt(squares.ours / whole),
        "output_error_rtn": None if math.isnan(squares.nearest) else math.sqrt(squares.nearest / whole),
    }


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let a GPU's float32 products take TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
