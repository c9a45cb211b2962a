"""What a linear of the kernels is given: a weight, how it is cut up, and what is done with the product.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from s2quant.runtime.kernels.layout import Packed
from s2quant.runtime.kernels.ptx import TILE, Kind

Epilogue = Literal["store", "gate", "residual"]  # see `s2quant.runtime.kernels.linear`
TURN: dict[str, int] = {"w4": 128, "w8": 128, "bf16": 64}  # inputs of a turn of the loop over many rows
MOST_COLUMNS = 8  # groups of 8 rows of x that a program takes at once


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a linear is cut up.

    Args:
        warps: Warps of a program; they share the inputs.
        tiles: Tiles of 16 outputs of a program.
        depth: Steps of weights under way per warp.
        columns: Groups of 8 rows of x that a program takes at most; more rows make more programs.
    """

    warps: int
    tiles: int
    depth: int
    columns: int = MOST_COLUMNS


@dataclass(frozen=True, kw_only=True)
class Block:
    """How a linear of many rows is cut up (`s2quant.runtime.kernels.many`).

    Args:
        tiles: Tiles of 16 outputs of a program; 8 or more, so that each of its products has 64 outputs.
        splits: Programs that share the inputs; 1 for a gated pair.
        stages: Turns of the loop whose loads are under way, with the one that is multiplied.
        warps: Warps of a program.
    """

    tiles: int
    splits: int
    stages: int
    warps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """A weight the kernel can read.

    Args:
        kind: "w4", "w8" or "bf16".
        first: `Packed.words`; "bf16": [N, K].
        second: `Packed.scales`; "bf16": the second weight of a gated pair, or None.
        out_features: Outputs N, those of both weights of a gated pair.
        in_features: K.
        group_size: Inputs per scale; 32 for "bf16", where it means nothing.
        gated: Whether a tile holds 8 outputs of each of two weights.
    """

    kind: Kind
    first: Tensor
    second: Tensor | None
    out_features: int
    in_features: int
    group_size: int = 32
    gated: bool = False

    @classmethod
    def of(cls, packed: Packed, gated: bool = False) -> Weight:
        """Give a packed weight to the kernel.

        Args:
            packed: The weight.
            gated: Whether it is a pair.

        Returns:
            The weight.
        """
        return cls(
            kind=packed.kind,
            first=packed.words,
            second=packed.scales,
            out_features=packed.out_features,
            in_features=packed.in_features,
            group_size=packed.group_size,
            gated=gated,
        )

    @property
    def num_tiles(self) -> int:
        """Tiles of 16 outputs."""
        return -(-self.out_features // TILE)

    @property
    def num_bytes(self) -> int:
        """Bytes read per product."""
        parts = [self.first] + ([] if self.second is None else [self.second])
        return sum(part.numel() * part.element_size() for part in parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Then:
    """What is done with a product.

    Args:
        epilogue: See `s2quant.runtime.kernels.linear`.
        out: [rows, outputs]: what is written; float32 or bfloat16.
        place: int32 [outputs], where each output goes; None: in order.
        squares_in: float32 [rows, S], partial sums of squares of the not yet normalised x; None: it needs no scale.
        hidden: float32 [rows, outputs], the hidden vector, added to in place; "residual" only.
        norm: [outputs], weight of the norm that follows; "residual" only.
        squares_out: float32 [rows, parts], partial sums of squares of the new hidden vector; "residual" only.
        eps: Of the norm before.
    """

    epilogue: Epilogue
    out: Tensor
    place: Tensor | None = None
    squares_in: Tensor | None = None
    hidden: Tensor | None = None
    norm: Tensor | None = None
    squares_out: Tensor | None = None
    eps: float = 0.0
