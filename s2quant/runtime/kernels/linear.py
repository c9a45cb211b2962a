# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201 (what Triton compiles has no types to write down)
"""Linears of a few rows: every weight is read once, straight into the tensor cores, and the result is used at once.

Legend: M rows of x, N outputs, K inputs, T threads, W warps; a tile is 16 outputs.

A program has some tiles; its warps share the inputs, and add up through shared memory. What follows the product is
done in place, so that no launch is spent on it (`Epilogue`):

- "store": scaled by the row's reciprocal root mean square, if the input was not normalised yet.
- "gate": silu(first) * second, of a tile that holds 8 outputs of each, written where the next linear wants it.
- "residual": added to the hidden vector; the sum times the next norm's weight is written where the next linear wants
  it, and its squares are summed per program, for the next linear to finish the norm. So a norm is no launch.

The loop itself is PTX (`s2quant.runtime.kernels.ptx`). Triton's interpreter cannot run that; it runs `plain_tile` or
`plain_flat`, which read the same layout with ordinary operations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from s2quant.runtime.kernels.launch import INTERPRETED, PATIENT, How, early_options, start
from s2quant.runtime.kernels.plain import over_rows, plain_flat, plain_tile, swapped
from s2quant.runtime.kernels.ptx import COLUMNS, STEP, Body, ask, multiply, num_registers
from s2quant.runtime.kernels.ptx_sums import num_values, reduce, sum_bytes
from s2quant.runtime.kernels.weights import MOST_COLUMNS, Shape, Then, Weight

SHARED_REGISTERS = 128  # per thread at most: two programs of 8 warps, or four of 4, share an SM
MOST_DECLARED = 49152  # bytes of shared memory that PTX can declare, for x and for the sums


def _name(compiled: Any) -> str:
    """Name a compiled kernel so that a profile tells them apart."""
    c = compiled.constants
    return f"linear_{c['KIND']}_{c['EPILOGUE']}_k{c['K']}_c{c['COLS']}"


@triton.jit(do_not_specialize=["num_rows"], repr=_name)
def linear_kernel(
    weight, second, x, place, squares_in, norm, hidden, out, squares_out, num_rows, num_outputs, num_squares, eps,
    ASK: tl.constexpr, ASK_OPERANDS: tl.constexpr, MULTIPLY: tl.constexpr, MULTIPLY_OPERANDS: tl.constexpr,
    NUM_REGISTERS: tl.constexpr, PLAIN: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, K: tl.constexpr, TOTAL_STEPS: tl.constexpr, WARP_STEPS: tl.constexpr, WARPS: tl.constexpr,
    TILES: tl.constexpr, COLS: tl.constexpr, EPILOGUE: tl.constexpr, SCALED: tl.constexpr, PLACED: tl.constexpr,
    MAX_SQUARES: tl.constexpr, FIRST: tl.constexpr, FLAT: tl.constexpr, REDUCE: tl.constexpr,
    REDUCE_OPERANDS: tl.constexpr, VALUES: tl.constexpr, SQUARES: tl.constexpr, HOLDS: tl.constexpr,
):  # fmt: skip
    """Compute TILES tiles of outputs for 8 COLS rows of x; see the module."""
    first_tile = tl.program_id(0) * TILES
    first_column = tl.program_id(1) * COLS * 8
    OUTPUTS: tl.constexpr = 8 if EPILOGUE == "gate" else 16
    SPAN: tl.constexpr = 32 * WARPS
    if FLAT:
        thread_row = tl.arange(0, SPAN) % 16
        thread_column = tl.arange(0, SPAN) // 16
    if FIRST:  # constants of what follows the product
        asked = first_tile * OUTPUTS + (thread_row if FLAT else tl.arange(0, OUTPUTS))
        if EPILOGUE == "residual":
            norm_asked = tl.load(norm + asked, asked < num_outputs, 0.0)
        if PLACED:
            target_asked = tl.load(place + asked, asked < num_outputs, 0)
    if not PLAIN:
        thread = tl.arange(0, 32 * WARPS)
        lane = thread % 32
        step = thread // 32 * WARP_STEPS
        g = lane // 4
        t = lane % 4
        live = num_rows - first_column - g
        count = tl.minimum(tl.maximum(TOTAL_STEPS - step, 0), WARP_STEPS)
        x_address = x.to(tl.int64) + ((first_column + g).to(tl.int64) * K + t * 8) * 2
        if KIND != "bf16":
            at = (first_tile * TOTAL_STEPS + step).to(tl.int64)
            w_address = weight.to(tl.int64) + at * (1024 if KIND == "w4" else 2048) + lane * 16
            s_address = second.to(tl.int64) + (at * 8 + g) * (512 // GROUP)
            x_address += step * 256
        else:
            row = (first_tile * (8 if GATED else 16) + g).to(tl.int64)
            offset = (row * K + t * 8) * 2 + step * 128
            w_address = weight.to(tl.int64) + offset
            s_address = second.to(tl.int64) + offset
            x_address += step * 128
        if HOLDS:
            x_address = x.to(tl.int64) + step * (128 if KIND == "bf16" else 256) + lane * 16
            live = thread
        loaded = tl.inline_asm_elementwise(
            ASK, ASK_OPERANDS, [w_address, s_address, count], dtype=(tl.int32,) * NUM_REGISTERS,
            is_pure=False, pack=1,
        )  # fmt: skip
    if FLAT and FIRST:
        its_column = first_column + thread_column % 8
        there = (thread_column < 8) & (its_column < num_rows)
        if EPILOGUE == "residual":
            where = its_column * num_outputs + asked
            hidden_asked = tl.load(hidden + where, there & (asked < num_outputs), 0.0)
        if SCALED:
            at_squares = squares_in + its_column * num_squares + thread_row
            squares_asked = (tl.load(at_squares, there & (thread_row < num_squares), 0.0),)
            for k in tl.static_range(1, SQUARES):
                more = tl.load(at_squares + 16 * k, there & (thread_row + 16 * k < num_squares), 0.0)
                squares_asked = squares_asked + (more,)  # type: ignore[assignment]
    elif FIRST and EPILOGUE == "residual":
        rows = first_column + tl.arange(0, 8)
        there = (asked < num_outputs)[:, None] & (rows < num_rows)[None, :]
        hidden_asked = tl.load(hidden + rows[None, :] * num_outputs + asked[:, None], there, 0.0)
    places = tl.arange(0, MAX_SQUARES)
    if SCALED and COLS == 1 and not FLAT:  # asked for before the loop, used after it
        columns = first_column + tl.arange(0, 8)
        inside = (columns < num_rows)[:, None] & (places < num_squares)[None, :]
        squares = tl.load(squares_in + columns[:, None] * num_squares + places[None, :], inside, 0.0)
    if not PLAIN:
        sums = tl.inline_asm_elementwise(
            MULTIPLY, MULTIPLY_OPERANDS, loaded + (w_address, s_address, x_address, count, live),
            dtype=(tl.float32,) * (4 * TILES * COLS), is_pure=False, pack=1,
        )  # fmt: skip
    if FLAT and not PLAIN:
        values = tl.inline_asm_elementwise(
            REDUCE, REDUCE_OPERANDS, sums + (thread,), dtype=(tl.float32,) * (VALUES * TILES * COLS),
            is_pure=False, pack=1,
        )  # fmt: skip
    for c in tl.static_range(COLS if FLAT else 0):
        for v in tl.static_range(VALUES):
            number = v * (SPAN // 16) + thread_column  # of 8 columns; warps beyond the fourth have none
            column = first_column + c * 8 + number % 8
            real = (number < 8) & (column < num_rows)
            if SCALED:
                if FIRST:
                    square = squares_asked[0]
                    for k in tl.static_range(1, SQUARES):
                        square += squares_asked[k]
                else:
                    square = tl.zeros((SPAN,), tl.float32)
                    for k in tl.static_range(SQUARES):
                        part = thread_row + 16 * k
                        square += tl.load(squares_in + column * num_squares + part, real & (part < num_squares), 0.0)
                scale = 1 / tl.sqrt(over_rows(square, SPAN, PLAIN) / K + eps)
            total = tl.zeros((SPAN,), tl.float32)
            for r in tl.static_range(TILES):
                if PLAIN:
                    row = (first_tile + r) * 16 + thread_row
                    y = plain_flat(weight, second, x, row, column, K, KIND, GROUP, GATED)
                else:
                    y = values[(r * COLS + c) * VALUES + v]
                if SCALED:
                    y *= scale
                if EPILOGUE == "gate":
                    if PLAIN:
                        other = plain_flat(weight, second, x, row ^ 8, column, K, KIND, GROUP, GATED)
                        if SCALED:
                            other *= scale
                    else:
                        other = swapped(y)
                    y = y / (1 + tl.exp(-y)) * other
                index = (first_tile + r) * OUTPUTS + thread_row
                inside = real & (index < num_outputs) & (thread_row < OUTPUTS)
                if EPILOGUE == "residual":
                    where = column * num_outputs + index
                    if FIRST:
                        y += hidden_asked
                    else:
                        y += tl.load(hidden + where, inside, 0.0)
                    tl.store(hidden + where, y, inside)
                    total += tl.where(inside, y * y, 0.0)
                    if FIRST:
                        y *= norm_asked.to(tl.float32)
                    else:
                        y *= tl.load(norm + index, index < num_outputs, 0.0).to(tl.float32)
                target = index
                if PLACED and FIRST:
                    target = target_asked
                elif PLACED:
                    target = tl.load(place + index, inside, 0)
                tl.store(out + column * num_outputs + target, y.to(out.dtype.element_ty), inside)
            if EPILOGUE == "residual":
                total = over_rows(total, SPAN, PLAIN)
                tl.store(squares_out + column * tl.num_programs(0) + tl.program_id(0), total, real & (thread_row == 0))
    for c in tl.static_range(0 if FLAT else COLS):
        column = first_column + c * 8 + tl.arange(0, 8)
        real = column < num_rows
        scale = tl.full((8,), 1.0, tl.float32)
        if SCALED:
            if COLS == 1:
                scale = 1 / tl.sqrt(tl.sum(squares, axis=1) / K + eps)
            else:
                inside = real[:, None] & (places < num_squares)[None, :]
                part = tl.load(squares_in + column[:, None] * num_squares + places[None, :], inside, 0.0)
                scale = 1 / tl.sqrt(tl.sum(part, axis=1) / K + eps)
        total = tl.zeros((8,), tl.float32)
        for r in tl.static_range(TILES):
            if PLAIN:
                row = (first_tile + r) * 16 + tl.arange(0, 16)
                y = plain_tile(weight, second, x, row, column, K, KIND, GROUP, GATED)
            else:
                low = tl.join(sums[4 * (r * COLS + c)], sums[4 * (r * COLS + c) + 1])
                pairs = tl.join(low, tl.join(sums[4 * (r * COLS + c) + 2], sums[4 * (r * COLS + c) + 3]))
                y = tl.sum(tl.reshape(pairs, (WARPS, 8, 4, 2, 2)), axis=0)  # g, t, column of two, half of the tile
                y = tl.reshape(tl.permute(y, (3, 0, 1, 2)), (16, 8))
            y *= scale[None, :]
            if EPILOGUE == "gate":
                first, other = tl.split(tl.permute(tl.reshape(y, (2, 8, 8)), (1, 2, 0)))
                y = first / (1 + tl.exp(-first)) * other
            index = (first_tile + r) * OUTPUTS + tl.arange(0, OUTPUTS)
            inside = (index < num_outputs)[:, None] & real[None, :]
            if EPILOGUE == "residual":
                where = column[None, :] * num_outputs + index[:, None]
                if FIRST:
                    y += hidden_asked
                else:
                    y += tl.load(hidden + where, inside, 0.0)
                tl.store(hidden + where, y, inside)
                total += tl.sum(tl.where(inside, y * y, 0.0), axis=0)
                if FIRST:
                    y *= norm_asked.to(tl.float32)[:, None]
                else:
                    y *= tl.load(norm + index, index < num_outputs, 0.0).to(tl.float32)[:, None]
            target = index
            if PLACED and FIRST:
                target = target_asked
            elif PLACED:
                target = tl.load(place + index, index < num_outputs, 0)
            tl.store(out + column[None, :] * num_outputs + target[:, None], y.to(out.dtype.element_ty), inside)
        if EPILOGUE == "residual":
            tl.store(squares_out + column * tl.num_programs(0) + tl.program_id(0), total, real)


def body_of(weight: Weight, shape: Shape, columns: int, live_rows: bool = False, holding: bool = False) -> Body:
    """Describe the inner loop of a linear.

    Args:
        weight: The weight.
        shape: How it is cut up.
        columns: Groups of 8 rows of x.
        live_rows: Whether to read only those that exist, where there are less than 8.
        holding: Whether the only row is read at once, into shared memory, where it has room.

    Returns:
        The loop.
    """
    total = weight.in_features // STEP[weight.kind]
    most = -(-total // shape.warps)
    depth = min(shape.depth, most)
    scales = None if weight.kind == "bf16" else weight.second
    body = Body(
        kind=weight.kind,
        in_features=weight.in_features,
        tiles=shape.tiles,
        columns=columns,
        depth=depth,
        num_steps=most,
        exact=total % shape.warps == 0 and most % depth == 0,
        group_size=weight.group_size,
        bf16_scales=scales is not None and scales.element_size() == 2 and "bfloat16" in str(scales.dtype),
        gated=weight.gated and weight.kind == "bf16",
        live_rows=live_rows,
        holding=shape.warps if holding else 0,
    )
    fits = body.held_bytes + sum_bytes(body, shape.warps) <= MOST_DECLARED
    return body if fits else replace(body, holding=0)


def holds(weight: Weight, num_rows: int, how: How) -> bool:
    """Say whether a program reads a warp's inputs of x at once.

    Args:
        weight: The weight.
        num_rows: M.
        how: How the linear is launched.

    Returns:
        Whether it does: a single row of x, in the widest linear, whose many short programs each wait for x once.
    """
    return how.holds and num_rows == 1 and weight.gated


def columns_for(num_rows: int) -> int:
    """Choose how many groups of 8 rows a program takes.

    Args:
        num_rows: M.

    Returns:
        1, 2, 4 or 8.
    """
    groups = -(-num_rows // COLUMNS)
    return min(MOST_COLUMNS, 1 << (groups - 1).bit_length())


def padded_rows(num_rows: int) -> int:
    """Say how many rows a buffer of x needs, so that whole programs may read it.

    Args:
        num_rows: M.

    Returns:
        M rounded up.
    """
    whole = COLUMNS * columns_for(num_rows)
    return -(-num_rows // whole) * whole


def linear(
    weight: Weight, x: Tensor, num_rows: int, then: Then, shape: Shape, how: How = PATIENT, launch: bool = True
) -> None:
    """Multiply, and do what comes after.

    Args:
        weight: The weight.
        x: bfloat16 [padded_rows(M) or more, K], contiguous, inputs in the weight's order; finite everywhere.
        num_rows: M.
        then: What is done with the product; its tensors have M rows or more.
        shape: How to cut it up.
        how: How to launch it.
        launch: Whether to launch it, not only to compile it.
    """
    arguments = linear_arguments(weight, num_rows, then, shape, how)
    columns = arguments["COLS"]
    rows = -(-num_rows // (COLUMNS * columns))
    assert x.shape[0] >= rows * COLUMNS * columns and x.shape[1] == weight.in_features and x.is_contiguous(), x.shape
    # second rows of an ungated bf16 tile lie 8 rows below the first
    second = weight.second if weight.second is not None else weight.first[8:]
    grid = (weight.num_tiles // shape.tiles, rows)
    values = (
        *(weight.first, second, x, *_tensors(then, x), num_rows, then.out.shape[1]),
        *(1 if then.squares_in is None else then.squares_in.shape[1], then.eps),
    )
    early = how.early and (num_rows <= how.early_dense or weight.kind != "bf16")
    options = {**arguments, "num_warps": shape.warps, **early_options(early)}
    if how.narrow and columns <= 2 and not INTERPRETED:
        options["maxnreg"] = SHARED_REGISTERS
    start(linear_kernel, grid, launch)(*values, **options)


def _tensors(then: Then, any_tensor: Tensor) -> list[Tensor]:
    tensors = (then.place, then.squares_in, then.norm, then.hidden, then.out, then.squares_out)
    return [any_tensor if tensor is None else tensor for tensor in tensors]


def linear_arguments(weight: Weight, num_rows: int, then: Then, shape: Shape, how: How = PATIENT) -> dict[str, Any]:
    """Give the compile-time arguments of a linear.

    Args:
        weight: The weight.
        num_rows: M.
        then: What is done with the product.
        shape: How it is cut up.
        how: How it is launched.

    Returns:
        The kernel's constants.
    """
    assert weight.num_tiles % shape.tiles == 0, (weight.num_tiles, shape)
    columns = min(columns_for(num_rows), shape.columns)
    body = body_of(weight, shape, columns, how.live_rows and num_rows < COLUMNS, holds(weight, num_rows, how))
    squares = 1 if then.squares_in is None else then.squares_in.shape[1]
    values = num_values(shape.warps)
    return {
        "ASK": ask(body)[0],
        "ASK_OPERANDS": ask(body)[1],
        "MULTIPLY": multiply(body)[0],
        "MULTIPLY_OPERANDS": multiply(body)[1],
        "NUM_REGISTERS": num_registers(body),
        "PLAIN": INTERPRETED,
        "KIND": weight.kind,
        "GROUP": weight.group_size,
        "GATED": weight.gated,
        "K": weight.in_features,
        "TOTAL_STEPS": weight.in_features // STEP[weight.kind],
        "WARP_STEPS": body.num_steps,
        "WARPS": shape.warps,
        "TILES": shape.tiles,
        "COLS": columns,
        "EPILOGUE": then.epilogue,
        "SCALED": then.squares_in is not None,
        "PLACED": then.place is not None,
        "MAX_SQUARES": triton.next_power_of_2(squares),
        "FIRST": how.loads_first and columns == 1 and shape.tiles == 1 and (values == 1 or not how.flat),
        "FLAT": how.flat,
        "REDUCE": reduce(body, shape.warps)[0],
        "REDUCE_OPERANDS": reduce(body, shape.warps)[1],
        "VALUES": values,
        "SQUARES": -(-squares // 16),
        "HOLDS": body.holding > 0,
    }
