# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""Linears of many rows: blocks of outputs times all rows of x, by Triton's own dot.

Legend: M rows of x, N outputs, K inputs, T tiles of 16 outputs, G groups of a step of 128 inputs, S splits.

The kernel of few rows (`s2quant.runtime.kernels.linear`) lets every 16 to 64 outputs read all of x, which at 64 rows is
more bytes from L2 than any weight is from memory. Here 64 outputs and more share it: x stands in shared memory, where
the tensor cores read it themselves; the weight is the first matrix of the product, so that M may be small.

A packed weight is read in its layout (`s2quant.runtime.kernels.layout`) and becomes bf16 in registers: code times
scale, rounded once, the same numbers as `s2quant.runtime.kernels.dequantize` gives to a prefill. The two outputs and
the inputs whose codes share a word are products of their own, so that unpacking is the same for a whole tensor and no
element changes its thread. Each of these products wants its inputs of x side by side: `layout.arranged` is the order in
which whoever makes x has to write them.

What follows a product is what follows it in the kernel of few rows. Where there are too few blocks of outputs to keep a
GPU busy, the inputs are split too, and a second launch adds the parts up (`s2quant.runtime.kernels.finish`), or
attention does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from s2quant.runtime.kernels.finish import CHUNK, MOST_SQUARES, finish_kernel, put, reciprocal
from s2quant.runtime.kernels.launch import INTERPRETED, PATIENT, How, announce, early_options, start, wait
from s2quant.runtime.kernels.weights import TURN, Block, Then, Weight


def rows_of(num_rows: int) -> int:
    """Say how many rows of x a program takes.

    Args:
        num_rows: M.

    Returns:
        32 or 64.
    """
    return 32 if num_rows <= 32 else 64


@triton.jit
def dot(a, b, sums, DEVICE: tl.constexpr):
    """Add a product of bf16 matrices; the interpreter knows only float32."""
    if not DEVICE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums)


@triton.jit
def scales_of(pairs, T: tl.constexpr, GROUPS: tl.constexpr, HIGH: tl.constexpr, BF16: tl.constexpr):
    """Take one of the two scales of each word: int32 [T, 8 G] -> float32 [T, 8, G]."""
    if BF16:
        scale = ((pairs >> 16 if HIGH else pairs) << 16).to(tl.float32, bitcast=True)
    else:
        scale = (pairs >> 16 if HIGH else pairs).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.reshape(scale, (T, 8, GROUPS))


@triton.jit
def bits_into(raw, MASK: tl.constexpr, WITH: tl.constexpr, DEVICE: tl.constexpr):
    """Give (raw & MASK) ^ WITH as a float32, in one instruction."""
    if DEVICE:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x6a;", "=f,r,n,n", [raw, MASK, WITH], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return ((raw & MASK) ^ WITH).to(tl.float32, bitcast=True)


