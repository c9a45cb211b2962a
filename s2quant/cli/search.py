"""`s2quant search`: a recipe within a size or a damage, from what `s2quant sensitivity` measured."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2quant.cli.common import add_quiet, numbers, progress
from s2quant.errors import UserError

if TYPE_CHECKING:
    from s2quant.search.check import Checked
    from s2quant.search.evidence import Found


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("search", help="find a recipe within a size or a damage")
    command.set_defaults(run=_search)
    command.add_argument("folder", type=Path, metavar="SENSITIVITY_DIR", help="what `s2quant sensitivity` made")
    goal = command.add_mutually_exclusive_group()
    goal.add_argument("--budget", metavar="BYTES", help="the most tensor bytes, or a recipe: those of its plan")
    goal.add_argument("--target-kl", type=float, metavar="X", help="the most damage, nats per frame")
    command.add_argument("--out", type=Path, metavar="RECIPE", help="the recipe to write, a .yaml file")
    command.add_argument("--bits", metavar="A,B", help="widths to choose from (4,8, as measured); bf16 always is one")
    command.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN",
        help="linears that stay in bf16, e.g. 'audio_decoder.**'; repeatable",
    )  # fmt: skip
    command.add_argument(
        "--model", type=Path, metavar="DIR", help="the bf16 checkpoint, to measure the find as a whole"
    )
    command.add_argument(
        "--check", type=Path, action="append", default=[], metavar="DIR",
        help="a quantized folder, to measure what it really does against the prediction (with --model); repeatable",
    )  # fmt: skip
    command.add_argument("--device", default="cpu", help="where to measure: cpu, cuda or cuda:N")
    command.add_argument("--source", type=Path, metavar="FILE", help="the calibration text, if it has moved")
    command.add_argument("--curve", action="store_true", help="size against damage, into SENSITIVITY_DIR's report")
    command.add_argument("--json", action="store_true", help="print JSON")
    add_quiet(command)


def _search(options: argparse.Namespace) -> int:
    bits = None if options.bits is None else numbers("--bits", options.bits)
    if options.target_kl is not None and not 0 <= options.target_kl < float("inf"):
        raise UserError(f"--target-kl {options.target_kl}", "nats per frame, 0 or more", "correct it")
    from s2quant.search.find import SearchOptions, search

    with progress(options.quiet) as report:
        found, checked = search(
            SearchOptions(
                folder=options.folder,
                out=options.out,
                budget=_budget(options),
                target_kl=options.target_kl,
                bits=bits,
                keep=tuple(options.keep),
                model=options.model,
                device=options.device,
                source=options.source,
                curve=options.curve,
                check=tuple(options.check),
            ),
            report,
        )
    if options.json:
        facts = {"out": str(options.out), **dataclasses.asdict(found)} if found else {"out": None}
        print(json.dumps(facts | {"checked": [dataclasses.asdict(one) for one in checked]}))
    else:
        print("\n".join(_lines(options, found, checked)))
    return 0


def _budget(options: argparse.Namespace) -> int | None:
    """Read bytes, with or without separators, or take those of a recipe's plan."""
    text: str | None = options.budget
    if text is None:
        return None
    digits = text.replace(",", "").replace("_", "")
    if digits.isascii() and digits.isdigit():
        return int(digits)
    if not Path(text).is_file():
        raise UserError(f"--budget {text!r}", "a number of bytes, or a recipe file", "for example --budget 4238063616")
    from s2quant.search.find import plan_bytes

    return plan_bytes(Path(text), options.folder)


def _lines(options: argparse.Namespace, found: Found | None, checked: Sequence[Checked]) -> list[str]:
    lines = []
    if found is not None:
        share = 100 * found.num_bytes / found.dense_bytes
        bound = (
            f"no choice allowed is smaller than {found.bound:,.0f} bytes"
            if options.target_kl is not None
            else f"no choice allowed is below {found.bound:.6g} nats per frame"
        )
        lines.append(f"{options.out}: {found.num_bytes:,} tensor bytes, {share:.1f} % of bf16")
        lines.append(f"single damages add up to {found.kl:.4g} nats per frame; {bound}")
        if found.kl_together is not None:
            lines.append(f"measured as a whole: {found.kl_together:.4g} nats per frame")
    for one in checked:
        predicted = "not known" if one.kl is None else f"{one.kl:.4g}"
        real = "not finite" if one.kl_together is None else f"{one.kl_together:.4g}"
        lines.append(f"{one.name}: {one.num_bytes:,} tensor bytes, predicted {predicted}, really {real} nats per frame")
        if one.num_seen:
            lines.append(f"  flattered: it was calibrated on {one.num_seen} of the {one.num_held} held-out lines")
    if options.curve:
        lines.append(f"curve: {options.folder / 'report.html'}, curve.csv, curve.svg")
    return lines
