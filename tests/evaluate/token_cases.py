"""Copies of a model with damaged layers, and damages put together."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from torch import nn

from s2quant.evaluate.tokens import TokenDamage
from s2quant.model import DualAR
from s2quant.quantize.rtn import rtn_quantize
from s2quant.recipe import LinearSettings


def quantized(model: DualAR, bits: int, parts: Sequence[str] = ("slow", "fast")) -> DualAR:
    """A copy with the linears of its layers rounded to nearest in groups of 32."""
    model = copy.deepcopy(model)
    settings = LinearSettings(method="rtn", bits=bits, group_size=32)
    for part in parts:
        for module in getattr(model, part).layers.modules():
            if isinstance(module, nn.Linear):
                weight, _ = rtn_quantize(module.weight, settings)
                module.weight = nn.Parameter(weight.dequantize(module.weight.dtype), requires_grad=False)
    return model


def pooled(damages: Sequence[TokenDamage], name: str = "kl") -> np.ndarray:
    return np.concatenate([getattr(one, name).ravel() for one in damages])
