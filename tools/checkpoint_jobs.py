"""What the tools that make, hear and compare many checkpoints share: their clock, their checkpoints, their words.

Options are called as those of `s2quant quantize` and `s2quant eval`, where they mean the same.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from s2quant.cli.common import numbers
from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
from s2quant.files import partial_folder
from s2quant.runtime.load import DTYPES


def say(phase: str, done: int = 0, total: int = 0) -> None:
    """Tell of progress, a line per phase and per tenth of it."""
    if total < 2 or done in (1, total) or done * 10 // total != (done - 1) * 10 // total:
        print(f"{datetime.now(UTC):%H:%M:%S} {phase}" + (f" {done}/{total}" if total > 1 else ""), flush=True)


def quantize(wanted: QuantizeOptions) -> Path:
    """Make a checkpoint, or take the one that is there if it was made of the same."""
    say(f"checkpoint {wanted.out.name}")
    quantize_checkpoint(replace(wanted, resume=wanted.out.exists() or partial_folder(wanted.out).exists()))
    return wanted.out


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, --device, --dtype, --seeds, --sequences (num_sequences) and --slots (num_slots)."""
    parser.add_argument("--model", type=Path, required=True, help="the bf16 checkpoint folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--seeds", type=partial(numbers, "--seeds"), help="instead of the suite's")
    parser.add_argument(
        "--sequences", type=int, dest="num_sequences", help="calibration sequences, instead of the recipe's number"
    )
    parser.add_argument("--slots", type=int, default=8, dest="num_slots", help="utterances in progress at a time")
