"""How each linear is cut up into programs, warps and steps: measured where it was, else by rule."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from s2quant.runtime.kernels.ptx import STEP
from s2quant.runtime.kernels.tuned import MANY, TABLE
from s2quant.runtime.kernels.weights import TURN, Block, Shape, Weight

Key = tuple[str, int, int, bool, int]
"""kind, out_features, in_features, gated, groups of 8 rows; of many rows, rows of a program."""

TUNED: dict[Key, Shape] = {
    key: Shape(warps=warps, tiles=tiles, depth=depth, columns=columns)
    for key, (warps, tiles, depth, columns) in TABLE.items()
}

TUNED_MANY: dict[Key, Block] = {
    key: Block(tiles=tiles, splits=splits, stages=stages, warps=warps)
    for key, (tiles, splits, stages, warps) in MANY.items()
}
PROGRAMS = 192  # of many rows that keep a Hopper GPU of 132 multiprocessors busy
LEAST_STEPS = {"w4": 4, "w8": 4, "bf16": 8}  # turns of a split


def key_of(weight: Weight, columns: int) -> Key:
    """Name a linear in the table.

    Args:
        weight: The weight.
        columns: Groups of 8 rows that a program takes.

    Returns:
        The key.
    """
    return weight.kind, weight.out_features, weight.in_features, weight.gated, columns


def shape_for(weight: Weight, columns: int, narrow: bool = True) -> Shape:
    """Choose how to cut a linear up.

    Args:
        weight: The weight.
        columns: Groups of 8 rows that a program takes.
        narrow: See `rule`.

    Returns:
        The measured best, or the rule's.
    """
    tuned = TUNED.get(key_of(weight, columns))
    return rule(weight, columns, narrow) if tuned is None else tuned


def rule(weight: Weight, columns: int, narrow: bool = True) -> Shape:
    """Cut a linear up by rule: as many warps as leave each about five steps (four of 8 bits), all under way.

    Sixteen warps of a hundred registers are a whole SM: 160 programs (2560 outputs) would run one after the other on
    28 of 132 SMs, and the next kernel would have nowhere to ask for its weights from. Eight leave room for both.

    Args:
        weight: The weight.
        columns: Groups of 8 rows that a program takes.
        narrow: Whether there are at most 8 warps, not 16.

    Returns:
        The shape.
    """
    steps = weight.in_features // STEP[weight.kind]
    warps = 1
    most_depth = 4 if weight.kind == "w8" and narrow else 5
    while warps < (8 if narrow else 16) and steps / warps > most_depth:
        warps *= 2
    most = -(-steps // warps)
    wanted = most_depth if columns <= 2 else 2
    exact = [depth for depth in range(min(wanted, most), 1, -1) if most % depth == 0]
    depth = exact[0] if exact else min(wanted, most)
    tiles = 2 if columns >= 4 and weight.num_tiles % 2 == 0 else 1
    return Shape(warps=warps, tiles=tiles, depth=depth, columns=columns)


def candidates(weight: Weight, columns: int) -> list[Shape]:
    """List the shapes worth trying.

    Args:
        weight: The weight.
        columns: Groups of 8 rows that a program takes.

    Returns:
        The rule's first.
    """
    found = [rule(weight, columns)]
    steps = weight.in_features // STEP[weight.kind]
    widths, per_step = {columns, min(columns, 4)}, {"w4": 12, "w8": 18, "bf16": 16}[weight.kind]
    room = 100 if columns <= 2 else 200  # see SHARED_REGISTERS: the loop is not all that needs some
    for warps, tiles, depth, width in product((4, 8, 16), (1, 2, 4), (1, 2, 3, 4, 5), sorted(widths)):
        most = -(-steps // warps)
        registers = tiles * (min(depth, most) * per_step + 4 * width) + 12 * width
        wasteful = most % depth and (depth < 3 or most < depth)
        if weight.num_tiles % tiles or wasteful or not 24 <= registers <= room or warps > steps:
            continue
        if (width >= 4 and tiles == 1 and weight.num_tiles >= 512) or (
            width <= 2 and tiles > 1 and weight.num_tiles < 512
        ):
            continue  # many rows of x: read them for several tiles; few rows: have many programs
        found.append(Shape(warps=warps, tiles=tiles, depth=depth, columns=width))
    return list(dict.fromkeys(found))


def block_for(weight: Weight, rows: int) -> Block:
    """Choose how to cut a linear of many rows up.

    Args:
        weight: The weight.
        rows: Rows of x of a program.

    Returns:
        The measured best, or the rule's.
    """
    tuned = TUNED_MANY.get(key_of(weight, rows))
    return block_rule(weight) if tuned is None else tuned


def block_rule(weight: Weight, tiles: int = 8, programs: int = PROGRAMS) -> Block:
    """Cut a linear of many rows up by rule: blocks of 128 outputs, and as many splits as give work to all.

    Args:
        weight: The weight.
        tiles: Tiles of a program.
        programs: How many there should be at most, if splits make more.

    Returns:
        The block.
    """
    turns = weight.in_features // TURN[weight.kind]
    wanted = min(programs // -(-weight.num_tiles // tiles), turns // LEAST_STEPS[weight.kind])
    splits = 1 if weight.gated else max(1, wanted)
    splits = -(-turns // -(-turns // splits))  # none is left without a turn
    return Block(tiles=tiles, splits=splits, stages=4 if weight.kind == "bf16" else 3, warps=4 * -(-tiles // 8))


def block_candidates(weight: Weight) -> list[Block]:
    """List the blocks worth trying.

    Args:
        weight: The weight.

    Returns:
        The rule's first.
    """
    start = block_rule(weight)
    found = [start]
    for programs, tiles in product((PROGRAMS, 132, 264), (8, 16)):
        found.append(block_rule(weight, tiles, programs))
    found += [replace(start, stages=start.stages + more) for more in (1, -1)]
    if weight.kind == "bf16" and not weight.gated:  # 128 outputs are of one product
        found.append(replace(start, warps=8))
    return list(dict.fromkeys(found))