@triton.jit
def unpacked(
    words, scale, T: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, AT: tl.constexpr, SHARED: tl.constexpr,
    DEVICE: tl.constexpr,
):  # fmt: skip
    """Unpack the codes that begin at bit AT: words [T, 64 BITS], scale [T, 8, G] -> bf16 [8 T, 8 BITS].

    A code becomes part of the fraction of a float32 of exponent 23 - TO, so 2^(23 - TO) + code, wherever it stands in
    the fraction. From bit 8 on 2^(23 - TO) + middle times a scale of 11 bits is exact too. So codes need not all be
    moved to one bit: with SHARED three shifts of a word serve all its codes, else nearly each has its own.
    """
    INPUTS: tl.constexpr = 8 * BITS
    TO: tl.constexpr = 8 + AT % 8 if SHARED else 16 if BITS == 4 else 15
    if AT < TO:
        raw = words << (TO - AT)
    elif AT > TO:
        raw = words >> (AT - TO)
    else:
        raw = words
    EXPONENT: tl.constexpr = (150 - TO) << 23
    MIDDLE: tl.constexpr = (1 << (23 - TO)) + (1 << (BITS - 1))
    if BITS == 4:
        wide = bits_into(raw, 15 << TO, EXPONENT, DEVICE)
        wide = tl.permute(tl.reshape(wide, (T, 2, 8, 4, 2, 2)), (0, 2, 1, 4, 3, 5))  # tile g half q t s
    else:  # its highest bit is stored inverted
        wide = bits_into(raw, 255 << TO, EXPONENT | (128 << TO), DEVICE)
        wide = tl.permute(tl.reshape(wide, (T, 4, 8, 4, 2, 2)), (0, 2, 1, 4, 3, 5))  # tile g q s t n
    wide = tl.reshape(wide, (T, 8, GROUPS, INPUTS // GROUPS))
    if DEVICE:
        values = tl.fma(wide, scale[:, :, :, None], (scale * -MIDDLE)[:, :, :, None])  # all exact up to here
    else:
        values = (wide - MIDDLE) * scale[:, :, :, None]
    if not DEVICE:  # the interpreter only cuts off
        raw = values.to(tl.int32, bitcast=True)
        values = ((raw + 0x7FFF + ((raw >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.reshape(values.to(tl.bfloat16), (8 * T, INPUTS))


def _name(compiled: Any) -> str:
    """Name a compiled kernel so that a profile tells them apart."""
    c = compiled.constants
    return f"many_{c['KIND']}_{c['EPILOGUE']}_k{c['K']}_m{c['ROWS']}"


@triton.jit(do_not_specialize=["num_rows"], repr=_name)
def many_kernel(
    weight, second, x, place, squares_in, norm, hidden, out, squares_out, parts,
    num_rows, num_outputs, num_squares, eps,
    KIND: tl.constexpr, BF16: tl.constexpr, GROUPS: tl.constexpr, GATED: tl.constexpr, K: tl.constexpr,
    STEP: tl.constexpr, TILES: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr, PLACED: tl.constexpr, MOST: tl.constexpr,
    SHARED: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Compute T tiles of outputs for ROWS rows of x, over a split of the inputs; see the module."""
    PACKED: tl.constexpr = KIND != "bf16"
    BITS: tl.constexpr = 4 if KIND == "w4" else 8
    SPAN: tl.constexpr = 8 * T if PACKED or GATED else 16 * T  # outputs of each of the products
    INPUTS: tl.constexpr = 8 * BITS if PACKED else STEP
    STEPS: tl.constexpr = K // STEP
    SPLIT_STEPS: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    split = tl.program_id(2)
    at = tl.arange(0, SPAN)
    k = tl.arange(0, INPUTS)
    announce(DEVICE)
    xs = x + rows[None, :] * K + k[:, None]
    if PACKED:
        tile = tl.minimum(block * T + tl.arange(0, T), TILES - 1)
        weights = weight + (tile * (K // 128) * (64 * BITS))[:, None] + tl.arange(0, 64 * BITS)[None, :]
        seconds = second + (tile * (K // 128) * (8 * GROUPS))[:, None] + tl.arange(0, 8 * GROUPS)[None, :]
    else:
        row = tl.minimum(block * SPAN + at, TILES * (SPAN // T) - 1).to(tl.int64)
        weights = weight + row[:, None] * K + k[None, :]
        seconds = second + row[:, None] * K + k[None, :]
    first = split * SPLIT_STEPS
    last = tl.minimum(first + SPLIT_STEPS, STEPS)
    sums = tl.zeros((SPAN, ROWS), tl.float32)
    others = tl.zeros((SPAN, ROWS), tl.float32)
    wait(DEVICE)
    for step in tl.range(first, last, num_stages=STAGES):
        if PACKED:
            words = tl.load(weights + step * (64 * BITS))
            pairs = tl.load(seconds + step * (8 * GROUPS))
            low = scales_of(pairs, T, GROUPS, False, BF16)
            high = scales_of(pairs, T, GROUPS, True, BF16)
            for part in tl.static_range(128 // INPUTS):
                inputs = tl.load(xs + (step * STEP + part * INPUTS))
                codes = unpacked(words, low, T, BITS, GROUPS, part % 2 * 16 + part // 2 * 8, SHARED, DEVICE)
                sums = dot(codes, inputs, sums, DEVICE)
                codes = unpacked(words, high, T, BITS, GROUPS, part % 2 * 16 + part // 2 * 8 + BITS, SHARED, DEVICE)
                others = dot(codes, inputs, others, DEVICE)
        else:
            inputs = tl.load(xs + step * STEP)
            sums = dot(tl.load(weights + step * STEP), inputs, sums, DEVICE)
            if GATED:
                others = dot(tl.load(seconds + step * STEP), inputs, others, DEVICE)
    index = block * SPAN + at
    if PACKED and EPILOGUE != "gate":
        index = (block * T + at // 8) * 16 + at % 8
    if SPLITS > 1:
        where = parts + (split * num_rows + rows)[None, :] * num_outputs
        real = (rows < num_rows)[None, :]
        tl.store(where + index[:, None], sums, (index < num_outputs)[:, None] & real)
        if PACKED:
            tl.store(where + (index + 8)[:, None], others, (index + 8 < num_outputs)[:, None] & real)
    else:
        if SCALED:
            scale = reciprocal(squares_in, rows, num_rows, num_squares, eps, K, MOST)
            sums *= scale[None, :]
            others *= scale[None, :]
        if EPILOGUE == "gate":
            sums = sums / (1 + tl.exp(-sums)) * others
        RESIDUAL: tl.constexpr = EPILOGUE == "residual"
        total = put(sums, index, rows, num_rows, num_outputs, place, norm, hidden, out, RESIDUAL, PLACED)
        if PACKED and EPILOGUE != "gate":
            total += put(others, index + 8, rows, num_rows, num_outputs, place, norm, hidden, out, RESIDUAL, PLACED)
        if RESIDUAL:
            tl.store(squares_out + rows * tl.num_programs(1) + block, total, rows < num_rows)


def num_blocks(weight: Weight, block: Block) -> int:
    """Count the programs that share out the outputs.

    Args:
        weight: The weight.
        block: How it is cut up.

    Returns:
        Blocks of outputs.
    """
    return -(-weight.num_tiles // block.tiles)


def many(
    weight: Weight,
    x: Tensor,
    num_rows: int,
    then: Then,
    block: Block,
    how: How = PATIENT,
    launch: bool = True,
    parts: Tensor | None = None,
    finished: bool = True,
) -> None:
    """Multiply, and do what comes after.

    Args:
        weight: The weight.
        x: bfloat16 [M rounded up to whole programs, or more; K], contiguous, inputs as `layout.arranged` puts them;
            finite everywhere.
        num_rows: M.
        then: What is done with the product; its tensors have M rows or more.
        block: How to cut it up.
        how: How to launch it.
        launch: Whether to launch it, not only to compile it.
        parts: float32, room for splits M N numbers; None: made here.
        finished: Whether splits are added up; else they are left in parts, and nothing of `then` is done.
    """
    rows = rows_of(num_rows)
    row_blocks, blocks = -(-num_rows // rows), num_blocks(weight, block)
    assert x.shape[0] >= row_blocks * rows and x.shape[1] == weight.in_features and x.is_contiguous(), x.shape
    assert block.splits == 1 or then.epilogue != "gate", block
    outputs = then.out.shape[1]
    second = weight.first if weight.second is None else weight.second
    packed = weight.kind != "bf16"
    if block.splits > 1:
        assert finished or parts is not None, "parts that nobody reads"
        size = block.splits * num_rows * outputs
        parts = torch.empty(size, device=x.device) if parts is None else parts
        assert parts.numel() >= size and parts.dtype == torch.float32, (parts.shape, size)
    tensors = [
        x if tensor is None else tensor
        for tensor in (then.place, then.squares_in, then.norm, then.hidden, then.out, then.squares_out)
    ]
    sizes = (num_rows, outputs, 1 if then.squares_in is None else then.squares_in.shape[1], then.eps)
    early = early_options(how.early and (num_rows <= how.early_dense or packed))
    shared = {
        "K": weight.in_features,
        "SPLITS": block.splits,
        "SCALED": then.squares_in is not None,
        "PLACED": then.place is not None,
        "MOST": MOST_SQUARES,
        "DEVICE": not INTERPRETED,
    }
    start(many_kernel, (row_blocks, blocks, block.splits), launch)(
        *(weight.first, second.view(torch.int32) if packed else second, x, *tensors, x if parts is None else parts),
        *sizes,
        KIND=weight.kind,
        BF16=second.dtype == torch.bfloat16,
        GROUPS=128 // weight.group_size,
        GATED=weight.gated and not packed,
        STEP=TURN[weight.kind],
        TILES=weight.num_tiles,
        T=block.tiles,
        ROWS=rows,
        STAGES=block.stages,
        EPILOGUE=then.epilogue,
        SHARED=how.shared_shifts,
        **shared,
        num_warps=block.warps,
        **early,
    )
    if block.splits > 1 and finished:
        start(finish_kernel, (num_rows, -(-outputs // CHUNK)), launch)(
            *(parts, *tensors, *sizes),
            CHUNK=CHUNK,
            RESIDUAL=then.epilogue == "residual",
            **shared,
            num_warps=4,
            **early_options(how.early),
        )
