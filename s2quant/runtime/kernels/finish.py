# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""What follows a product of many rows; and the parts of a product whose inputs were split, added up.

Legend: M rows of x, N outputs, S splits.

The parts are always added in the same order, whoever does it. Three ways (`How`):

- A second launch, `finish_kernel`: one program per row and CHUNK outputs.
- `finish_within`: the last program of a block of outputs to arrive does it. Of S programs one reads what S have
  written, 32 KB each at 64 rows of 128 outputs, while the multiprocessors of the others have nothing left to do.
- `finish_together` with it: the programs of a block wait until all have arrived, and each does some of the rows.

Arrivals are counted, one counter per block of outputs and of rows. A product adds WHOLE to each of its counters,
however many programs it has (one of them adds what is left), so they are whole again after it; nobody sets them back.
A program touches counters and parts only after it has waited for the kernel before. That one is complete then, with all
it wrote, and waited itself: all programs of all kernels of a frame do. So no two products of a frame use counters at
once, and one set of them is enough.

Waiting for one another needs all programs of a block on the GPU at once. They stand side by side in the grid, and the
hardware starts programs in the order of the grid: only the programs of the last block begun can lack partners, those of
earlier blocks end by themselves and make room, as the kernel before does. The next kernel cannot take that room: it
starts when all programs of this one have. Should that ever not hold, waiting ends with an error, not never.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from s2quant.runtime.kernels.launch import begin

CHUNK = 512  # outputs that a program of `finish_kernel` adds up
MOST_SQUARES = 32  # partial sums of squares that are read at a time
WHOLE = tl.constexpr(64)  # what a product adds to each of its counters; a power of two; the most splits
PATIENCE = tl.constexpr(1 << 22)  # looks at a counter, each most of a microsecond, before waiting is given up


@triton.jit
def reciprocal(squares, rows, num_rows, num_squares, eps, K: tl.constexpr, MOST: tl.constexpr):
    """Compute the reciprocal root mean square of rows."""
    part = tl.arange(0, MOST)
    total = tl.zeros(rows.shape, tl.float32)
    for start in range(0, num_squares, MOST):
        inside = (rows < num_rows)[None, :] & (start + part < num_squares)[:, None]
        total += tl.sum(tl.load(squares + rows[None, :] * num_squares + start + part[:, None], inside, 0.0), axis=0)
    return 1 / tl.sqrt(total / K + eps)


@triton.jit
def put(
    y, index, rows, num_rows, num_outputs, place, norm, hidden, out, RESIDUAL: tl.constexpr, PLACED: tl.constexpr
):  # fmt: skip
    """Write results [outputs, rows], added to the hidden vector if it is one; the sums of squares of that."""
    there = index < num_outputs
    inside = there[:, None] & (rows < num_rows)[None, :]
    total = tl.zeros(rows.shape, tl.float32)
    if RESIDUAL:
        where = rows[None, :] * num_outputs + index[:, None]
        y += tl.load(hidden + where, inside, 0.0)
        tl.store(hidden + where, y, inside)
        total += tl.sum(tl.where(inside, y * y, 0.0), axis=0)
        y *= tl.load(norm + index, there, 0.0).to(tl.float32)[:, None]
    target = index
    if PLACED:
        target = tl.load(place + index, there, 0)
    tl.store(out + rows[None, :] * num_outputs + target[:, None], y.to(out.dtype.element_ty), inside)
    return total


@triton.jit
def add_up(
    parts, rows, index, place, squares_in, norm, hidden, out, num_rows, num_outputs, num_squares, eps,
    K: tl.constexpr, SPLITS: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr, PLACED: tl.constexpr,
    MOST: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Add up the parts of outputs of rows, and do what follows the product; the sums of squares of that."""
    inside = (index < num_outputs)[:, None] & (rows < num_rows)[None, :]
    y = tl.zeros((index.shape[0], rows.shape[0]), tl.float32)
    for split in tl.static_range(SPLITS):
        part = parts + (split * num_rows + rows)[None, :] * num_outputs + index[:, None]
        y += tl.load(part, inside, 0.0, cache_modifier=CACHE)
    if SCALED:
        y *= reciprocal(squares_in, rows, num_rows, num_squares, eps, K, MOST)[None, :]
    return put(y, index, rows, num_rows, num_outputs, place, norm, hidden, out, RESIDUAL, PLACED)


@triton.jit(do_not_specialize=["num_rows"])
def finish_kernel(
    parts, place, squares_in, norm, hidden, out, squares_out, num_rows, num_outputs, num_squares, eps,
    K: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    PLACED: tl.constexpr, MOST: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Add up the parts of CHUNK outputs of a row, and do what follows the product."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    index = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    begin(DEVICE)
    total = add_up(
        parts, rows, index, place, squares_in, norm, hidden, out, num_rows, num_outputs, num_squares, eps,
        K, SPLITS, RESIDUAL, SCALED, PLACED, MOST, "",
    )  # fmt: skip
    if RESIDUAL:
        tl.store(squares_out + rows * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def give_up(DEVICE: tl.constexpr):
    """End with an error."""
    if DEVICE:
        tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def arrive(counter, split, SPLITS: tl.constexpr):
    """Count this program, whose parts are written: how many more must arrive, 0 for the last; and the whole count."""
    tl.debug_barrier()
    mine = tl.where(split == 0, WHOLE - (SPLITS - 1), 1)
    before = tl.atomic_add(counter, mine, sem="acq_rel")
    goal = (before & -WHOLE) + WHOLE
    return goal - before - mine, goal


@triton.jit
def until_all_are_there(counter, missing, goal, DEVICE: tl.constexpr):
    """Wait for the other programs of the block."""
    looks = 0
    while missing > 0:
        missing = goal - tl.atomic_add(counter, 0, sem="acquire")
        looks += 1
        if looks == PATIENCE:
            give_up(DEVICE)


@triton.jit
def finish_within(
    parts, arrived, row_block, block, split, blocks, place, squares_in, norm, hidden, out, squares_out,
    num_rows, num_outputs, num_squares, eps,
    K: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, TOGETHER: tl.constexpr,
    RESIDUAL: tl.constexpr, SCALED: tl.constexpr, PLACED: tl.constexpr, MOST: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Finish a block of OUTPUTS outputs and ROWS rows when all its parts are there, PIECE rows at a time."""
    PIECES: tl.constexpr = 16 if SPLITS >= 16 else 8 if SPLITS >= 8 else 4 if SPLITS >= 4 else 2
    PIECE: tl.constexpr = ROWS // PIECES
    counter = arrived + row_block * blocks + block
    missing, goal = arrive(counter, split, SPLITS)
    left = tl.minimum(num_rows - row_block * ROWS, ROWS)
    live = (left + PIECE - 1) // PIECE
    if TOGETHER and DEVICE:
        until_all_are_there(counter, missing, goal, DEVICE)
        first = split
        end = tl.minimum(split + 1, live)
    else:  # the interpreter runs programs one after the other: none could wait for a later one
        first = 0
        end = tl.where(missing == 0, live, 0)
    index = block * OUTPUTS + tl.arange(0, OUTPUTS)
    for piece in range(first, end):
        rows = row_block * ROWS + piece * PIECE + tl.arange(0, PIECE)
        total = add_up(
            parts, rows, index, place, squares_in, norm, hidden, out, num_rows, num_outputs, num_squares, eps,
            K, SPLITS, RESIDUAL, SCALED, PLACED, MOST, ".cg",
        )  # fmt: skip
        if RESIDUAL:
            tl.store(squares_out + rows * blocks + block, total, rows < num_rows)
