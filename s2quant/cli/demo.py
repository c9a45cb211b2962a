"""`s2quant demo`: the whole job on a small checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from s2quant.cli.common import add_quiet, progress


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("demo", help="the whole job on the bundled checkpoint, on a CPU")
    command.set_defaults(run=_demo)
    command.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where to put everything")
    add_quiet(command)


def _demo(options: argparse.Namespace) -> int:
    from s2quant.demo import run_demo

    with progress(options.quiet) as report:
        rows = run_demo(options.out, report)
    print("\n".join(rows))
    return 0
