"""GPTQ on a GPU: gptqmodel's algorithm step by step, without waiting for the GPU on the way.

Orders and dead inputs, scales and rounding, blocks of 128 columns: all as gptqmodel 7.6 has them. Different are the
launches, three per block in place of hundreds, and how a block learns of those before it. With H = R R^T, R upper
triangular, quantized weights Q and D = W - Q for the columns before a block b, the weights of b that are best given
these are W_b + (D R[before, b]) R_bb^-1: GPTQ's updates, summed up. So the inverse of H is never made, only those of
its factor's blocks on the diagonal (`s2quant.quantize.factor`); linears that share their inputs share both. A linear
alone among its inputs is solved in two halves of its outputs, which do not depend on each other, so that two processes
can share it and end with the bits of one. What needs more than the damping that was asked for is left to gptqmodel.

Sources: Frantar et al., https://arxiv.org/abs/2210.17323; Gafni et al., https://arxiv.org/abs/2505.14638 (groups
ordered by their largest input, inputs within theirs).

Legend: M outputs, K inputs, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from s2quant.quantize.factor import block_inverses, upper_factor
from s2quant.quantize.hessian import Hessian
from s2quant.recipe import LinearSettings

BLOCK = 128  # columns of a block, as gptqmodel has it


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What a Hessian gives to every linear that reads its inputs.

    Args:
        order: int64 [K], the inputs in the order in which they are quantized.
        g_idx: int32 [K], the group of each input.
        groups: int64 [G], for each group the place of its scale among those found.
        dead: bool [K], inputs that were always zero.
        factor: float32 [K, K], R of the Hessian in that order; None: the damping does not suffice.
        inverses: float32 [blocks, 128, 128], of its blocks on the diagonal; empty without a factor.
    """

    order: Tensor
    g_idx: Tensor
    groups: Tensor
    dead: Tensor
    factor: Tensor | None
    inverses: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A linear quantized.

    Args:
        codes: uint8 [M, K], inputs in their natural order.
        scales: float32 [M, G].
        g_idx: int32 [K].
        loss: GPTQ's squared error, weighted by the Hessian, summed up; not finite where something went wrong.
        num_dead: Inputs that were always zero.
        num_one_sided: Groups (of one output) without a negative weight.
        is_lost: Whether every quantized weight is zero, though not every weight is.
    """

    codes: Tensor
    scales: Tensor
    g_idx: Tensor
    loss: float
    num_dead: int
    num_one_sided: int
    is_lost: bool


def prepare(hessian: Hessian, settings: LinearSettings, device: torch.device) -> Prepared:
    """Order the inputs, and factor the Hessian; done once for all linears and widths that share it.

    Args:
        hessian: Inputs of the linears; what was prepared is kept with it.
        settings: group_size, desc_act, act_group_aware and damp_percent.
        device: Where to work.

    Returns:
        What was prepared.

    Raises:
        UserError: No inputs were added, or the sum overflowed.
    """
    key = (settings.group_size, settings.desc_act, settings.act_group_aware, settings.damp_percent, str(device))
    if key not in hessian.prepared:
        hessian.prepared.clear()  # a factor is as large as the Hessian
        hessian.prepared[key] = _prepare(hessian.matrix().to(device), settings)
    found: Prepared = hessian.prepared[key]
    return found


def _prepare(matrix: Tensor, settings: LinearSettings) -> Prepared:
    """Prepare a Hessian [K, K], which is overwritten."""
    size, diagonal = settings.group_size, matrix.diagonal()
    columns = torch.arange(len(matrix), device=matrix.device)
    dead = diagonal == 0
    diagonal.add_(dead.float())
    groups = torch.arange(len(matrix) // size, device=matrix.device)
    if settings.desc_act:
        order = torch.argsort(diagonal, descending=True, stable=True)
        g_idx = torch.empty_like(columns).scatter_(0, order, columns // size)
    elif settings.act_group_aware:
        values, within = torch.sort(diagonal.view(-1, size), dim=1, descending=True, stable=True)
        by_largest = torch.argsort(values[:, 0], descending=True, stable=True)
        order = (within + size * groups[:, None])[by_largest].flatten()
        g_idx, groups = columns // size, torch.argsort(by_largest)
    else:
        order, g_idx = columns, columns // size
    ordered = matrix[order][:, order]
    factor = upper_factor(ordered, settings.damp_percent * ordered.diagonal().mean())
    inverses = torch.empty(0, BLOCK, BLOCK) if factor is None else block_inverses(factor, BLOCK)
    g_idx = g_idx.to(torch.int32)
    return Prepared(order=order, g_idx=g_idx, groups=groups, dead=dead, factor=factor, inverses=inverses)


def solve(weight: Tensor, prepared: Prepared, settings: LinearSettings) -> Solution:
    """Quantize a linear, or some of its outputs.

    Args:
        weight: Floating point [M, K]; not changed.
        prepared: From `prepare`, with a factor.
        settings: bits and group_size.

    Returns:
        The solution.
    """
    from s2quant.quantize.kernels import quantize_block  # needs triton

    factor, size, top = prepared.factor, settings.group_size, (1 << settings.bits) - 1
    assert factor is not None
    work = weight.detach().float().masked_fill(prepared.dead, 0)[:, prepared.order].contiguous()
    num_rows, num_columns = work.shape
    scales = torch.empty(num_columns // size, num_rows, device=work.device)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    before = torch.zeros_like(work)  # D R so far, of the columns to come
    updated, differences = (torch.zeros(num_rows, BLOCK, device=work.device) for _ in range(2))
    losses = torch.zeros(num_rows, device=work.device)
    num_one_sided = torch.zeros((), dtype=torch.int64, device=work.device)
    for number, start in enumerate(range(0, num_columns, BLOCK)):
        after = min(start + BLOCK, num_columns)
        count, inverse = after - start, prepared.inverses[number]
        if start:
            torch.addmm(work[:, start:after], before[:, start:after], inverse[:count, :count], out=updated[:, :count])
        else:
            updated[:, :count] = work[:, :count]
        grid = (start, count, size, top)
        quantize_block(work, updated, inverse, scales, codes, differences, losses, num_one_sided, *grid)
        if after < num_columns:
            before[:, after:].addmm_(differences[:, :count], factor[start:after, after:])
    is_lost = (codes == (top + 1) // 2).all() & weight.any()
    facts = [losses.double().sum() / 2, torch.isfinite(scales).all(), num_one_sided, prepared.dead.sum(), is_lost]
    loss, finite, one_sided, num_dead, lost = torch.stack([fact.double() for fact in facts]).tolist()
    return Solution(
        codes=codes[:, torch.argsort(prepared.order)],
        scales=scales[prepared.groups].T,
        g_idx=prepared.g_idx,
        loss=loss if finite else math.nan,
        num_dead=int(num_dead),
        num_one_sided=int(one_sided),
        is_lost=bool(lost),
    )
