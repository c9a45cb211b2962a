"""From one module of a checkpoint to the tensors of a profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import SLOW
from s2quant.export.engines import split_names, split_sizes
from s2quant.packing import QuantizedWeight, pack, split_rows

Convert = Callable[[str, QuantizedWeight, S2Config], dict[str, Tensor]]
"""Takes the name on disk, the weight and the configuration; gives tensors by name."""


def packed(module: str, weight: QuantizedWeight, config: S2Config) -> dict[str, Tensor]:
    """Pack a weight under its own name: v1 zeros, float16 scales where nothing is lost.

    Args:
        module: Name on disk.
        weight: The weight.
        config: The model's configuration.

    Returns:
        Tensors by name.
    """
    half = weight if weight.scales.dtype == torch.float16 else _half_scales(weight)
    return {f"{module}.{part}": tensor for part, tensor in pack(half, name=module).items()}


def split(module: str, weight: QuantizedWeight, config: S2Config) -> dict[str, Tensor]:
    """Pack a weight as `packed`, a wqkv of the Slow AR as q, k and v.

    Args:
        module: Name on disk.
        weight: The weight.
        config: The model's configuration.

    Returns:
        Tensors by name.
    """
    if not is_split(module):
        return packed(module, weight, config)
    parts = zip(split_names(module), split_rows(weight, split_sizes(config)), strict=True)
    tensors: dict[str, Tensor] = {}
    for name, part in parts:
        tensors |= {key: tensor.clone() for key, tensor in packed(name, part, config).items()}  # three equal g_idx
    return tensors


def is_split(module: str) -> bool:
    """Tell whether `split` takes a packed module apart.

    Args:
        module: Name on disk.

    Returns:
        True for a wqkv of the Slow AR.
    """
    return module.startswith(f"{SLOW}.layers.") and module.endswith(".attention.wqkv")


def dequantized(module: str, weight: QuantizedWeight, config: S2Config) -> dict[str, Tensor]:
    """Dequantize a weight to bfloat16 under the original's name.

    Args:
        module: Name on disk.
        weight: The weight.
        config: The model's configuration.

    Returns:
        One tensor by name.
    """
    return {f"{module}.weight": weight.dequantize(torch.bfloat16)}


def _half_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """Store bf16 scales as float16 where nothing is lost; otherwise keep them, both are 16 bits."""
    half = weight.scales.to(torch.float16)
    same = bool((half.to(weight.scales.dtype) == weight.scales).all())
    return dataclasses.replace(weight, scales=half) if same else weight
