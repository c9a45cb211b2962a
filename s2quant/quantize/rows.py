"""A linear in ranges of its outputs, which different processes quantize and compare with the dense ones.

Outputs of a linear do not depend on each other once the Hessian is known. How a linear is divided depends on where it
is quantized, not on how many processes there are, so that they end with the bits of one.

Legend: M outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2quant.gpu import kernel_obstacle
from s2quant.packing import QuantizedWeight
from s2quant.quantize.outputs import Squares
from s2quant.quantize.rtn import rtn_quantize
from s2quant.quantize.stats import QuantStats
from s2quant.recipe import LinearSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Some outputs of a linear, or all.

    Args:
        weight: Quantized.
        stats: What happened.
        squares: How far its outputs are from the dense ones; None without rows that are held out.
    """

    weight: QuantizedWeight
    stats: QuantStats
    squares: Squares | None = None


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


def join_rows(parts: Sequence[Part], weight: Tensor, settings: LinearSettings, name: str) -> Part:
    """Put the outputs of a linear together.

    Args:
        parts: Of each range, in order.
        weight: The whole linear's [M, K].
        settings: What it was to be quantized by.
        name: How messages name it.

    Returns:
        The whole; rounded to nearest if a part was.

    Raises:
        UserError: The weight is unusable.
    """
    if len(parts) == 1:
        return parts[0]
    stats, squares = [part.stats for part in parts], [part.squares for part in parts if part.squares is not None]
    sums = {kind: sum(getattr(part, kind) for part in squares) for kind in ("whole", "ours", "nearest")}
    for failed in stats:
        if failed.method != "gptq":
            rounded, facts = rtn_quantize(weight, settings, name)
            told = {key: getattr(failed, key) for key in ("fallback", "num_tokens", "num_dead")}
            both = Squares(**sums | {"ours": sums["nearest"]}) if squares else None
            return Part(weight=rounded, stats=replace(facts, **told), squares=both)
    weights = [part.weight for part in parts]
    joined = replace(
        weights[0],
        codes=torch.cat([part.codes for part in weights]),
        scales=torch.cat([part.scales for part in weights], dim=1),
        zeros=torch.cat([part.zeros for part in weights], dim=1),
    )
    facts = replace(
        stats[0],
        loss=sum(part.loss or 0.0 for part in stats),
        seconds=sum(part.seconds for part in stats),
        num_one_sided=sum(part.num_one_sided for part in stats),
        num_subnormal_scales=sum(part.num_subnormal_scales for part in stats),
        max_scale_error=max(part.max_scale_error for part in stats),
    )
    return Part(weight=joined, stats=facts, squares=Squares(**sums) if squares else None)
