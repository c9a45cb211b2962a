# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201, ANN202 (what Triton compiles has no types to write down)
"""What stands between the transformers: embed a column, draw a code, embed the code; one program per row.

Legend: B rows, D width, N codebooks, C semantic candidates and the end, R residual candidates, K frames of random
numbers kept per slot.

The draw is `s2quant.runtime.sampler`'s, rank by rank: take the best candidate left, stop where the cumulative
probability or the rank says so; then, of all down to the last that stayed, the one with the largest p / -ln u. So only
the candidates that survive cost time, any top_k is served, and ties go to the lower index. Every vector is written
three ways: as it is (float32), as the next linear wants it (times the norm's weight, in its order), and as the sum of
its squares.
"""

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from s2quant.runtime.kernels.launch import INTERPRETED, begin, early_options
from s2quant.runtime.sampler import RAS_TEMPERATURE, RAS_TOP_P, RAS_WINDOW, SMALLEST_UNIFORM


@triton.jit
def _rounded(x, DEVICE: tl.constexpr):
    """Round float32 to bf16 and back."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _next_linear(norm, place, d, inside, PLACED: tl.constexpr):
    """Read what the next linear wants: the weight of its norm, and where it wants each element."""
    target = d
    if PLACED:
        target = tl.load(place + d, inside, 0)
    return tl.load(norm + d, inside, 0.0), target


@triton.jit
def _write_vector(x, d, inside, norm, target, hidden, out, squares, row, D):
    """Write a row of the hidden vectors, and of the next linear's input."""
    x = tl.where(inside, x, 0.0)
    tl.store(hidden + row * D + d, x, inside)
    y = x * norm.to(tl.float32)
    tl.store(out + row * D + target, y.to(out.dtype.element_ty), inside)
    tl.store(squares + row, tl.sum(x * x, axis=0))


