"""A linear in ranges of its outputs, which different processes quantize.

Outputs of a linear do not depend on each other once the Hessian is known. How a linear is divided depends on where it
is quantized, not on how many processes there are, so that they end with the bits of one.

Legend: M outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from s2quant.gpu import kernel_obstacle
from s2quant.packing import QuantizedWeight
from s2quant.quantize.rtn import rtn_quantize
from s2quant.quantize.stats import QuantStats
from s2quant.recipe import LinearSettings


def row_ranges(weight: Tensor, alone: bool) -> list[slice]:
    """Say which outputs of a linear are quantized together.

    On a GPU a linear that shares its inputs with no other is quantized in two parts, whoever works on them.

    Args:
        weight: [M, K].
        alone: Whether it shares its inputs with no other linear.

    Returns:
        Ranges of outputs, in order; all but the last are multiples of 32 long.
    """
    rows, half = len(weight), len(weight) // 64 * 32
    if not alone or not half or kernel_obstacle(weight.device) is not None:
        return [slice(0, rows)]
    return [slice(0, half), slice(half, rows)]


def join_rows(
    parts: Sequence[tuple[QuantizedWeight, QuantStats]], weight: Tensor, settings: LinearSettings, name: str
) -> tuple[QuantizedWeight, QuantStats]:
    """Put the outputs of a linear together.

    Args:
        parts: Weight and what happened of each range, in order.
        weight: The whole linear's [M, K].
        settings: What it was to be quantized by.
        name: How messages name it.

    Returns:
        The whole; rounded to nearest if a part was.

    Raises:
        UserError: The weight is unusable.
    """
    weights, stats = [part[0] for part in parts], [part[1] for part in parts]
    first = stats[0]
    if len(parts) == 1:
        return parts[0]
    for failed in stats:
        if failed.method != "gptq":
            rounded, facts = rtn_quantize(weight, settings, name)
            told = {key: getattr(failed, key) for key in ("fallback", "num_tokens", "num_dead")}
            return rounded, replace(facts, **told)
    joined = replace(
        weights[0],
        codes=torch.cat([part.codes for part in weights]),
        scales=torch.cat([part.scales for part in weights], dim=1),
        zeros=torch.cat([part.zeros for part in weights], dim=1),
    )
    return joined, replace(
        first,
        loss=sum(part.loss or 0.0 for part in stats),
        seconds=sum(part.seconds for part in stats),
        num_one_sided=sum(part.num_one_sided for part in stats),
        num_subnormal_scales=sum(part.num_subnormal_scales for part in stats),
        max_scale_error=max(part.max_scale_error for part in stats),
    )
