"""GPTQ written out from the paper, as an oracle: plain torch, any float type, CPU.

`gptq_cholesky` is the paper's Algorithm 1 with the details that the authors' code adds (groups, order by falling
diagonal of the Hessian, dead inputs); it keeps the order of the floating point operations of that code, so that in
float32 its codes can be compared for equality. `gptq_elimination` is the paper's equations 2 and 3 and nothing else:
no Cholesky factor, no lazy blocks; the Hessian's inverse is updated by eliminating one input at a time.

Source: Frantar et al., "GPTQ", https://arxiv.org/abs/2210.17323, sections 3.1 (OBQ) and 3.3 (Algorithm 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric_scale(weight: Tensor, bits: int) -> Tensor:
    """Scale of each row, [M, 1], of the grid -2^(bits-1) .. 2^(bits-1) - 1."""
    absmax = weight.abs().amax(dim=1, keepdim=True)
    absmax = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
    return (absmax - -absmax) / (2**bits - 1)


def to_grid(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest steps, counted from zero."""
    half = 2 ** (bits - 1)
    return (torch.round(weight / scale) + half).clamp(0, 2**bits - 1) - half


def prepare(weight: Tensor, hessian: Tensor, damp: float, desc_act: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Zero dead inputs, sort by the diagonal, damp: weight and Hessian in the order of work, and that order."""
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    order = torch.arange(weight.shape[1])
    if desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    hessian.diagonal().add_(damp * hessian.diagonal().clone().mean())  # a strided mean sums in another order
    return weight, hessian, order


def restore(steps: Tensor, scales: list[Tensor], order: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps in the natural order of inputs, scales [M, G], g_idx [K]."""
    back = torch.argsort(order)
    g_idx = torch.arange(steps.shape[1]) // group_size
    return steps[:, back], torch.cat(scales, dim=1), g_idx[back]


def gptq_cholesky(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, damp: float, desc_act: bool, block: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1. A group's scale comes from the weights as they are when its block begins (the authors' code)."""
    weight, hessian, order = prepare(weight, hessian, damp, desc_act)
    columns = weight.shape[1]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    steps, scales = torch.zeros_like(weight), []
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part, factor = weight[:, first:last].clone(), inverse[first:last, first:last]
        errors = torch.zeros_like(part)
        for i in range(last - first):
            if (first + i) % group_size == 0:
                scales.append(symmetric_scale(weight[:, first + i : first + i + group_size], bits))
            column = part[:, i : i + 1]
            step = to_grid(column, scales[-1], bits)
            steps[:, first + i] = step.flatten()
            errors[:, i] = ((column - scales[-1] * step) / factor[i, i]).flatten()
            part[:, i:] -= errors[:, i : i + 1] * factor[i, i:]
        weight[:, last:] -= errors.matmul(inverse[first:last, last:])
    return restore(steps, scales, order, group_size)


def gptq_elimination(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, damp: float, desc_act: bool, block: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 2 and 3: quantize an input, spread its error over all that remain, eliminate it from the inverse."""
    weight, hessian, order = prepare(weight, hessian, damp, desc_act)
    inverse = torch.linalg.inv(hessian)
    steps, scales = torch.zeros_like(weight), []
    for i in range(weight.shape[1]):
        if i % block == 0:
            seen = weight.clone()
        if i % group_size == 0:
            scales.append(symmetric_scale(seen[:, i : i + group_size], bits))
        step = to_grid(weight[:, i : i + 1], scales[-1], bits)
        steps[:, i] = step.flatten()
        error = (weight[:, i : i + 1] - scales[-1] * step) / inverse[i, i]
        weight[:, i:] -= error * inverse[i, i:]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return restore(steps, scales, order, group_size)
