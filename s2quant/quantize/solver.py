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
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from s2quant.quantize.factor import block_inverses, upper_factor
from s2quant.quantize.hessian import Hessian
from s2quant.recipe import LinearSettings
from s2quant.runtime.captures import capture, capture_stream

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


class _Space:
    """What solving linears of some sizes reads and writes.

    Args:
        shape: M and K.
        size: Columns of a group.
        top: Largest code.
        device: Where to work.
        is_kept: Whether it serves several linears, one after the other; their launches are captured with the first.
    """

    def __init__(self, shape: torch.Size, size: int, top: int, device: torch.device, is_kept: bool) -> None:
        (num_rows, num_columns), self.size, self.top, self.is_kept = shape, size, top, is_kept
        self.before = torch.empty(num_rows, num_columns, device=device)  # D R so far, of the columns to come
        self.updated, self.differences = (torch.zeros(num_rows, BLOCK, device=device) for _ in range(2))
        self.scales = torch.empty(num_columns // size, num_rows, device=device)
        self.codes = torch.empty(num_rows, num_columns, dtype=torch.uint8, device=device)
        self.losses = torch.empty(num_rows, device=device)
        self.num_one_sided = torch.empty((), dtype=torch.int64, device=device)
        self._read: tuple[Tensor, ...] = ()  # the weights at first, R, the inverses of its blocks
        self._factor: Callable[[], Tensor | None] = lambda: None  # the R that was copied last, if it is still there
        self._graph: torch.cuda.CUDAGraph | None = None

    def solve(self, *read: Tensor) -> None:
        """Fill codes, scales, losses and the number of one-sided groups.

        Args:
            *read: float32: the weights [M, K] in the order of their columns, R [K, K], the inverses of its blocks.
        """
        if not self.is_kept:
            self._read = read
            self._run()
            return
        if not self._read:
            self._read = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in read)
        is_known = self._factor() is read[1]  # of the linear before, which shares its inputs
        for ours, theirs in zip(self._read[: 1 if is_known else 3], read, strict=False):
            ours.copy_(theirs)
        self._factor = weakref.ref(read[1])
        if self._graph is None:
            self._graph = self._capture(self.before.device)
        self._graph.replay()

    def _capture(self, device: torch.device) -> torch.cuda.CUDAGraph:
        stream, graph = capture_stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._run()  # libraries take their work space, Triton compiles and loads its kernel
        with capture(graph, None, stream, tidies=False):
            self._run()
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph

    def _run(self) -> None:
        """Launch everything; nothing waits for the device."""
        from s2quant.quantize.kernels import quantize_block  # needs triton

        work, factor, inverses = self._read
        before, updated, differences, num_columns = self.before, self.updated, self.differences, work.shape[1]
        for sums in (before, self.losses, self.num_one_sided):
            sums.zero_()
        for number, start in enumerate(range(0, num_columns, BLOCK)):
            after = min(start + BLOCK, num_columns)
            count, inverse = after - start, inverses[number]
            if start:
                now, inside = slice(start, after), inverse[:count, :count]
                torch.addmm(work[:, now], before[:, now], inside, out=updated[:, :count])
            else:
                updated[:, :count] = work[:, :count]
            found = (self.scales, self.codes, differences, self.losses, self.num_one_sided)
            quantize_block(work, updated, inverse, *found, start, count, self.size, self.top)
            if after < num_columns:
                before[:, after:].addmm_(differences[:, :count], factor[start:after, after:])


_KEPT: ContextVar[dict[Hashable, _Space] | None] = ContextVar("_KEPT", default=None)


@contextmanager
def spaces_kept() -> Iterator[None]:
    """Let linears of like sizes on a GPU be solved by the same launches, captured once; for one thread.

    Launching takes longer than what is launched: 11 ms for 1280 x 9728 (reports/2026-11-27-two-gpus).

    Yields:
        Nothing.
    """
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def _space(shape: torch.Size, size: int, top: int, device: torch.device) -> _Space:
    """Take the space for a linear of these sizes, or make one."""
    kept = _KEPT.get()
    if kept is None or device.type != "cuda":
        return _Space(shape, size, top, device, is_kept=False)
    key = (shape, size, top, device)
    if key not in kept:
        kept[key] = _Space(shape, size, top, device, is_kept=True)
    return kept[key]


def solve(weight: Tensor, prepared: Prepared, settings: LinearSettings) -> Solution:
    """Quantize a linear, or some of its outputs.

    Args:
        weight: Floating point [M, K]; not changed.
        prepared: From `prepare`, with a factor.
        settings: bits and group_size.

    Returns:
        The solution.
    """
    size, top = settings.group_size, (1 << settings.bits) - 1
    assert prepared.factor is not None
    work = weight.detach().float().masked_fill(prepared.dead, 0)[:, prepared.order].contiguous()
    space = _space(work.shape, size, top, work.device)
    space.solve(work, prepared.factor, prepared.inverses)
    is_lost = (space.codes == (top + 1) // 2).all() & weight.any()
    finite = torch.isfinite(space.scales).all()
    facts = [space.losses.double().sum() / 2, finite, space.num_one_sided, prepared.dead.sum(), is_lost]
    loss, finite, one_sided, num_dead, lost = torch.stack([fact.double() for fact in facts]).tolist()
    return Solution(
        codes=space.codes[:, torch.argsort(prepared.order)],
        scales=space.scales[prepared.groups].T,
        g_idx=prepared.g_idx,
        loss=loss if finite else math.nan,
        num_dead=int(num_dead),
        num_one_sided=int(one_sided),
        is_lost=bool(lost),
    )
