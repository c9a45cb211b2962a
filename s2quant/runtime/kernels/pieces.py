# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""Keys and values of several new positions of a slot, or of some slots, written before any is attended from.

Legend: T positions, H query heads, KV key/value heads, h head width.

In a frame every row has a slot of its own, and the program that attends from a new position also writes its key and
value (`s2quant.runtime.kernels.attention`). Rows of a prompt share a slot, and each has to see those before it: so all
are written by a launch of their own, with the same numbers, and then attended from. Each row has its slot beside its
position, so the rows of a piece may be of several prompts, and a prompt's of several pieces in order.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from s2quant.runtime.kernels.attended import Layer
from s2quant.runtime.kernels.launch import INTERPRETED, How, begin, early_options, start
from s2quant.runtime.kernels.short import turned


@triton.jit(do_not_specialize=["last_position"])
def keep_kernel(
    qkv, k_norm, table, positions, slots, keys, values, last_position, slot_stride, head_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Write the key and the value of a position and a head."""
    row = tl.program_id(0)
    kv = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    begin(DEVICE)
    position = tl.minimum(tl.load(positions + row).to(tl.int32), last_position)
    angles = table + position * WIDTH + d // 2 * 2
    cos = tl.load(angles)
    sin = tl.load(angles + 1)
    weight = cos
    if NORM:
        weight = tl.load(k_norm + d)
    heads = qkv + row * ((HEADS + 2 * KV_HEADS) * WIDTH)
    k = turned(tl.load(heads + (HEADS + kv) * WIDTH + d), weight, cos, sin, d, eps, WIDTH, NORM)
    v = tl.load(heads + (HEADS + KV_HEADS + kv) * WIDTH + d)
    there = tl.load(slots + row) * slot_stride + kv * head_stride + position * WIDTH + d
    tl.store(keys + there, k.to(keys.dtype.element_ty))
    tl.store(values + there, v.to(values.dtype.element_ty))


def keep(layer: Layer, qkv: Tensor, positions: Tensor, slots: Tensor, how: How) -> None:
    """Write keys and values of several positions.

    Args:
        layer: The layer.
        qkv: float32 [T or more, (H + 2 KV) h].
        positions: int64 [T]; those behind the cache's end are padding, and written to its last position.
        slots: int64 [T], whose they are.
        how: How to launch it.
    """
    _, kv_heads, capacity, width = layer.keys.shape
    assert layer.keys.stride() == layer.values.stride() and layer.keys.stride(2) == width
    start(keep_kernel, (len(positions), kv_heads))(
        *(qkv, qkv if layer.k_norm is None else layer.k_norm, layer.table, positions, slots, layer.keys, layer.values),
        *(capacity - 1, layer.keys.stride(0), layer.keys.stride(1), layer.eps),
        HEADS=qkv.shape[1] // width - 2 * kv_heads,
        KV_HEADS=kv_heads,
        WIDTH=width,
        NORM=layer.k_norm is not None,
        DEVICE=not INTERPRETED,
        num_warps=1,
        **early_options(how.early),
    )