@triton.jit
def embed_kernel(
    columns, text, audio, norm, place, hidden, out, squares, first_semantic, last_semantic, codebook_size, root,
    D: tl.constexpr, BLOCK: tl.constexpr, CODEBOOKS: tl.constexpr, PLACED: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Look up a column: the token, and at a frame its codes, as `SlowAR.embed` rounds them."""
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    weight, target = _next_linear(norm, place, d, inside, PLACED)
    begin(DEVICE)
    column = columns + row * (1 + CODEBOOKS)
    token = tl.load(column)
    rows = ()  # all codes before the first row of the table: loads keep their order, and a row waits for its code
    for i in tl.static_range(CODEBOOKS):
        rows = rows + (audio + (tl.load(column + 1 + i) + i * codebook_size) * D,)
    x = tl.load(text + token * D + d, inside, 0.0).to(tl.float32)
    if (token >= first_semantic) & (token <= last_semantic):
        sums = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(CODEBOOKS):
            sums += tl.load(rows[i] + d, inside, 0.0).to(tl.float32)
        x = _rounded(_rounded(x + _rounded(sums, DEVICE), DEVICE) / root, DEVICE)
    _write_vector(x, d, inside, weight, target, hidden, out, squares, row, D)


@triton.jit
def _next(left, index, cumulated, largest):
    """Take the best candidate left: its logit, its index, the probability up to it."""
    value, which = tl.max(left, axis=0, return_indices=True)
    return value, which, cumulated + tl.exp(value - largest), tl.where(index == which, float("-inf"), left)


@triton.jit
def _score(value, best, uniform, temperature, SMALLEST: tl.constexpr):
    """Say how a survivor does in the draw."""
    return tl.exp((value - best) / tl.maximum(temperature, 1e-5)) / -tl.log(tl.maximum(uniform, SMALLEST))


@triton.jit
def _winner(logits, index, low, at, best, uniform, temperature, SMALLEST: tl.constexpr):
    """Draw among the candidates down to the one of logit `low` at index `at`."""
    stays = (logits > low) | ((logits == low) & (index <= at))
    score = tl.where(stays, _score(logits, best, uniform, temperature, SMALLEST), -1.0)
    _, winner = tl.max(score, axis=0, return_indices=True)
    return winner


@triton.jit
def _log_sum_exp(logits):
    """Log of the sum of exponentials, and the largest logit."""
    best = tl.max(logits, axis=0)
    return best + tl.log(tl.sum(tl.exp(logits - best), axis=0)), best


@triton.jit
def semantic_kernel(
    logits, uniform, temperature, top_p, top_k, ignore_end, windows, first, draws, columns,
    slow_hidden, slow_squares, slow_norm, slow_eps, embeddings, norm, place, hidden, out, squares,
    num_squares, batch, first_semantic, end_token,
    C: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr, WINDOW: tl.constexpr, COLUMN: tl.constexpr,
    RAS_T: tl.constexpr, RAS_P: tl.constexpr, SMALLEST: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr,
    MAX_SQUARES: tl.constexpr, PLACED: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Draw the semantic code or the end, with its one swap; begin the Fast AR with the hidden vector and the code."""
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    d = tl.arange(0, D_BLOCK)
    inside = d < D
    weight, target = _next_linear(norm, place, d, inside, PLACED)
    slow_weight = tl.load(slow_norm + d, inside, 0.0)
    begin(DEVICE)
    all_logits = tl.load(logits + row * C + index, index < C, float("-inf"))
    is_end = (index == C - 1) & (tl.load(ignore_end + row).to(tl.int32) != 0)
    all_logits = tl.where(is_end, float("-inf"), all_logits)
    left = all_logits
    largest, best = _log_sum_exp(left)
    noise = uniform + (row * KEPT + tl.load(draws + row) % KEPT) * (2 * C) + index
    normal_noise = tl.load(noise, index < C, 0.5)
    hot_noise = tl.load(noise + C, index < C, 0.5)
    heat = tl.load(temperature + row)
    most = tl.load(top_k + row)
    share = tl.load(top_p + row)
    rank = 0
    cumulated = 0.0
    normal_low = best
    normal_at = 0
    hot_low = best
    hot_at = 0
    going = True
    while going:
        value, which, cumulated, left = _next(left, index, cumulated, largest)
        normal_stays = (rank == 0) | ((cumulated <= share) & (rank < most))
        hot_stays = (rank == 0) | ((cumulated <= RAS_P) & (rank < most))
        normal_low = tl.where(normal_stays, value, normal_low)
        normal_at = tl.where(normal_stays, which, normal_at)
        hot_low = tl.where(hot_stays, value, hot_low)
        hot_at = tl.where(hot_stays, which, hot_at)
        rank += 1
        going = (normal_stays | hot_stays) & (rank < C) & (value > float("-inf"))
    normal = _winner(all_logits, index, normal_low, normal_at, best, normal_noise, heat, SMALLEST)
    hot = _winner(all_logits, index, hot_low, hot_at, best, hot_noise, RAS_T, SMALLEST)
    slots = tl.arange(0, 16)
    recent = tl.load(windows + row * WINDOW + slots, slots < WINDOW, -1)
    later = tl.load(windows + row * WINDOW + slots + 1, slots < WINDOW - 1, 0)
    is_first = tl.load(first + row).to(tl.int32) != 0
    found = tl.sum(tl.where((slots < WINDOW) & (recent == normal), 1, 0), axis=0)
    repeats = (found > 0) & (normal < C - 1) & (is_first == 0)
    drawn = tl.where(repeats, hot, normal)
    kept = tl.where(slots == WINDOW - 1, drawn, later)
    tl.debug_barrier()
    tl.store(windows + row * WINDOW + slots, tl.where(is_first, recent, kept), slots < WINDOW)
    code = tl.where(drawn == C - 1, 0, drawn).to(tl.int64)
    tl.store(columns + row * COLUMN, tl.where(drawn == C - 1, end_token, drawn + first_semantic).to(tl.int64))
    tl.store(columns + row * COLUMN + 1, code)
    places = tl.arange(0, MAX_SQUARES)
    total = tl.sum(tl.load(slow_squares + row * num_squares + places, places < num_squares, 0.0), axis=0)
    x = tl.load(slow_hidden + row * D + d, inside, 0.0) * (1 / tl.sqrt(total / D + slow_eps))
    x = _rounded(_rounded(x, DEVICE) * slow_weight.to(tl.float32), DEVICE)
    _write_vector(x, d, inside, weight, target, hidden, out, squares, row, D)
    x = tl.load(embeddings + code * D + d, inside, 0.0).to(tl.float32)
    _write_vector(x, d, inside, weight, target, hidden, out, squares, batch + row, D)


@triton.jit
def residual_kernel(
    logits, uniform, temperature, top_p, top_k, first, draws, positions, columns,
    embeddings, norm, place, hidden, out, squares, number,
    R: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr, CODEBOOKS: tl.constexpr,
    SMALLEST: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, LAST: tl.constexpr, PLACED: tl.constexpr,
    DEVICE: tl.constexpr,
):  # fmt: skip
    """Draw a residual code; feed it back, or end the frame."""
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    d = tl.arange(0, D_BLOCK)
    inside = d < D
    weight, target = _next_linear(norm, place, d, inside, PLACED)
    begin(DEVICE)
    all_logits = tl.load(logits + row * R + index, index < R, float("-inf"))
    left = all_logits
    largest, best = _log_sum_exp(left)
    drawn = tl.load(draws + row)
    noise = uniform + ((row * KEPT + drawn % KEPT) * (CODEBOOKS - 1) + number - 1) * R + index
    its_noise = tl.load(noise, index < R, 0.5)
    heat = tl.load(temperature + row)
    most = tl.load(top_k + row)
    share = tl.load(top_p + row)
    rank = 0
    cumulated = 0.0
    low = best
    at = 0
    going = True
    while going:
        value, which, cumulated, left = _next(left, index, cumulated, largest)
        stays = (rank == 0) | ((cumulated <= share) & (rank < most))
        low = tl.where(stays, value, low)
        at = tl.where(stays, which, at)
        rank += 1
        going = stays & (rank < R) & (value > float("-inf"))
    code = _winner(all_logits, index, low, at, best, its_noise, heat, SMALLEST)
    tl.store(columns + row * (1 + CODEBOOKS) + 1 + number, tl.cast(code, tl.int64))
    if LAST:
        tl.store(positions + row, tl.load(positions + row) + 1)
        tl.store(draws + row, drawn + 1)
        tl.store(first + row, 0)
    else:
        x = tl.load(embeddings + tl.cast(code, tl.int64) * D + d, inside, 0.0).to(tl.float32)
        _write_vector(x, d, inside, weight, target, hidden, out, squares, row, D)


def vector_arguments(dim: int, place: Tensor | None) -> dict[str, Any]:
    """Give the compile-time arguments of whatever writes a hidden vector.

    Args:
        dim: D.
        place: int32 [D], where the next linear wants each element; None: in order.

    Returns:
        The kernel's constants, but the block's size.
    """
    return {"D": dim, "PLACED": place is not None, "DEVICE": not INTERPRETED}


def draw_arguments() -> dict[str, Any]:
    """Give the sampler's constants.

    Returns:
        The kernel's constants of the semantic draw.
    """
    return {"WINDOW": RAS_WINDOW, "RAS_T": RAS_TEMPERATURE, "RAS_P": RAS_TOP_P, "SMALLEST": SMALLEST_UNIFORM}


def options(early: bool, num_warps: int) -> dict[str, Any]:
    """Give a launch's options.

    Args:
        early: Whether the kernel may start before the one before it has ended.
        num_warps: Its warps.

    Returns:
        The options.
    """
    return {"num_warps": num_warps, **early_options(early)}
