# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""Attention over a context of a few positions, the Fast AR's; launched by `s2quant.runtime.kernels.attention`.

Legend: H query heads, KV key/value heads, h head width.

A warp has one row and one query head, adds up its parts of wqkv's product where they are left to it, reads the whole
context at once, and meets nobody. Order of what it reads before and after waiting for the kernel before: as in
`attention_kernel`, but for keys and values, which a kernel that is still at work may have written.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from s2quant.runtime.kernels.attended import added
from s2quant.runtime.kernels.finish import reciprocal
from s2quant.runtime.kernels.launch import announce, wait


@triton.jit
def turned(x, weight, cos, sin, d, eps, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """Normalise and rotate a head [h]."""
    if NORM:
        scale = 1 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
        x *= scale * weight.to(tl.float32)
    first, second = tl.split(tl.reshape(x, (WIDTH // 2, 2)))
    other = tl.reshape(tl.join(second, first), (WIDTH,))
    return x * cos.to(tl.float32) + other * tl.where(d % 2 == 0, -sin.to(tl.float32), sin.to(tl.float32))


@triton.jit(do_not_specialize=["first_row", "last_position", "num_rows"])
def short_kernel(
    qkv, squares_in, q_norm, k_norm, table, positions, keys, values, place, out,
    first_row, last_position, position_stride, slot_stride, head_stride, eps, scale, num_rows, num_squares, product_eps,
    PARTS: tl.constexpr, INPUTS: tl.constexpr, MOST: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, PLACED: tl.constexpr,
    BLOCK: tl.constexpr, FIRST: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Attend over a context of one block: a warp has one row and one query head, and meets nobody."""
    announce(DEVICE)
    if not FIRST:
        wait(DEVICE)
    slot = tl.program_id(0)
    head = tl.program_id(1)
    kv = head // (HEADS // KV_HEADS)
    d = tl.arange(0, WIDTH)
    position = tl.minimum(tl.load(positions + slot * position_stride).to(tl.int32), last_position)
    angles = table + position * WIDTH + d // 2 * 2
    cos = tl.load(angles)
    sin = tl.load(angles + 1)
    q_weight = cos
    k_weight = cos
    if NORM:
        q_weight = tl.load(q_norm + d)
        k_weight = tl.load(k_norm + d)
    target = head * WIDTH + d
    if PLACED:
        target = tl.load(place + target)
    if FIRST:
        wait(DEVICE)
    row = first_row + slot
    features = (HEADS + 2 * KV_HEADS) * WIDTH
    heads = qkv + row * features + d
    cached = slot.to(tl.int64) * slot_stride + kv * head_stride
    p = tl.arange(0, BLOCK)
    inside = p < position
    there = cached + p[:, None] * WIDTH + d[None, :]
    seen_k = tl.load(keys + there, inside[:, None], 0.0).to(tl.float32)
    seen_v = tl.load(values + there, inside[:, None], 0.0).to(tl.float32)
    q = added(heads + head * WIDTH, num_rows * features, PARTS)
    k = added(heads + (HEADS + kv) * WIDTH, num_rows * features, PARTS)
    v = added(heads + (HEADS + KV_HEADS + kv) * WIDTH, num_rows * features, PARTS)
    if PARTS > 1:
        rows = row + tl.arange(0, 1)
        factor = tl.sum(reciprocal(squares_in, rows, num_rows, num_squares, product_eps, INPUTS, MOST), axis=0)
        q *= factor
        k *= factor
        v *= factor
    q = turned(q, q_weight, cos, sin, d, eps, WIDTH, NORM).to(keys.dtype.element_ty)
    k = turned(k, k_weight, cos, sin, d, eps, WIDTH, NORM).to(keys.dtype.element_ty)
    v = v.to(keys.dtype.element_ty)
    owner = d >= tl.where(head % (HEADS // KV_HEADS) == 0, 0, WIDTH)
    tl.store(keys + cached + position * WIDTH + d, k, owner)
    tl.store(values + cached + position * WIDTH + d, v, owner)
    own = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=0) * scale
    scores = tl.where(inside, tl.sum(seen_k * q.to(tl.float32)[None, :], axis=1) * scale, -1e30)
    best = tl.maximum(tl.max(scores, axis=0), own)
    shares = tl.exp2(scores - best)
    its = tl.exp2(own - best)
    sums = tl.sum(seen_v * shares[:, None], axis=0) + its * v.to(tl.float32)
    result = sums / (tl.sum(shares, axis=0) + its)
    tl.store(out + row * (HEADS * WIDTH) + target, result.to(out.dtype.element_ty))
