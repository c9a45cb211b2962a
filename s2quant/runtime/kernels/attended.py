# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""What attention works on: a layer, room for its parts, and a product that is still in parts.

Legend: B rows, H query heads, KV key/value heads, h head width, S splits of the context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from s2quant.runtime.kernels.weights import Block, Shape, Then


@triton.jit
def added(at, stride, PARTS: tl.constexpr):
    """Add up the parts of a product, in the order in which a launch of its own would (`finish_kernel`)."""
    total = tl.load(at)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + part * stride)
    return total


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """A product whose inputs were split, that whoever reads it adds up and scales.

    Args:
        count: Parts, float32 [count, rows, N].
        num_rows: Rows of each.
        squares_in: float32 [rows, Q], partial sums of squares of the rows before their norm.
        eps: Of that norm.
        in_features: Width of the rows.
    """

    count: int
    num_rows: int
    squares_in: Tensor
    eps: float
    in_features: int

    @classmethod
    def of(cls, plan: Shape | Block, num_rows: int, then: Then, in_features: int) -> Parts | None:
        """Say what a product is left in.

        Args:
            plan: How it is cut up.
            num_rows: Rows.
            then: What else would have been done with it.
            in_features: Width of the rows.

        Returns:
            Its parts; None: it is whole.
        """
        if not isinstance(plan, Block) or plan.splits == 1 or then.squares_in is None:
            return None
        return cls(
            count=plan.splits, num_rows=num_rows, squares_in=then.squares_in, eps=then.eps, in_features=in_features
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Scratch:
    """Where programs leave their parts; the same for all layers.

    Args:
        sums: float32 [B, KV, S, H/KV, h].
        stats: float32 [B, KV, S, H/KV, 2].
        arrived: int32 [B, KV], zeros between launches.
    """

    sums: Tensor
    stats: Tensor
    arrived: Tensor

    @classmethod
    def make(cls, batch: int, heads: int, kv_heads: int, width: int, splits: int, device: torch.device) -> Scratch:
        """Allocate it.

        Args:
            batch: B.
            heads: H.
            kv_heads: KV.
            width: h.
            splits: S.
            device: Where.

        Returns:
            The scratch.
        """
        share = heads // kv_heads
        return cls(
            sums=torch.zeros(batch, kv_heads, splits, share, width, device=device),
            stats=torch.zeros(batch, kv_heads, splits, share, 2, device=device),
            arrived=torch.zeros(batch, kv_heads, dtype=torch.int32, device=device),
        )

    def cut(self, batch: int, splits: int) -> Scratch:
        """Use it for other numbers of rows and splits, whose product it has room for.

        Args:
            batch: B.
            splits: S.

        Returns:
            Scratch in the same memory.
        """
        _, kv_heads, _, share, width = self.sums.shape
        sizes = (batch, kv_heads, splits, share)
        count = batch * kv_heads * splits * share
        return Scratch(
            sums=self.sums.view(-1)[: count * width].view(*sizes, width),
            stats=self.stats.view(-1)[: 2 * count].view(*sizes, 2),
            arrived=self.arrived.view(-1)[: batch * kv_heads].view(batch, kv_heads),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One layer's attention.

    Args:
        keys: bf16 [slots, KV, capacity, h], a view of the cache.
        values: The same.
        q_norm: bf16 [h], or None.
        k_norm: bf16 [h], or None.
        eps: Of these norms.
        table: bf16 [P, h/2, 2].
        place: int32 [H h], where the next linear wants each output; None: in order.
    """

    keys: Tensor
    values: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    table: Tensor
    place: Tensor | None
