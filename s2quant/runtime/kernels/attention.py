# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201, ANN202 (what Triton compiles has no types to write down)
"""One new position per row: query/key norm, rotation, cache write and attention over what is live, in one launch.

Legend: B rows, H query heads, KV key/value heads, h head width, S splits of the context.

A program has one row, one key/value head and one stretch of the context. How long the stretches are depends on the
row's position alone, which is read on the device: one launch serves every length, programs without a stretch leave at
once, and a row's result does not depend on its neighbours. Only their number counts: where rows alone keep a GPU busy,
stretches are longer (`least_stretch`), because a program takes its time before its first key and after its last. The
program that holds the new position writes it into the cache. The last one to finish, whichever it is, joins the parts,
eight at a time, in the same order every time.

Where the wqkv product is in parts still (`attended.Parts`), a program adds up and scales those of its heads.

What no kernel of the frame changes before its last is read before waiting for the kernel before: norms, orders, and the
position with its rotary row; of a long context the first keys and values too, which older frames have written. The Fast
AR's are written by kernels that may still be at work.
"""

from __future__ import annotations

import math
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from s2quant.runtime.kernels.attended import Layer, Parts, Scratch, added
from s2quant.runtime.kernels.finish import MOST_SQUARES, reciprocal
from s2quant.runtime.kernels.launch import INTERPRETED, How, announce, early_options, start, wait
from s2quant.runtime.kernels.short import short_kernel

SHORT, MEDIUM = 1024, 4096  # positions below which stretches are of 64, of 128; above they are of 512
LONGEST = 32768
PIECE_ROWS = 64  # larger pieces of prompts have the stretches of such ones, so that their rows have the same bits
JOINED = 8  # parts that are read at a time


