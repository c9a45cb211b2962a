# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""Weights ahead: a kernel that leaves memory idle asks for the next products' weights to be brought into L2.

Legend: C chunks, R ranges of memory, T turns: chunks that a program asks for.

The weights of a frame, in the order in which its products read them, are one table of chunks: an address and a size. A
launch is given the table from the next product on. Its programs share out the first chunks of it; where there are more
programs than chunks, chunks are cut into parts. A program finds its shares before it waits for the kernel before and
asks for them after, so that it does not stand in the way of what that kernel still reads; a product asks behind its
own weights. One thread asks
(`cp.async.bulk.prefetch.L2`, sm_90): its operands are uniform registers, so that lanes with addresses of their own
would take turns. Nothing comes back and nobody waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from s2quant.runtime.kernels.weights import Weight

CHUNK = 1 << 17  # bytes; the instruction takes less than 1 << 20
MOST_PARTS = 16  # of a chunk: parts of 8 KiB
ALIGNMENT = 16  # bytes, of the instruction's address and size
MIB = 1 << 20


@triton.jit
def found_ahead(
    upcoming, program, num_programs, ASKED: tl.constexpr, PARTS: tl.constexpr, TURNS: tl.constexpr
):  # fmt: skip
    """Find what a program asks for, of ASKED parts of chunks: an address and a size in bytes, or 0, for each turn."""
    found = ()
    for turn in tl.static_range(TURNS):
        number = turn * num_programs + program
        chunk = upcoming + number // PARTS * 2
        address = tl.load(chunk, number < ASKED, 0)
        size = tl.load(chunk + 1, number < ASKED, 0).to(tl.int32)
        span = (size + (16 * PARTS - 1)) // (16 * PARTS) * 16
        offset = number % PARTS * span
        found = found + (address + offset, tl.minimum(tl.maximum(size - offset, 0), span))  # type: ignore[assignment]
    return found


@triton.jit
def found_last(upcoming, ASKED: tl.constexpr, PARTS: tl.constexpr, TURNS: tl.constexpr):
    """Find what a program asks for where there are turns of programs: the last ones ask."""
    across = tl.num_programs(0) * tl.num_programs(1)
    programs = across * tl.num_programs(2)
    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1) + across * tl.program_id(2)
    return found_ahead(upcoming, programs - 1 - program, programs, ASKED, PARTS, TURNS)


@triton.jit
def ask_ahead(found, TURNS: tl.constexpr, DEVICE: tl.constexpr):
    """Ask for the shares of a program."""
    if DEVICE:
        for turn in tl.static_range(TURNS):
            tl.inline_asm_elementwise(
                """{
                .reg .pred one;
                .reg .b32 thread;
                mov.u32 thread, %tid.x;
                setp.eq.u32 one, thread, 0;
                setp.gt.and.s32 one, $2, 0, one;
                @one cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.u32 $0, 0;
                }""", "=r,l,r,~{memory}", [found[2 * turn], found[2 * turn + 1]],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        # nothing depends on what was asked for, so ptxas would put it last; but no load moves across this
        tl.inline_asm_elementwise(
            "bar.warp.sync -1; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Upcoming:
    """What a launch may ask for ahead.

    Args:
        chunks: int64 [C, 2], addresses and bytes, in the order in which they will be read; None: nothing is known.
    """

    chunks: Tensor | None = None

    def arguments(self, mebibytes: int, grid: Sequence[int]) -> dict[str, Any]:
        """Give the arguments of a kernel that asks.

        Args:
            mebibytes: What is asked for at most; 0: nothing, and nothing is compiled in.
            grid: The programs that ask.

        Returns:
            The kernel's arguments.
        """
        if self.chunks is None or mebibytes == 0:
            return {"upcoming": None, "ASKED": 0, "PARTS": 1, "TURNS": 0}
        count, programs = mebibytes * MIB // CHUNK, math.prod(grid)
        parts = min(MOST_PARTS, 1 << (max(1, programs // count).bit_length() - 1))
        return {
            "upcoming": self.chunks,
            "ASKED": count * parts,
            "PARTS": parts,
            "TURNS": -(-count * parts // programs),
        }


NOTHING = Upcoming()


class Order:
    """The weights of a frame in the order of its products, as chunks.

    Args:
        weights: The weights, one for each product.
        most_mebibytes: What a launch asks for at most; 0: no launch asks, and there is no table.
    """

    def __init__(self, weights: Sequence[Weight], most_mebibytes: int) -> None:
        self.begins: list[int] = []
        self.chunks: Tensor | None = None
        if not most_mebibytes:
            return
        pieces = []
        for weight in weights:
            pieces.append(torch.cat([chunks_of(part) for part in (weight.first, weight.second) if part is not None]))
        self.begins = [0, *accumulate(len(piece) for piece in pieces[:-1])]
        # behind the last weight there is nothing to ask for: chunks without a size
        padding = torch.zeros(most_mebibytes * MIB // CHUNK, 2, dtype=torch.int64)
        self.chunks = torch.cat([*pieces, padding]).to(weights[0].first.device)

    def after(self, products: int) -> Upcoming:
        """Give what comes next.

        Args:
            products: Products of the frame that are launched already.

        Returns:
            The weights of the others.
        """
        if self.chunks is None or products == len(self.begins):
            return NOTHING
        return Upcoming(chunks=self.chunks[self.begins[products] :])


def chunks_of(part: Tensor) -> Tensor:
    """Cut a tensor's memory up.

    Args:
        part: A contiguous tensor.

    Returns:
        int64 [C, 2] on the CPU: addresses and bytes, all multiples of 16, but for what lies before or behind those.
    """
    assert part.is_contiguous(), part.stride()
    begin, end = part.data_ptr(), part.data_ptr() + part.numel() * part.element_size()
    begin, end = -(-begin // ALIGNMENT) * ALIGNMENT, end // ALIGNMENT * ALIGNMENT
    addresses = torch.arange(begin, max(begin, end), CHUNK, dtype=torch.int64)
    return torch.stack([addresses, (end - addresses).clamp(max=CHUNK)], dim=1)
