# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN001, ANN201, ANN202 (what Triton compiles has no types to write down)
"""What stands between the transformers: embed a column, draw a code, embed the code; one program per row.

Legend: B rows, D width, N codebooks, C semantic candidates and the end, R residual candidates, K frames of random
numbers kept per slot (KEPT), of NOISE numbers each: two of every semantic candidate, then (BEFORE) the residual ones'.

The draw is `s2quant.runtime.sampler`'s: ranks are counted and their probabilities added up; then, of all down to the
last that stays, the one with the largest p / -ln u is drawn. The best 32 are ranked at once (`best`, beside), which is
all that is needed at the usual top_k of 30; where all of them stay, the next ones are taken one by one, so any top_k is
served. Ties go to the lower index. With `How.best_first` off all are taken one by one. Every vector is written three
ways: as it is (float32), as the next linear wants it (times the norm's weight, in its order), and as the sum of its
squares.

Before a draw waits for the kernel before, it reads what no kernel of the frame writes (temperature, top_p, top_k,
whether the end is ignored, random numbers), or only a kernel that comes later and waits itself (`draws`, `positions`,
`first`: the last residual draw; `windows`: the semantic draw). The frame before is no concern: `embed_kernel` is never
launched early, so all of it has ended when a frame begins. Logits, and the hidden vector with its squares, are read
after waiting: kernels that write them may still be at work when this one starts.
"""

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from s2quant.runtime.kernels.best import best_32, last_of, shares_of
from s2quant.runtime.kernels.launch import INTERPRETED, How, begin, early_options
from s2quant.runtime.sampler import RAS_TEMPERATURE, RAS_TOP_P, RAS_WINDOW, SMALLEST_UNIFORM

SEMANTIC_WARPS, RESIDUAL_WARPS = 8, 4  # of the draws' programs
LEAST_BITS = 7  # 2 ** 7 candidates for a warp of a draw, or more; see `draw_arguments`


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
    tl.store(squares + row, tl.sum(x * x))


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
        rows = rows + (audio + (tl.load(column + 1 + i) + i * codebook_size) * D,)  # type: ignore[assignment]
    x = tl.load(text + token * D + d, inside, 0.0).to(tl.float32)
    if (token >= first_semantic) & (token <= last_semantic):
        sums = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(CODEBOOKS):
            sums += tl.load(rows[i] + d, inside, 0.0).to(tl.float32)
        x = _rounded(_rounded(x + _rounded(sums, DEVICE), DEVICE) / root, DEVICE)
    _write_vector(x, d, inside, weight, target, hidden, out, squares, row, D)


@triton.jit
def _wait_of(uniform, SMALLEST: tl.constexpr):
    """Say how long a candidate of probability 1 waits; the first one is drawn."""
    return -tl.log(tl.maximum(uniform, SMALLEST))


@triton.jit
def _score(value, best, waits, temperature):
    """Say how a survivor does in the draw."""
    return tl.exp((value - best) / tl.maximum(temperature, 1e-5)) / waits


@triton.jit
def _up_to(logits, index, low, at):
    """Tell the candidates down to the one of logit `low` at index `at`."""
    return (logits > low) | ((logits == low) & (index <= at))


@triton.jit
def _next(logits, index, low, at):
    """Take the best candidate after the one of logit `low` at index `at`: its logit, its index."""
    return tl.max(tl.where(_up_to(logits, index, low, at), float("-inf"), logits), axis=0, return_indices=True)


@triton.jit
def _winner(logits, index, low, at, best, waits, temperature):
    """Draw among the candidates down to the one of logit `low` at index `at`: its score, its index."""
    score = tl.where(_up_to(logits, index, low, at), _score(logits, best, waits, temperature), -1.0)
    return tl.max(score, axis=0, return_indices=True)


@triton.jit
def _winner_or_end(logits, index, low, at, best, waits, temperature, end, end_waits, end_stays, END: tl.constexpr):
    """Draw among the codes down to the one of logit `low` at index `at` and, where it stays, the end."""
    score, winner = _winner(logits, index, low, at, best, waits, temperature)
    end_score = tl.where(end_stays, _score(end, best, end_waits, temperature), -1.0)
    return tl.where(end_score > score, END, winner)


