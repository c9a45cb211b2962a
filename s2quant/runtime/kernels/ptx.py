"""The inner loop of the matrix-vector kernels, generated as PTX: weights from memory straight into the tensor cores.

Legend: M rows of x, N outputs, K inputs; a tile is 16 outputs; a step is the inputs one warp takes at a time.

Triton decides for itself which thread holds which element, and pays for it with trips through shared memory. The
instruction `mma.m16n8k16` is happy with any order of the inputs, as long as weights and x agree, so both can be
loaded by the very lane that multiplies them: lane 4 g + t holds outputs g and g + 8 of the tile, x rows g (of 8 at a
time), and inputs 8 t .. 8 t + 7 of every 32. So x stays in its natural order, and so does a bf16 weight.

A 4-bit weight is stored one int32 word per instruction and lane (`s2quant.runtime.kernels.layout`). Two nibbles, 16
bits apart, become two bf16 numbers 128 + q by one AND and one OR. The tile is not corrected element by element: the
products start from -136 times the sum of x in the group, which one more instruction with a constant weight gives
exactly. The group's scale multiplies the float32 sums. An 8-bit weight has one bit more than fits behind the leading
one of a bf16 number: its low seven become 128 + l the same way, its highest, stored inverted, another number 128 or
256, and their difference, l or l - 128, is the weight, exactly. Nothing is rounded on the way but x, which is bf16.

The first weights are asked for before waiting for the kernel before (`griddepcontrol`, sm_90), which may still be at
work if the launch says so; whatever it wrote is read after that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from s2quant.runtime.kernels.ptx_hold import hold

Kind = Literal["w4", "w8", "bf16"]
STEP: dict[str, int] = {"w4": 128, "w8": 128, "bf16": 64}  # inputs per step
TILE = 16  # outputs of a tile
COLUMNS = 8  # x rows of one instruction
_MINUS_136 = 0xC308C308  # two bf16 numbers: -(128 + 8)
_TWICE_128 = 0x43004300  # two bf16 numbers 128, whose low four mantissa bits count ones


@dataclass(frozen=True, kw_only=True)
class Body:
    """What an inner loop is generated for.

    Args:
        kind: Of the weights.
        in_features: K, a multiple of the step.
        tiles: Tiles of 16 outputs that a warp works on.
        columns: Groups of 8 x rows.
        depth: Steps whose weights are under way at a time.
        num_steps: Steps of a warp at most; those of every warp if `exact`.
        exact: Whether every warp has that many steps.
        group_size: Inputs per scale: 32, 64 or 128; not for "bf16".
        bf16_scales: Whether scales are bfloat16, not float16; not for "bf16".
        gated: Whether the tile is 8 outputs of each of two weights; "bf16" only (a packed weight is laid out so).
        live_rows: Whether only rows of x that exist are read, of up to 8: each program reads all of x, and eight rows
            of which seven mean nothing are more bytes than a 4-bit weight.
        holding: Warps of the program, where each reads its inputs of the only row of x at once, into shared memory, in
            place of a step's when it is their turn; 0: x is read step by step.
    """

    kind: Kind
    in_features: int
    tiles: int = 1
    columns: int = 1
    depth: int = 4
    num_steps: int = 4
    exact: bool = True
    group_size: int = 32
    bf16_scales: bool = False
    gated: bool = False
    live_rows: bool = False
    holding: int = 0

    @property
    def num_outputs(self) -> int:
        """Float32 numbers per lane: tile-major, then columns, then the four of an instruction."""
        return 4 * self.tiles * self.columns

    @property
    def held_bytes(self) -> int:
        """Bytes of shared memory that a program takes for x."""
        depth = min(self.depth, self.num_steps)
        return self.holding * (self.num_steps + depth) * 2 * STEP[self.kind]


@cache
def ask(body: Body) -> tuple[str, str]:
    """Generate the first part: ask for the weights of the first steps, then wait for the kernel before.

    Operands: the registers of the weights; the lane's weight address at its warp's first step; its second address
    (of the scales; "bf16": of the weights of outputs 8..15); the number of steps of its warp.

    Args:
        body: What to generate.

    Returns:
        PTX with LLVM's operand names, and LLVM's constraints.
    """
    writer = _Writer(body)
    names = writer.registers()
    address = [f"${len(names) + n}" for n in range(3)]
    lines = [
        "{",
        "griddepcontrol.launch_dependents;",
        ".reg .pred go;",
        *writer.addresses(address[0], address[1], None, address[2]),
        *(f".reg .b32 {name};" for name in names),
        *(line for u in range(writer.depth) for line in writer.load(u, u)),
        "griddepcontrol.wait;",
        *(f"mov.b32 ${n}, {name};" for n, name in enumerate(names)),
        "}",
    ]
    return "\n".join(lines), ",".join(["=r"] * len(names) + ["l", "l", "r", "~{memory}"])


@cache
def multiply(body: Body) -> tuple[str, str]:
    """Generate the second part: everything else.

    Operands: the sums; the registers of the weights; the three of `ask`, but the lane's address of x before the last;
    the number of rows of x at and behind the lane's first. Where a program is `holding` these two are the address of
    the lane's 16 bytes of the warp's first 512, and the thread's number.

    Args:
        body: What to generate.

    Returns:
        PTX with LLVM's operand names, and LLVM's constraints.
    """
    writer = _Writer(body)
    names, num_sums = writer.registers(), body.num_outputs
    address = [f"${num_sums + len(names) + n}" for n in range(5)]
    lines = [
        "{",
        *writer.addresses(*address[:4]),
        *([f".reg .pred mine;\nsetp.gt.s32 mine, {address[4]}, 0;"] if body.live_rows and not body.holding else []),
        *(f".reg .b32 {name};\nmov.b32 {name}, ${num_sums + n};" for n, name in enumerate(names)),
        *(hold(body, 2 * STEP[body.kind], address[4]) if body.holding else []),
        *writer.loop(),
        *(f"mov.f32 ${n}, acc{n};" for n in range(num_sums)),
        "}",
    ]
    return "\n".join(lines), ",".join(["=f"] * num_sums + ["r"] * len(names) + ["l", "l", "l", "r", "r", "~{memory}"])


def num_registers(body: Body) -> int:
    """Count the registers of the weights under way.

    Args:
        body: The loop.

    Returns:
        32-bit registers per lane.
    """
    return len(_Writer(body).registers())


class _Writer:
    """Writes one loop; registers are named by what they hold."""

    def __init__(self, body: Body) -> None:
        assert not (body.live_rows or body.holding) or body.columns == 1, body
        self.body = body
        self.looped = body.num_steps > body.depth
        self.depth = min(body.depth, body.num_steps)
        self.packed = body.kind != "bf16"
        self.words = 8 if body.kind == "w4" else 16  # registers of a step's weights
        if self.packed:
            self.groups = STEP[body.kind] // body.group_size
            self.step_bytes, self.second_step_bytes = 128 * self.words, self.groups * 32
            self.tile_bytes = body.in_features // STEP[body.kind] * self.step_bytes
            self.scale_bytes = body.in_features // STEP[body.kind] * self.second_step_bytes
        else:
            self.groups = 0
            self.tile_bytes = self.scale_bytes = body.in_features * 2 * (8 if body.gated else TILE)
            self.step_bytes = self.second_step_bytes = 2 * STEP["bf16"]

    def registers(self) -> list[str]:
        """Name the registers of the weights under way."""
        names = []
        for u in range(self.depth):
            for r in range(self.body.tiles):
                names += [f"w{u}_{r}_{n}" for n in range(self.words)]
                names += [f"s{u}_{r}_{n}" for n in range(self.groups)]
        return names

    @staticmethod
    def addresses(weight: str, second: str, x: str | None, steps: str) -> list[str]:
        """Copy the operands that the loop moves on."""
        out = [".reg .b64 wa, sa, xa;", f"mov.b64 wa, {weight};", f"mov.b64 sa, {second};", ".reg .b32 rem;"]
        return out + ([] if x is None else [f"mov.b64 xa, {x};"]) + [f"mov.b32 rem, {steps};"]

    def loop(self) -> list[str]:
        """Multiply all steps, asking for the weights of later ones as registers fall free."""
        body = self.body
        out = [
            ".reg .b32 t, high, minus, a0, a1, a2, a3;",
            ".reg .b16 h0, h1;",
            ".reg .f32 zero, s0, s1;",
            ".reg .pred go, ahead;",
            "mov.f32 zero, 0f00000000;",
            f"mov.b32 minus, {_MINUS_136:#010x};",
        ]
        out += [f".reg .f32 acc{n};\nmov.f32 acc{n}, 0f00000000;" for n in range(body.num_outputs)]
        out += [f".reg .f32 off{n}, c{n};" for n in range(4 * body.columns)]
        inputs = [f"x{c}_{i}_{n}" for c in range(body.columns) for i in range(self.blocks) for n in range(4)]
        out += [f".reg .b32 {name};" for name in inputs]
        if self.looped:
            out += ["AGAIN:", f"setp.gt.s32 ahead, rem, {self.depth};"]
        for u in range(self.depth):
            out += self._multiply(u)
            if self.looped:
                out += self.load(u, u + self.depth, guard="ahead" if body.exact else None)
        if self.looped:
            out += [
                f"sub.s32 rem, rem, {self.depth};",
                f"add.s64 wa, wa, {self.depth * self.step_bytes};",
                f"add.s64 sa, sa, {self.depth * self.second_step_bytes};",
                "add.u32 xs, xs, on;" if body.holding else f"add.s64 xa, xa, {self.depth * STEP[body.kind] * 2};",
                "setp.gt.s32 go, rem, 0;",
                "@go bra AGAIN;",
            ]
        return out

    @property
    def blocks(self) -> int:
        """Runs of 32 inputs in a step."""
        return STEP[self.body.kind] // 32

    def _guarded(self, step: int, names: list[str], load: str, guard: str | None) -> list[str]:
        """Load only if the step exists (counted from the registers' addresses), else give zeros."""
        if guard is not None:
            return [f"@{guard} {load}"]
        if self.body.exact:
            return [load]
        zeros = [f"mov.b32 {name}, 0;" for name in names]
        return [*zeros, f"setp.gt.s32 go, rem, {step};", f"@go {load}"]

    def load(self, u: int, step: int, guard: str | None = None) -> list[str]:
        """Ask for the weights of a step."""
        out = []
        how = "ld.global.L1::no_allocate.L2::128B"  # with .nc, ptxas would move it behind the wait, to where it is used
        for r in range(self.body.tiles):
            first = step * self.step_bytes + r * self.tile_bytes
            if self.packed:
                for part in range(self.words // 4):
                    names = [f"w{u}_{r}_{4 * part + n}" for n in range(4)]
                    load = f"{how}.v4.b32 {{{', '.join(names)}}}, [wa+{first + 512 * part}];"
                    out += self._guarded(step, names, load, guard)
                names = [f"s{u}_{r}_{n}" for n in range(self.groups)]
                where = f"[sa+{step * self.second_step_bytes + r * self.scale_bytes}]"
                vector = {1: "", 2: ".v2", 4: ".v4"}[self.groups]
                listed = names[0] if self.groups == 1 else f"{{{', '.join(names)}}}"
                out += self._guarded(step, names, f"ld.global{vector}.b32 {listed}, {where};", guard)
                continue
            for i in range(self.blocks):
                for high, address in enumerate(("wa", "sa")):
                    names = [f"w{u}_{r}_{8 * i + 4 * high + n}" for n in range(4)]
                    load = f"{how}.v4.b32 {{{', '.join(names)}}}, [{address}+{first + 64 * i}];"
                    out += self._guarded(step, names, load, guard)
        return out

    def _x(self, u: int, blocks: Iterable[int]) -> list[str]:
        """Load x: 16 bytes per run of 32 inputs and group of rows."""
        out = []
        if self.body.holding:
            for i in blocks:
                four = ", ".join(f"x0_{i}_{n}" for n in range(4))
                out.append(f"ld.shared.v4.b32 {{{four}}}, [xs+{u * STEP[self.body.kind] * 2 + 64 * i}];")
            return out
        for i in blocks:
            for c in range(self.body.columns):
                names = [f"x{c}_{i}_{n}" for n in range(4)]
                where = u * STEP[self.body.kind] * 2 + 64 * i + c * COLUMNS * self.body.in_features * 2
                load = f"ld.global.v4.b32 {{{', '.join(names)}}}, [xa+{where}];"
                if not self.body.live_rows:
                    out += self._guarded(u, names, load, None)
                    continue
                out += [f"mov.b32 {name}, 0;" for name in names]  # here, or ptxas makes a branch of each load
                if self.body.exact:
                    out.append(f"@mine {load}")
                else:
                    out += [f"setp.gt.s32 go, rem, {u};", "and.pred go, go, mine;", f"@go {load}"]
        return out

    def _mma(self, out: str, n: int, a: list[str], x: tuple[str, str], c: list[str]) -> str:
        result = ", ".join(f"{out}{n + j}" for j in range(4))
        return (
            f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{result}}}, "
            f"{{{', '.join(a)}}}, {{{x[0]}, {x[1]}}}, {{{', '.join(c)}}};"
        )

    def _multiply(self, u: int) -> list[str]:
        """Multiply a step; few rows of x are all asked for at first, many as they are needed, to spare registers."""
        size = self.body.group_size // 32 if self.packed else 1
        groups = [range(first, first + size) for first in range(0, self.blocks, size)]
        early = self.body.columns <= 2
        out = self._x(u, range(self.blocks)) if early else []
        for number, blocks in enumerate(groups):
            out += [] if early else self._x(u, blocks)
            out += self._group(u, number, blocks) if self.packed else self._block_bf16(u, number)
        return out

    def _block_bf16(self, u: int, i: int) -> list[str]:
        body, out = self.body, []
        for r in range(body.tiles):
            for half in range(2):  # inputs 4 half .. 4 half + 3 of the lane's eight
                low, high = 8 * i + 2 * half, 8 * i + 4 + 2 * half
                a = [f"w{u}_{r}_{n}" for n in (low, high, low + 1, high + 1)]
                for c in range(body.columns):
                    n = 4 * (r * body.columns + c)
                    x = (f"x{c}_{i}_{2 * half}", f"x{c}_{i}_{2 * half + 1}")
                    out.append(self._mma("acc", n, a, x, [f"acc{n + j}" for j in range(4)]))
        return out

    def _group(self, u: int, group: int, blocks: Iterable[int]) -> list[str]:
        body, out = self.body, []
        inputs = [(i, half) for i in blocks for half in range(2)]
        for c in range(body.columns if body.kind == "w4" else 0):
            for number, (i, half) in enumerate(inputs):
                x = (f"x{c}_{i}_{2 * half}", f"x{c}_{i}_{2 * half + 1}")
                start = ["zero"] * 4 if number == 0 else [f"off{4 * c + j}" for j in range(4)]
                out.append(self._mma("off", 4 * c, ["minus"] * 4, x, start))
        for r in range(body.tiles):
            for number, (i, half) in enumerate(inputs):
                out += self._unpack(u, r, 2 * i + half)
                for c in range(body.columns):
                    x = (f"x{c}_{i}_{2 * half}", f"x{c}_{i}_{2 * half + 1}")
                    sums = [f"{'c' if number else 'off'}{4 * c + j}" for j in range(4)]
                    if body.kind == "w8" and number == 0:
                        sums = ["zero"] * 4
                    out.append(self._mma("c", 4 * c, ["a0", "a1", "a2", "a3"], x, sums))
            out += self._scales(f"s{u}_{r}_{group}")
            for c in range(body.columns):
                n = 4 * (r * body.columns + c)  # outputs g, g, g + 8, g + 8
                out += [f"fma.rn.f32 acc{n + j}, c{4 * c + j}, s{j // 2}, acc{n + j};" for j in range(4)]
        return out

    def _unpack(self, u: int, r: int, number: int) -> list[str]:
        """Make a0..a3, two bf16 numbers each: 128 + q of eight nibbles, or the weights of eight bytes."""
        if self.body.kind == "w8":
            words = [f"w{u}_{r}_{2 * number + n}" for n in range(2)]
            return [line for n, word in enumerate(words) for line in self._unpack_bytes(word, 2 * n)]
        word, out = f"w{u}_{r}_{number}", []
        for j in range(4):
            shifted = word
            if j:
                out.append(f"shr.u32 t, {word}, {4 * j};")
                shifted = "t"
            out.append(f"lop3.b32 a{j}, {shifted}, 0x000f000f, {_TWICE_128:#010x}, 0xEA;")
        return out

    @staticmethod
    def _unpack_bytes(word: str, first: int) -> list[str]:
        """Make two of a0..a3 out of four bytes, whose highest bits are inverted."""
        out = []
        for a in (first, first + 1):
            if a > first:
                out.append(f"shr.u32 t, {word}, 8;")
                word = "t"
            out.append(f"lop3.b32 a{a}, {word}, 0x007f007f, {_TWICE_128:#010x}, 0xEA;")
            out.append(f"lop3.b32 high, {word}, 0x00800080, {_TWICE_128:#010x}, 0xEA;")
            out.append(f"sub.rn.bf16x2 a{a}, a{a}, high;")
        return out

    def _scales(self, word: str) -> list[str]:
        """Make s0 (output g) and s1 (output g + 8) out of two 16-bit scales."""
        if self.body.bf16_scales:
            return [f"shl.b32 t, {word}, 16;", "mov.b32 s0, t;", f"and.b32 t, {word}, 0xffff0000;", "mov.b32 s1, t;"]
        return [f"mov.b32 {{h0, h1}}, {word};", "cvt.f32.f16 s0, h0;", "cvt.f32.f16 s1, h1;"]
