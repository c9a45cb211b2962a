"""What comes behind the inner loops: sums of a program's warps, and exchanges between a warp's lanes, as PTX."""

from __future__ import annotations

from functools import cache

from s2quant.runtime.kernels.ptx import COLUMNS, TILE, Body

PART_BYTES = 608  # of shared memory: a warp's 16 x 8 sums, 8 floats between every two columns
MOST_SHARED = 16384  # bytes; more tiles take turns


def num_values(warps: int) -> int:
    """Count the elements of a tile and 8 rows of x that a thread has after `reduce`.

    Args:
        warps: Warps of a program.

    Returns:
        1, or more where there are less than 128 threads.
    """
    return max(1, TILE * COLUMNS // (32 * warps))


def sum_bytes(body: Body, warps: int) -> int:
    """Count the bytes of shared memory that `reduce` takes.

    Args:
        body: The loop.
        warps: Warps of a program.

    Returns:
        The bytes.
    """
    return _at_once(body, warps) * warps * PART_BYTES


def _at_once(body: Body, warps: int) -> int:
    """Count the tiles, of 8 rows of x each, that are added up together."""
    return min(body.tiles * body.columns, max(1, MOST_SHARED // (warps * PART_BYTES)))


@cache
def reduce(body: Body, warps: int) -> tuple[str, str]:
    """Generate the third part: add up what the warps have, through shared memory; all threads take part.

    Operands: `num_values` results per tile and column group, in the order of the sums; the sums; the thread's number T.
    Result v of a tile is element T + 32 v warps of its 128, columns (rows of x) of 16 outputs in turn; threads past
    the 128th repeat those of others.

    Args:
        body: The loop.
        warps: Warps of a program.

    Returns:
        PTX with LLVM's operand names, and LLVM's constraints.
    """
    pairs, values = body.tiles * body.columns, num_values(warps)
    at_once = _at_once(body, warps)
    results, thread = pairs * values, f"${pairs * values + 4 * pairs}"
    lines = [
        "{",
        f".shared .align 16 .b8 parts[{sum_bytes(body, warps)}];",
        ".reg .b32 base, to, from, t;",
        *(f".reg .f32 sum{n};" for n in range(results)),
        *(f".reg .f32 part{w};" for w in range(warps)),
        "mov.u32 base, parts;",
        f"shr.u32 to, {thread}, 5;",  # the warp's part; there lane 4 g + t begins at 40 t + g
        f"mul.lo.u32 to, to, {PART_BYTES};",
        f"and.b32 t, {thread}, 3;",
        "mul.lo.u32 t, t, 160;",
        "add.u32 to, to, t;",
        f"and.b32 t, {thread}, 28;",
        "add.u32 to, to, t;",
        "add.u32 to, to, base;",
        f"and.b32 from, {thread}, 127;",  # element n is at n + 8 (n / 32), so that no two lanes meet in a bank
        "shr.u32 t, from, 5;",
        "shl.b32 from, from, 2;",
        "shl.b32 t, t, 5;",
        "add.u32 from, from, t;",
        "add.u32 from, from, base;",
    ]
    for start in range(0, pairs, at_once):
        chunk = range(start, min(pairs, start + at_once))
        lines += ["bar.sync 0;"] if start else []  # what is overwritten has been read
        for place, pair in enumerate(chunk):
            for j in range(4):  # outputs g, g, g + 8, g + 8 and rows 2 t, 2 t + 1, 2 t, 2 t + 1
                where = place * warps * PART_BYTES + 64 * (j % 2) + 32 * (j // 2)
                lines.append(f"st.shared.f32 [to+{where}], ${results + 4 * pair + j};")
        lines.append("bar.sync 0;")
        for place, pair in enumerate(chunk):
            for v in range(values):
                first = place * warps * PART_BYTES + 160 * warps * v
                lines += [f"ld.shared.f32 part{w}, [from+{first + w * PART_BYTES}];" for w in range(warps)]
                lines += [f"add.f32 part0, part0, part{w};" for w in range(1, warps)]
                lines.append(f"mov.f32 sum{pair * values + v}, part0;")
    lines += [*(f"mov.f32 ${n}, sum{n};" for n in range(results)), "}"]
    return "\n".join(lines), ",".join(["=f"] * results + ["f"] * (4 * pairs) + ["r", "~{memory}"])


def exchange(distances: tuple[int, ...], add: bool = True) -> str:
    """Generate an exchange between lanes: add up what lanes at these distances have, or take it.

    Args:
        distances: Powers of two.
        add: Whether to add.

    Returns:
        PTX of one result and one operand.
    """
    lines = ["{", ".reg .f32 own, its;", "mov.f32 own, $1;"]
    for distance in distances:
        lines.append(f"shfl.sync.bfly.b32 its, own, {distance}, 31, 0xffffffff;")
        lines.append("add.f32 own, own, its;" if add else "mov.f32 own, its;")
    return "\n".join([*lines, "mov.f32 $0, own;", "}"])