@triton.jit
def _survives(rank, cumulated, share, most):
    """Say whether a rank stays."""
    return (rank == 0) | ((cumulated <= share) & (rank < most))


@triton.jit
def semantic_kernel(
    logits, uniform, temperature, top_p, top_k, ignore_end, windows, first, draws, columns,
    slow_hidden, slow_squares, slow_norm, slow_eps, embeddings, norm, place, hidden, out, squares,
    num_squares, batch, first_semantic, end_token,
    C: tl.constexpr, BITS: tl.constexpr, BEST: tl.constexpr, KEPT: tl.constexpr, NOISE: tl.constexpr,
    WINDOW: tl.constexpr, COLUMN: tl.constexpr, RAS_T: tl.constexpr, RAS_P: tl.constexpr, SMALLEST: tl.constexpr,
    D: tl.constexpr, D_BLOCK: tl.constexpr, MAX_SQUARES: tl.constexpr, PLACED: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Begin the Fast AR: a program draws the semantic code or the end, with its one swap, and embeds it; another norms
    the hidden vector, which waits for no draw.
    """
    END: tl.constexpr = C - 1
    BLOCK: tl.constexpr = 2**BITS
    row = tl.program_id(0)
    d = tl.max_contiguous(tl.arange(0, D_BLOCK), 1)
    inside = d < D
    weight, target = _next_linear(norm, place, d, inside, PLACED)
    if tl.program_id(1) == 1:
        slow_weight = tl.load(slow_norm + d, inside, 0.0)
        begin(DEVICE)
        places = tl.arange(0, MAX_SQUARES)
        part = tl.load(slow_squares + row * num_squares + places, places < num_squares, 0.0)
        x = tl.load(slow_hidden + row * D + d, inside, 0.0) * (1 / tl.sqrt(tl.sum(part, axis=0) / D + slow_eps))
        x = _rounded(_rounded(x, DEVICE) * slow_weight.to(tl.float32), DEVICE)
        _write_vector(x, d, inside, weight, target, hidden, out, squares, row, D)
    else:
        index = tl.max_contiguous(tl.arange(0, BLOCK), 1)
        noise = uniform + (row * KEPT + tl.load(draws + row) % KEPT) * NOISE
        heat = tl.load(temperature + row)
        most = tl.load(top_k + row)
        share = tl.load(top_p + row)
        ignored = tl.load(ignore_end + row).to(tl.int32) != 0
        is_first = tl.load(first + row).to(tl.int32) != 0
        slots = tl.arange(0, 16)
        recent = tl.load(windows + row * WINDOW + slots, slots < WINDOW, -1)
        later = tl.load(windows + row * WINDOW + slots + 1, slots < WINDOW - 1, 0)
        waits = _wait_of(tl.load(noise + index, index < END, 0.5), SMALLEST)
        end_waits = _wait_of(tl.load(noise + END), SMALLEST)
        hot_noise = tl.load(noise + C + index, index < END, 0.5)
        hot_end_noise = tl.load(noise + C + END)
        begin(DEVICE)
        codes = tl.load(logits + row * C + index, index < END, float("-inf"))
        end = tl.where(ignored, float("-inf"), tl.load(logits + row * C + END))
        if BEST:
            cube = best_32(codes, BITS, DEVICE)
            best = tl.maximum(tl.max(tl.reshape(cube, [32]), axis=0), end)
        else:
            best = tl.maximum(tl.max(codes, axis=0), end)
        largest = best + tl.log(tl.sum(tl.exp(codes - best), axis=0) + tl.exp(end - best))
        rank = 0
        cumulated = 0.0
        normal_low = float("inf")
        normal_at = -1
        normal_end = False
        hot_low = float("inf")
        hot_at = -1
        hot_end = False
        going = True
        code = float("inf")
        which = -1
        end_left = end
        if BEST:
            values, sums, order = shares_of(cube, largest, DEVICE)
            behind = values < end
            end_rank = tl.sum(tl.where(behind, 0, 1), axis=0)
            end_share = tl.exp(end - largest)
            end_sum = tl.sum(tl.where(behind, 0.0, tl.exp(values - largest)), axis=0) + end_share
            sums += tl.where(behind, end_share, 0.0)
            order += behind.to(tl.int32)
            known = (end_rank < 32) & (end > float("-inf"))
            exists = values > float("-inf")
            normal_end = known & _survives(end_rank, end_sum, share, most)
            hot_end = known & _survives(end_rank, end_sum, RAS_P, most)
            normal_stay = exists & _survives(order, sums, share, most)
            hot_stay = exists & _survives(order, sums, RAS_P, most)
            normal_low, normal_at, normal_whole = last_of(codes, index, values, normal_stay, BLOCK)
            hot_low, hot_at, hot_whole = last_of(codes, index, values, hot_stay, BLOCK)
            going = normal_whole | hot_whole
            code = tl.where(normal_whole, normal_low, hot_low)
            which = tl.where(normal_whole, normal_at, hot_at)
            end_left = tl.where(known, float("-inf"), end)
            cumulated = tl.max(sums, axis=0)
            rank = 32 + known.to(tl.int32)
        while going:
            next_code, its_index = _next(codes, index, code, which)
            is_end = end_left > next_code
            is_code = end_left <= next_code
            value = tl.maximum(next_code, end_left)
            cumulated += tl.exp(value - largest)
            normal_stays = _survives(rank, cumulated, share, most)
            hot_stays = _survives(rank, cumulated, RAS_P, most)
            normal_low = tl.where(normal_stays & is_code, value, normal_low)
            normal_at = tl.where(normal_stays & is_code, its_index, normal_at)
            normal_end = normal_end | (normal_stays & is_end)
            hot_low = tl.where(hot_stays & is_code, value, hot_low)
            hot_at = tl.where(hot_stays & is_code, its_index, hot_at)
            hot_end = hot_end | (hot_stays & is_end)
            code = tl.where(is_code, next_code, code)
            which = tl.where(is_code, its_index, which)
            end_left = tl.where(is_end, float("-inf"), end_left)
            rank += 1
            going = (normal_stays | hot_stays) & (rank < C) & (value > float("-inf"))
        drawn = _winner_or_end(codes, index, normal_low, normal_at, best, waits, heat, end, end_waits, normal_end, END)
        found = tl.sum(tl.where((slots < WINDOW) & (recent == drawn), 1, 0), axis=0)
        if (found > 0) & (drawn < END) & (is_first == 0):
            waits = _wait_of(hot_noise, SMALLEST)
            end_waits = _wait_of(hot_end_noise, SMALLEST)
            drawn = _winner_or_end(codes, index, hot_low, hot_at, best, waits, RAS_T, end, end_waits, hot_end, END)
        kept = tl.where(slots == WINDOW - 1, drawn, later)  # all of the window was read before the first winner
        tl.store(windows + row * WINDOW + slots, tl.where(is_first, recent, kept), slots < WINDOW)
        row_of = tl.where(drawn == END, 0, drawn).to(tl.int64)
        tl.store(columns + row * COLUMN, tl.where(drawn == END, end_token, drawn + first_semantic).to(tl.int64))
        tl.store(columns + row * COLUMN + 1, row_of)
        x = tl.load(embeddings + row_of * D + d, inside, 0.0).to(tl.float32)
        _write_vector(x, d, inside, weight, target, hidden, out, squares, batch + row, D)


@triton.jit
def residual_kernel(
    logits, uniform, temperature, top_p, top_k, first, draws, positions, columns,
    embeddings, norm, place, hidden, out, squares, number,
    R: tl.constexpr, BITS: tl.constexpr, BEST: tl.constexpr, KEPT: tl.constexpr, NOISE: tl.constexpr,
    BEFORE: tl.constexpr, CODEBOOKS: tl.constexpr, SMALLEST: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr,
    LAST: tl.constexpr, PLACED: tl.constexpr, DEVICE: tl.constexpr,
):  # fmt: skip
    """Draw a residual code; feed it back, or end the frame."""
    BLOCK: tl.constexpr = 2**BITS
    row = tl.program_id(0)
    index = tl.max_contiguous(tl.arange(0, BLOCK), 1)
    d = tl.max_contiguous(tl.arange(0, D_BLOCK), 1)  # one by one, as candidates: no trip through shared memory
    inside = d < D
    drawn = tl.load(draws + row)
    noise = uniform + (row * KEPT + drawn % KEPT) * NOISE + BEFORE + (number - 1) * R
    heat = tl.load(temperature + row)
    most = tl.load(top_k + row)
    share = tl.load(top_p + row)
    weight = d
    target = d
    position = drawn
    if LAST:
        position = tl.load(positions + row)
    else:
        weight, target = _next_linear(norm, place, d, inside, PLACED)
    waits = _wait_of(tl.load(noise + index, index < R, 0.5), SMALLEST)
    begin(DEVICE)
    all_logits = tl.load(logits + row * R + index, index < R, float("-inf"))
    if BEST:
        cube = best_32(all_logits, BITS, DEVICE)
        best = tl.max(tl.reshape(cube, [32]), axis=0)
    else:
        best = tl.max(all_logits, axis=0)
    largest = best + tl.log(tl.sum(tl.exp(all_logits - best), axis=0))
    rank = 0
    cumulated = 0.0
    low = best
    at = 0
    going = True
    value = float("inf")
    which = -1
    if BEST:
        values, sums, order = shares_of(cube, largest, DEVICE)
        stay = (values > float("-inf")) & _survives(order, sums, share, most)
        low, at, going = last_of(all_logits, index, values, stay, BLOCK)
        value = low
        which = at
        cumulated = tl.max(sums, axis=0)
        rank = 32
    while going:
        value, which = _next(all_logits, index, value, which)
        cumulated += tl.exp(value - largest)
        stays = _survives(rank, cumulated, share, most)
        low = tl.where(stays, value, low)
        at = tl.where(stays, which, at)
        rank += 1
        going = stays & (rank < R) & (value > float("-inf"))
    _, code = _winner(all_logits, index, low, at, best, waits, heat)
    tl.store(columns + row * (1 + CODEBOOKS) + 1 + number, tl.cast(code, tl.int64))
    if LAST:
        tl.store(positions + row, position + 1)
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


def draw_arguments(candidates: int, how: How, num_warps: int) -> dict[str, Any]:
    """Give the compile-time arguments of a draw.

    The best 32 of few candidates would be kept twice in some lanes or warps of the middle. Triton 3.6 then reduces them
    wrongly: its lanes disagree, and a branch on what they found ends in an illegal instruction. With LEAST_BITS
    candidates for each warp, most of them none, only the last lanes and all warps hold copies.

    Args:
        candidates: Codes that may be drawn; the end is none.
        how: How to draw.
        num_warps: Warps of the program, a power of two.

    Returns:
        The kernel's constants.
    """
    bits = max(LEAST_BITS + num_warps.bit_length() - 1, (candidates - 1).bit_length())
    return {"BITS": bits, "BEST": how.best_first, "SMALLEST": SMALLEST_UNIFORM}


def swap_arguments() -> dict[str, Any]:
    """Give the compile-time arguments of the semantic draw's one swap.

    Returns:
        The kernel's constants.
    """
    return {"WINDOW": RAS_WINDOW, "RAS_T": RAS_TEMPERATURE, "RAS_P": RAS_TOP_P}


def options(early: bool, num_warps: int) -> dict[str, Any]:
    """Give a launch's options.

    Args:
        early: Whether the kernel may start before the one before it has ended.
        num_warps: Its warps.

    Returns:
        The options.
    """
    return {"num_warps": num_warps, **early_options(early)}
