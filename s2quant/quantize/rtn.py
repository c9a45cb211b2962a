"""Round-to-nearest: each weight goes to the closest point of its group's grid, without calibration.

The grid is GPTQ's symmetric one: scale = 2 * absmax / (2^bits - 1), zero = 2^(bits-1). So the most negative weight
of a group is nearly representable and the most positive one is clipped by half a step. The scale is rounded to
float16 before the weights are, hence what is read back from disk is exactly what was computed here.

Legend: M outputs, K inputs, G groups.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from s2quant.errors import UserError
from s2quant.packing import QuantizedWeight, packed_shapes, symmetric_zero
from s2quant.quantize.stats import QuantStats
from s2quant.recipe import LinearSettings

_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredScales:
    """Scales as they are written, and what rounding them did.

    Args:
        scales: float16, the shape of the exact scales.
        num_subnormal: Scales below float16's normal range.
        max_error: Largest relative rounding error of the others.
    """

    scales: Tensor
    num_subnormal: int
    max_error: float


def rtn_quantize(weight: Tensor, settings: LinearSettings, name: str = "weight") -> tuple[QuantizedWeight, QuantStats]:
    """Quantize a linear by rounding to nearest.

    Args:
        weight: Floating point [M, K]; not changed.
        settings: bits and group_size are used.
        name: How messages name the module.

    Returns:
        The quantized weight, its groups in the natural order of the inputs, and what happened.

    Raises:
        UserError: The weight is not finite, does not divide into groups and words, or needs a scale beyond float16.
    """
    start = time.perf_counter()
    check_weight(weight, settings, name)
    rows, columns = weight.shape
    size, zero, top = settings.group_size, symmetric_zero(settings.bits), (1 << settings.bits) - 1
    groups = weight.detach().float().view(rows, columns // size, size)  # [M, G, group]
    absmax = groups.abs().amax(dim=2)  # [M, G]
    absmax = torch.where(absmax == 0, 1.0, absmax)  # GPTQ's choice for an empty group: any grid has zero on it
    stored = store_scales(2 * absmax / top, name)
    scale = stored.scales.float().unsqueeze(2)
    steps = torch.where(scale == 0, 0.0, groups / scale)  # the scale underflows below absmax of about 2e-7
    codes = steps.round_().add_(zero).clamp_(0, top).to(torch.uint8)
    quantized = QuantizedWeight(
        codes=codes.view(rows, columns),
        scales=stored.scales.T.contiguous(),
        zeros=torch.full((columns // size, rows), zero, dtype=torch.uint8, device=weight.device),
        g_idx=torch.arange(columns, dtype=torch.int32, device=weight.device) // size,
        bits=settings.bits,
        group_size=size,
    )
    stats = QuantStats(
        method="rtn",
        solver=None,
        loss=None,
        damp_percent=None,
        num_tokens=0,
        seconds=time.perf_counter() - start,
        fallback=None,
        num_dead=0,
        num_one_sided=0,
        num_subnormal_scales=stored.num_subnormal,
        max_scale_error=stored.max_error,
    )
    return quantized, stats


def check_weight(weight: Tensor, settings: LinearSettings, name: str) -> None:
    """Refuse a weight that cannot be quantized.

    Args:
        weight: The weight [M, K].
        settings: The settings.
        name: How messages name the module.

    Raises:
        UserError: It is no floating point matrix, not finite, or does not divide into groups and words.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UserError(
            f"{name}: {weight.dtype} of shape {tuple(weight.shape)}",
            "a floating point matrix [out_features, in_features]",
            "quantize the weights of linears only",
        )
    packed_shapes(weight.shape[0], weight.shape[1], settings.bits, settings.group_size, name)
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise UserError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite",
            "finite weights",
            "check that the checkpoint is whole: compare its hashes, or download it again",
        )


def store_scales(exact: Tensor, name: str) -> StoredScales:
    """Round scales to float16, as they are written.

    Args:
        exact: float32 of any shape, positive.
        name: How messages name the module.

    Returns:
        The float16 scales with what rounding did to them.

    Raises:
        UserError: A scale is beyond float16's range.
    """
    stored, normal = exact.to(torch.float16), exact >= _SMALLEST_NORMAL
    error = torch.where(normal, (stored.float() / exact - 1).abs(), 0.0)
    facts = ((~torch.isfinite(stored)).sum(), normal.sum(), error.max())
    beyond, num_normal, max_error = torch.stack([fact.double() for fact in facts]).tolist()  # one wait for a GPU
    if beyond:
        raise UserError(
            f"{name}: {int(beyond)} scales beyond float16, the largest {float(exact.max()):g}",
            f"scales up to {torch.finfo(torch.float16).max:g}",
            "keep this module in bf16",
        )
    return StoredScales(scales=stored, num_subnormal=exact.numel() - int(num_normal), max_error=max_error)


def nearest(weight: Tensor, settings: LinearSettings) -> Tensor:
    """Compute what `rtn_quantize` makes of a weight, dequantized; nothing here waits for the device.

    Args:
        weight: Finite floating point [M, K].
        settings: bits and group_size are used.

    Returns:
        float32 [M, K]; NaN in groups whose scale is beyond float16.
    """
    zero, top = symmetric_zero(settings.bits), (1 << settings.bits) - 1
    groups = weight.detach().float().unflatten(1, (-1, settings.group_size))
    absmax = groups.abs().amax(dim=2, keepdim=True)
    scale = (2 * torch.where(absmax == 0, 1.0, absmax) / top).to(torch.float16).float()
    steps = torch.where(scale == 0, 0.0, groups / scale).round_().clamp_(-zero, top - zero)
    return (steps * scale).flatten(1)
