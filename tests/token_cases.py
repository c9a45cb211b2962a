"""Copies of a model with damaged layers; damages of a model beside another in memory, and put together."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from torch import nn

from s2quant.evaluate.tokens import TokenDamage, TokenSequence, check_sequences, teacher_forced, token_damage
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


def token_metrics(
    baseline: DualAR, model: DualAR, sequences: Sequence[TokenSequence], residual_size: int
) -> list[TokenDamage]:
    """Compare two models that are both in memory, without the cache of `measure_arms`."""
    check_sequences(baseline.config, sequences, residual_size)
    found = []
    for one in sequences:
        reference, own = (teacher_forced(arm, one, residual_size) for arm in (baseline, model))
        found.append(token_damage(reference, own, model, one, residual_size))
    return found


def pooled(damages: Sequence[TokenDamage], name: str = "kl") -> np.ndarray:
    return np.concatenate([getattr(one, name).ravel() for one in damages])
