"""A warp's inputs of the only row of x, read at once into shared memory, as PTX."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s2quant.runtime.kernels.ptx import Body

AT_ONCE = 512  # bytes that the lanes of a warp copy together, 16 each


def hold(body: Body, step: int, thread: str) -> list[str]:
    """Copy the warp's inputs to shared memory, zeros behind them for the lanes that have no row.

    Register xa holds the address of the lane's 16 bytes of the warp's first 512, rem the warp's steps. Afterwards xs is
    where the lane reads, and on what it moves on by after `body.depth` steps: nothing for a lane among the zeros.

    Args:
        body: The loop.
        step: Bytes of x of a step.
        thread: Operand that has the thread's number.

    Returns:
        Lines of PTX.
    """
    row, zeros = body.num_steps * step, min(body.depth, body.num_steps) * step
    out = [
        f".shared .align 16 .b8 held[{body.held_bytes}];",
        ".reg .b32 xs, on, to, lane, z;",
        ".reg .pred mine, here;",
        "mov.b32 z, 0;",
        f"and.b32 lane, {thread}, 31;",
        f"shr.u32 to, {thread}, 5;",
        f"mul.lo.u32 to, to, {row + zeros};",
        "mov.u32 xs, held;",
        "add.u32 xs, xs, to;",  # the warp's part
        "shl.b32 to, lane, 4;",  # what the lane copies: 16 of every 512 bytes
    ]
    pieces = range(0, row, AT_ONCE)
    names = {start: [f"q{start}_{n}" for n in range(4)] for start in pieces}
    for start in pieces:
        out += [f".reg .b32 {name};\nmov.b32 {name}, 0;" for name in names[start]]
        load = f"ld.global.v4.b32 {{{', '.join(names[start])}}}, [xa+{start}];"
        if body.exact and start + AT_ONCE <= row:
            out.append(load)
            continue
        out += [f"mul.lo.u32 on, rem, {step};", f"sub.s32 on, on, {start};"]
        out += ["setp.gt.s32 here, on, to;", f"@here {load}"]
    out += ["add.u32 to, to, xs;", "shl.b32 lane, lane, 4;"]
    for start in pieces:
        store = f"st.shared.v4.b32 [to+{start}], {{{', '.join(names[start])}}};"
        out += [store] if start + AT_ONCE <= row else [f"setp.gt.s32 here, {row - start}, lane;", f"@here {store}"]
    for start in range(0, zeros, AT_ONCE):
        store = f"st.shared.v4.b32 [to+{row + start}], {{z, z, z, z}};"
        out += [store] if start + AT_ONCE <= zeros else [f"setp.gt.s32 here, {zeros - start}, lane;", f"@here {store}"]
    return [
        *out,
        "setp.gt.s32 mine, 64, lane;",  # lanes 0 to 3, of output 0
        "and.b32 lane, lane, 48;",
        "add.u32 xs, xs, lane;",
        f"@!mine add.u32 xs, xs, {row};",
        "mov.b32 on, 0;",
        f"@mine mov.b32 on, {zeros};",  # the others stay where they are
        "bar.warp.sync 0xffffffff;",
    ]