@triton.jit
def _rotated(x, weight, cos, sin, d, eps, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """Normalise and rotate heads [R, h]."""
    if NORM:
        scale = 1 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
        x *= scale[:, None] * weight.to(tl.float32)[None, :]
    first, second = tl.split(tl.reshape(x, (x.shape[0], WIDTH // 2, 2)))
    other = tl.reshape(tl.join(second, first), (x.shape[0], WIDTH))
    cos = cos.to(tl.float32)
    sin = sin.to(tl.float32)
    return x * cos[None, :] + other * tl.where(d % 2 == 0, -sin, sin)[None, :]


@triton.jit
def _dot(a, b, DEVICE: tl.constexpr):
    """Multiply bf16 matrices; the interpreter knows only float32."""
    if not DEVICE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def _seen(keys, values, cached, start, d, position, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Read a block of keys [h, BLOCK] and values [BLOCK, h], as far as there are any."""
    p = start + tl.arange(0, BLOCK)
    inside = p < position
    k_t = tl.load(keys + cached + p[None, :] * WIDTH + d[:, None], inside[None, :], 0.0)
    return k_t, tl.load(values + cached + p[:, None] * WIDTH + d[None, :], inside[:, None], 0.0), inside


@triton.jit
def _attended(q, k_t, v, inside, scale, best, weight, sums, DEVICE: tl.constexpr):
    """Attend to one more block; everything so far fades by as much as the largest score grows."""
    scores = tl.where(inside[None, :], _dot(q, k_t, DEVICE) * scale, -1e30)
    new = tl.maximum(best, tl.max(scores, axis=1))
    fade = tl.exp2(best - new)
    shares = tl.exp2(scores - new[:, None])
    weight = weight * fade + tl.sum(shares, axis=1)
    return new, weight, sums * fade[:, None] + _dot(shares.to(v.dtype), v, DEVICE)


@triton.jit
def _joined(
    part_sums, part_stats, first, live, h, d, SHARE: tl.constexpr, WIDTH: tl.constexpr, JOINED_: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the parts of a row's heads [heads, h]; those of a round are all asked for before one is there."""
    best = tl.full((HEADS_BLOCK,), -1e30, tl.float32)
    weight = tl.zeros((HEADS_BLOCK,), tl.float32)
    sums = tl.zeros((HEADS_BLOCK, WIDTH), tl.float32)
    for begin in range(0, live, JOINED_):
        split = begin + tl.arange(0, JOINED_)
        there = (split < live)[:, None] & (h < SHARE)[None, :]
        part = (first + split)[:, None] * SHARE + h[None, :]
        at = part_sums + part[:, :, None] * WIDTH + d[None, None, :]
        its_sums = tl.load(at, there[:, :, None], 0.0, cache_modifier=".cg")
        its_best = tl.load(part_stats + part * 2, there, -1e30, cache_modifier=".cg")
        its_weight = tl.load(part_stats + part * 2 + 1, there, 0.0, cache_modifier=".cg")
        new = tl.maximum(best, tl.max(its_best, axis=0))
        fade = tl.exp2(best - new)
        shares = tl.exp2(its_best - new[None, :])
        weight = weight * fade + tl.sum(its_weight * shares, axis=0)
        sums = sums * fade[:, None] + tl.sum(its_sums * shares[:, :, None], axis=0)
        best = new
    return sums / weight[:, None]


@triton.jit(do_not_specialize=["first_row", "last_position", "num_rows"])
def attention_kernel(
    qkv, squares_in, q_norm, k_norm, table, positions, slots, keys, values, part_sums, part_stats, arrived, place, out,
    first_row, last_position, position_stride, slot_stride, head_stride, eps, scale, num_rows, num_squares, product_eps,
    PARTS: tl.constexpr, INPUTS: tl.constexpr, MOST: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, PLACED: tl.constexpr,
    SPLITS: tl.constexpr, SHORT_: tl.constexpr, MEDIUM_: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
    SINGLE: tl.constexpr, FIRST: tl.constexpr, AHEAD: tl.constexpr, WRITTEN: tl.constexpr, JOINED_: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Attend; see the module."""
    SHARE: tl.constexpr = HEADS // KV_HEADS
    slot = tl.program_id(0)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    d = tl.arange(0, WIDTH)
    rows = tl.arange(0, 16)
    head = kv * SHARE + rows % SHARE
    target = head[:, None] * WIDTH + d[None, :]
    h = tl.arange(0, HEADS_BLOCK)
    joined = (kv * SHARE + h % SHARE)[:, None] * WIDTH + d[None, :]
    cached = kv * head_stride
    if WRITTEN:
        cached += tl.load(slots + slot) * slot_stride
    else:
        cached += slot.to(tl.int64) * slot_stride
    announce(DEVICE)
    if not FIRST:
        wait(DEVICE)
    position = tl.minimum(tl.load(positions + slot * position_stride).to(tl.int32), last_position)
    stretch = BLOCK
    live = 1
    if not SINGLE:
        stretch = tl.maximum(tl.where(position < SHORT_, 64, tl.where(position < MEDIUM_, 128, 512)), LEAST)
        live = position // stretch + 1
    first = split * stretch
    if AHEAD:
        first_keys, first_values, first_inside = _seen(keys, values, cached, first, d, position, BLOCK, WIDTH)
    angles = table + position * WIDTH + d // 2 * 2
    cos = tl.load(angles)
    sin = tl.load(angles + 1)
    q_weight = cos
    k_weight = cos
    if NORM:
        q_weight = tl.load(q_norm + d)
        k_weight = tl.load(k_norm + d)
    if PLACED:
        target = tl.load(place + target)
        if not SINGLE:
            joined = tl.load(place + joined)
    if FIRST:
        wait(DEVICE)
    if split < live:
        row = first_row + slot
        features = (HEADS + 2 * KV_HEADS) * WIDTH
        heads = qkv + row * features
        one = tl.zeros((1,), tl.int32) + (HEADS + kv)
        q = added(heads + head[:, None] * WIDTH + d[None, :], num_rows * features, PARTS)
        k = added(heads + one[:, None] * WIDTH + d[None, :], num_rows * features, PARTS)
        v = added(heads + (one + KV_HEADS)[:, None] * WIDTH + d[None, :], num_rows * features, PARTS)
        if PARTS > 1:
            factor = reciprocal(squares_in, row + tl.arange(0, 1), num_rows, num_squares, product_eps, INPUTS, MOST)
            q *= factor[:, None]
            k *= factor[:, None]
            v *= factor[:, None]
        q = _rotated(q, q_weight, cos, sin, d, eps, WIDTH, NORM).to(keys.dtype.element_ty)
        k = _rotated(k, k_weight, cos, sin, d, eps, WIDTH, NORM).to(keys.dtype.element_ty)
        v = v.to(keys.dtype.element_ty)
        owner = split == live - 1
        if not WRITTEN:
            here = cached + position * WIDTH + d[None, :] + tl.zeros((1,), tl.int32)[:, None]
            tl.store(keys + here, k, d[None, :] >= tl.where(owner, 0, WIDTH))
            tl.store(values + here, v, d[None, :] >= tl.where(owner, 0, WIDTH))
        score = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) * scale
        best = tl.where(owner, score, -1e30)
        weight = tl.where(owner, 1.0, 0.0) + tl.zeros((16,), tl.float32)
        sums = tl.where(owner, 1.0, 0.0) * v.to(tl.float32) + tl.zeros((16, WIDTH), tl.float32)
        begin = first
        if AHEAD:
            best, weight, sums = _attended(q, first_keys, first_values, first_inside, scale, best, weight, sums, DEVICE)
            begin += BLOCK
        for start in range(begin, tl.minimum(first + stretch, position), BLOCK):
            k_t, seen, inside = _seen(keys, values, cached, start, d, position, BLOCK, WIDTH)
            best, weight, sums = _attended(q, k_t, seen, inside, scale, best, weight, sums, DEVICE)
        mine = rows < SHARE
        if not SINGLE and live > 1:
            part = ((slot * KV_HEADS + kv) * SPLITS + split) * SHARE + rows
            tl.store(part_sums + part[:, None] * WIDTH + d[None, :], sums, mine[:, None])
            tl.store(part_stats + part * 2, best, mine)
            tl.store(part_stats + part * 2 + 1, weight, mine)
            tl.debug_barrier()
            turn = tl.atomic_add(arrived + slot * KV_HEADS + kv, 1, sem="acq_rel")
            if turn == live - 1:
                tl.store(arrived + slot * KV_HEADS + kv, 0)
                first_part = (slot * KV_HEADS + kv) * SPLITS
                result = _joined(part_sums, part_stats, first_part, live, h, d, SHARE, WIDTH, JOINED_, HEADS_BLOCK)
                its = out + row * (HEADS * WIDTH) + joined
                tl.store(its, result.to(out.dtype.element_ty), (h < SHARE)[:, None])
        else:
            result = sums / weight[:, None]
            tl.store(out + row * (HEADS * WIDTH) + target, result.to(out.dtype.element_ty), mine[:, None])


def least_stretch(rows: int, how: How) -> int:
    """Say how many positions a program takes at least.

    Args:
        rows: Rows times key/value heads.
        how: How kernels are launched.

    Returns:
        64 to 512: with 512 rows and heads there are four programs for each multiprocessor without any split.
    """
    return min(512, 64 << max(0, (rows // 64).bit_length() - 1)) if how.long_stretches else 64


def num_splits(context: int, least: int = 64) -> int:
    """Count the programs that a context may need.

    Args:
        context: Positions that are looked at, at most.
        least: Positions of a program, at least.

    Returns:
        Splits of the context.
    """
    most = [-(-min(context, SHORT) // max(64, least))]
    if context > SHORT:
        most.append(-(-min(context, MEDIUM) // max(128, least)))
    if context > MEDIUM:
        most.append(-(-context // max(512, least)))
    return max(most)


def attention(
    layer: Layer,
    qkv: Tensor,
    positions: Tensor,
    out: Tensor,
    scratch: Scratch,
    *,
    batch: int,
    first_row: int,
    context: int,
    how: How,
    slots: Tensor | None = None,
    parts: Parts | None = None,
) -> None:
    """Attend from one new position per row, and keep its key and value.

    Args:
        layer: The layer.
        qkv: float32 [rows, (H + 2 KV) h]; with parts, flat: count rows (H + 2 KV) h.
        positions: int64 [B], or one element for all rows.
        out: bf16 [rows, H h].
        scratch: For as many splits as the context needs.
        batch: B.
        first_row: Row of qkv and out of the first slot.
        context: Positions looked at, at most.
        how: How to launch it; with `early` and `loads_first`, positions are those that a kernel not launched early has
            seen written.
        slots: int64 [B], each row's slot, where its key and value are already; None: row i has slot i, as yet without.
        parts: How qkv is yet to be added up; None: it is.
    """
    kv_heads, width = layer.keys.shape[1], layer.keys.shape[3]
    heads = out.shape[1] // width
    splits = scratch.sums.shape[2]
    least = least_stretch((batch if slots is None else min(batch, PIECE_ROWS)) * kv_heads, how)
    assert num_splits(context, least) <= splits and heads // kv_heads <= 16, (context, splits, heads, kv_heads)
    assert layer.keys.stride() == layer.values.stride() and layer.keys.stride(2) == width
    nothing: Any = out
    whole = (
        *(qkv, nothing if parts is None else parts.squares_in),
        *(nothing if layer.q_norm is None else layer.q_norm, nothing if layer.k_norm is None else layer.k_norm),
        *(layer.table, positions),
    )
    cached = (layer.keys, layer.values)
    rest = (
        *(nothing if layer.place is None else layer.place, out, first_row, context - 1),
        positions.stride(0) if len(positions) > 1 else 0,
        *(layer.keys.stride(0), layer.keys.stride(1), layer.eps, math.log2(math.e) / math.sqrt(width)),
        *((1, 1, 0.0) if parts is None else (parts.num_rows, parts.squares_in.shape[1], parts.eps)),
    )
    constants = {
        "PARTS": 1 if parts is None else parts.count, "INPUTS": 1 if parts is None else parts.in_features,
        "MOST": MOST_SQUARES,
        "HEADS": heads, "KV_HEADS": kv_heads, "WIDTH": width, "NORM": layer.q_norm is not None,
        "PLACED": layer.place is not None, "FIRST": how.loads_first, "DEVICE": not INTERPRETED,
        **early_options(how.early),
    }  # fmt: skip
    ahead = slots is None and how.loads_first and how.keys_first and context > 16 and least == 64  # else registers
    if context <= 16 and how.flat and slots is None:
        start(short_kernel, (batch, heads))(*whole, *cached, *rest, BLOCK=16, num_warps=1, **constants)
        return
    start(attention_kernel, (batch, kv_heads, num_splits(context, least)))(
        *whole,
        positions if slots is None else slots,
        *cached,
        *(scratch.sums, scratch.stats, scratch.arrived),
        *rest,
        SPLITS=splits,
        SHORT_=SHORT,
        MEDIUM_=MEDIUM,
        LEAST=least,
        BLOCK=16 if context <= 16 else 64,
        SINGLE=context <= 16,
        AHEAD=ahead,
        WRITTEN=slots is not None,
        JOINED_=JOINED,
        HEADS_BLOCK=triton.next_power_of_2(heads // kv_heads),
        num_warps=how.attention_warps,
        num_stages=1 if ahead and context <= SHORT else how.attention_stages,  # no block comes after the first
        **constants,
    )
