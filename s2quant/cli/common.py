"""What commands share: the progress bar and the words that several know."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def add_quiet(command: argparse.ArgumentParser) -> None:
    """Add `--quiet` to a command."""
    command.add_argument("--quiet", action="store_true", help="no progress bar")


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
