"""What commands share: the progress bar and the words that several know."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from s2quant.errors import UserError

DTYPES = ("bfloat16", "float32")  # see s2quant.runtime.load, which imports torch
DECODERS = ("auto", "fast", "plain")  # see s2quant.runtime.speech
LINEARS = ("auto", "reference", "dense", "int4", "int8", "triton")  # see s2quant.runtime.linears, which imports torch


def add_decoder(command: argparse.ArgumentParser) -> None:
    """Add `--decoder` to a command."""
    command.add_argument(
        "--decoder", choices=DECODERS, default="auto",
        help="fast: the frame as one graph, plain: operation by operation; auto: fast on a GPU",
    )  # fmt: skip


def add_quiet(command: argparse.ArgumentParser) -> None:
    """Add `--quiet` to a command."""
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def add_voice_cache(command: argparse.ArgumentParser) -> None:
    """Add `--voice-cache` and `--no-voice-cache` to a command."""
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--voice-cache", type=Path, metavar="DIR",
        help="where the codes of recordings are kept; else s2quant in XDG_CACHE_HOME or the platform's cache folder",
    )  # fmt: skip
    where.add_argument("--no-voice-cache", action="store_true", help="encode recordings anew and keep nothing")


def add_memory_limit(command: argparse.ArgumentParser) -> None:
    """Add `--memory-limit` and `--low-memory` to a command."""
    command.add_argument(
        "--memory-limit", type=float, metavar="GB", help="of the GPU's memory, in 10^9 bytes, take no more than this"
    )
    command.add_argument(
        "--low-memory", action="store_true", help="keep what only encodes recordings, half of the codec, on the host"
    )


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Read whole numbers between commas.

    Args:
        option: What they were given to, such as --bits.
        text: Such as "4,8".

    Returns:
        The numbers.

    Raises:
        UserError: Something in it is no number.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(
            f"{option} {text!r}", "whole numbers with commas between them", f"for example {option} 4,8"
        ) from error


def add_slots(command: argparse.ArgumentParser) -> None:
    """Add --slots, of calibration speech.

    Args:
        command: The command's parser.
    """
    command.add_argument(
        "--slots", type=int, metavar="N",
        help="calibration lines spoken at a time (up to 64, as the GPU has memory and the run lines for; on a CPU 8)",
    )  # fmt: skip


def voice_cache(options: argparse.Namespace) -> Path | None:
    """Give the folder that `add_voice_cache`'s words name, or None."""
    from s2quant.runtime.voices import default_voice_folder

    if options.no_voice_cache:
        return None
    return options.voice_cache if options.voice_cache is not None else default_voice_folder()


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show phases with a bar and the time left on stderr; nothing when quiet or not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        total_of_bar: int | None = None

        def report(phase: str, done: int, total: int) -> None:
            nonlocal total_of_bar
            if total != total_of_bar:
                bar.reset(task, total=total)
                total_of_bar = total
            bar.update(task, completed=done, description=phase)

        yield report
