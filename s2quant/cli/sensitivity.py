"""`s2quant sensitivity`: what each linear at each bit width does to speech."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2quant.cli.common import DTYPES, add_quiet, add_slots, numbers, progress
from s2quant.errors import UserError


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("sensitivity", help="measure what each linear at each bit width does to speech")
    command.set_defaults(run=_sensitivity)
    command.add_argument("recipe", type=Path, help="a recipe: settings, calibration, and what it is compared with")
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="the bf16 checkpoint folder")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    command.add_argument("--bits", default="2,3,4,8", metavar="A,B", help="bit widths to measure (2,3,4,8)")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; the whole bf16 model must fit")
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="in which the damage is measured (float32: in bfloat16 rounding hides that of 8 bits)",
    )  # fmt: skip
    command.add_argument(
        "--sequences", type=int, default=40, metavar="N", help="calibration lines that are spoken (40)"
    )
    command.add_argument(
        "--held", type=int, default=8, metavar="N",
        help="of these, how many are held out of the Hessians to measure the damage (8)",
    )  # fmt: skip
    command.add_argument("--calibration", type=Path, metavar="FILE", help="a calibration set to use, or to make")
    add_slots(command)
    command.add_argument(
        "--no-weights", action="store_true",
        help="do not keep the quantized candidates, about as large as the model; search --model needs them",
    )  # fmt: skip
    command.add_argument("--resume", action="store_true", help="go on with a stopped run")
    command.add_argument("--json", action="store_true", help="print JSON")
    add_quiet(command)


def _sensitivity(options: argparse.Namespace) -> int:
    if options.slots is not None and options.slots < 1:
        raise UserError(f"--slots {options.slots}", "a positive number", "correct it")
    bits = numbers("--bits", options.bits)
    from s2quant.search.sensitivity import SensitivityOptions, measure_sensitivity

    with progress(options.quiet) as report:
        table = measure_sensitivity(
            SensitivityOptions(
                recipe=options.recipe,
                model=options.model,
                out=options.out,
                device=options.device,
                dtype=options.dtype,
                bits=bits,
                num_sequences=options.sequences,
                num_held=options.held,
                calibration=options.calibration,
                resume=options.resume,
                eval_folder=Path(__file__).resolve().parents[2] / "eval",  # beside the package, in a checkout
                num_slots=options.slots,
                keep_weights=not options.no_weights,
            ),
            report,
        )
    if options.json:
        print(json.dumps({"out": str(options.out), "units": len(table["units"]), "together": table["together"]}))
    else:
        print(_text(options.out, table))
    return 0


def _text(out: Path, table: Mapping[str, Any]) -> str:
    from s2quant.files import read_json

    lines = []
    for row in table["together"]:
        sums, whole = (_nats(row[key]) for key in ("kl_sum", "kl"))
        lines.append(f"{row['name']:20} single damages add up to {sums}, as a whole {whole} nats per frame")
    if table["floor"] is not None:
        lines.append(f"{'bfloat16 arithmetic':20} alone does {_nats(table['floor']['kl'])}")
    took = read_json(out / "manifest.json").get("process")
    if took is not None:  # a folder that an earlier version finished has none
        peaks = [peak for peak in took["peak_device_bytes"].values() if peak is not None]
        memory = f", {max(peaks) / 1e9:.1f} GB of GPU memory" if peaks else ""
        lines.append(f"{took['num_measured']} candidates measured, {sum(took['seconds'].values()):.0f} s{memory}")
    return "\n".join([*lines, f"{out}: {len(table['units'])} units measured; {out / 'report.html'}"])


def _nats(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
