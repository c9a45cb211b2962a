# mypy: disallow-untyped-decorators=false, disallow-untyped-defs=false, disallow-incomplete-defs=false
# ruff: noqa: ANN201 (what Triton compiles has no types to write down)
"""What all kernels share: starting before the kernel before has ended, and waiting for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@dataclass(frozen=True, kw_only=True)
class How:
    """How kernels are launched; each part can be switched off, to measure what it is worth.

    Args:
        early: Whether a kernel may start before the one before it has ended (programmatic dependent launch).
        early_dense: The most rows of x for which bf16 products do, too; 0: they never do.
        live_rows: Whether up to 8 rows of x are read as far as they exist, not all eight.
        holds: Whether gated products of one row of x read a warp's inputs of it at once, into shared memory.
        loads_first: Whether what follows a product is asked for before it, constants even before waiting.
        keys_first: Whether a long context's first keys and values are asked for before waiting, where rows are few.
        narrow: Whether the rule of shapes has at most 8 warps, so that two programs share an SM and the next kernel's
            find room beside them.
        flat: Whether what follows a product has one element per thread, so that warps meet at one barrier, not a dozen;
            and whether a short context's attention has a warp per head.
        many_rows: Whether products of many rows have a kernel of their own (`s2quant.runtime.kernels.choice`).
        shared_shifts: Whether products of many rows unpack several codes of a word with one shift, to the same numbers;
            used, and measured: 9.33 ms with, 9.59 without in a W4A16 frame at batch 64 on an H100.
        attention_adds: Whether attention adds up a wqkv product that was split, in place of a launch of its own.
        long_stretches: Whether programs of the attention have longer stretches of the context where rows are many.
        best_first: Whether a draw takes the best 32 candidates at once, not one after the other.
        attention_warps: Warps of the attention over a long context.
        attention_stages: Blocks of keys and values of it that are under way, with the one that is attended to; one
            where a program has no other. Its shared memory grows with them, and where that is scarce the next kernel
            does not start early.
    """

    early: bool = False
    early_dense: int = 8
    live_rows: bool = True
    holds: bool = True
    loads_first: bool = True
    keys_first: bool = True
    narrow: bool = True
    flat: bool = True
    many_rows: bool = True
    shared_shifts: bool = True
    attention_adds: bool = True
    long_stretches: bool = True
    best_first: bool = True
    attention_warps: int = 2
    attention_stages: int = 2


# What is used, as measured in whole frames on an H200 (reports/2026-11-27-frames). Early starts win 0.1 to 0.75 ms,
# most of it those of bf16 products of up to 8 rows; with 16 rows and more these lose up to 1.3. The attention's four
# warps win 0.05 ms at 64 slots and lose 0.11 at 32.
MEASURED = How(early=True)
MEASURED_MANY = How(early=True, attention_warps=4)
FEW_SLOTS = 32  # up to which the attention has two warps


def measured(num_slots: int) -> How:
    """Say how a frame's kernels are launched.

    Args:
        num_slots: Slots of the frame.

    Returns:
        What was fastest, for packed models and others alike.
    """
    return MEASURED if num_slots <= FEW_SLOTS else MEASURED_MANY


PATIENT = How()  # for a single launch: nothing before it is known to begin early


@triton.jit
def announce(DEVICE: tl.constexpr):
    """Let the next kernel start."""
    if DEVICE:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r,~{memory}", [],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def wait(DEVICE: tl.constexpr):
    """Wait for the kernel before: what it wrote may be read from here on."""
    if DEVICE:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def begin(DEVICE: tl.constexpr):
    """Let the next kernel start, then wait for the one before: what it wrote may be read from here on."""
    if DEVICE:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.u32 $0, 0;", "=r,~{memory}", [],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


INTERPRETED = not isinstance(begin, triton.JITFunction)  # TRITON_INTERPRET=1 when triton was imported


def _knows_early() -> bool:
    from triton.backends.nvidia.compiler import CUDAOptions  # type: ignore[import-untyped]

    return "launch_pdl" in CUDAOptions.__dataclass_fields__


KNOWS_EARLY = not INTERPRETED and _knows_early()  # else kernels start one after the other


def early_options(early: bool) -> dict[str, Any]:
    """Give the launch options of a kernel that may start before the one before it has ended.

    Args:
        early: Whether it may.

    Returns:
        Options of a launch; none where Triton does not know how.
    """
    return {"launch_pdl": True} if early and KNOWS_EARLY else {}


_COMPILED_ONLY: ContextVar[bool] = ContextVar("_COMPILED_ONLY", default=False)  # of this thread


def start(kernel: Any, grid: tuple[int, ...], launch: bool = True) -> Callable[..., Any]:
    """Give what launches a kernel; within `compile_together`, what only compiles it.

    Args:
        kernel: A kernel of Triton.
        grid: Its programs.
        launch: Whether to launch it at all, not only to compile it.

    Returns:
        To be called with the kernel's arguments and options.
    """
    if launch and not _COMPILED_ONLY.get():
        found: Callable[..., Any] = kernel[grid]
        return found
    return lambda *values, **options: kernel.warmup(*values, grid=grid, **options)


def compile_together(work: Callable[[], object]) -> None:
    """Compile the kernels that something launches side by side, in threads; nothing is launched.

    One after the other, the kernels of a frame take 8 s and more of one core. What is compiled already costs little.
    Where Triton does not know how (or interprets), nothing is done: kernels are then compiled as they are launched.
    What fails here is done once more, and then says so, when it is launched.

    Args:
        work: Launches by `start` and waits for nothing that a kernel computes.
    """
    if INTERPRETED:
        return
    try:
        from triton.runtime._async_compile import AsyncCompileMode  # type: ignore[import-untyped]
    except ImportError:
        return
    token = _COMPILED_ONLY.set(True)
    try:
        with (
            contextlib.suppress(Exception),
            ThreadPoolExecutor(os.cpu_count()) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            work()
    finally:
        _COMPILED_ONLY.reset(token)
