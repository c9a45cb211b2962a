"""`s2quant quantize`: a checkpoint by a recipe, or the plan of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2quant.cli.common import add_quiet, add_slots, progress
from s2quant.cli.processes import add_processes
from s2quant.errors import S2QuantError, UserError

if TYPE_CHECKING:
    from s2quant.quantize.plan import Plan


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("quantize", help="quantize a checkpoint by a recipe")
    command.set_defaults(run=_quantize)
    command.add_argument("recipe", type=Path, help="a recipe, e.g. recipes/s2-pro-w4a16.yaml")
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="the bf16 checkpoint folder")
    command.add_argument("--out", type=Path, metavar="DIR", help="the folder to make (not needed with --plan)")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    command.add_argument("--calibration", type=Path, metavar="FILE", help="a calibration set to use, or to make")
    command.add_argument("--sequences", type=int, metavar="N", help="calibration sequences, instead of the recipe's")
    add_slots(command)
    add_processes(command)
    command.add_argument("--low-memory", action="store_true", help="stay under 12 GB of device memory; slower")
    command.add_argument("--resume", action="store_true", help="go on with a stopped run")
    command.add_argument("--plan", action="store_true", help="say what would be done; needs only DIR/config.json")
    command.add_argument("--json", action="store_true", help="print JSON")
    add_quiet(command)


def _quantize(options: argparse.Namespace) -> int:
    if options.plan:
        return _plan(options)
    if options.out is None:
        raise UserError("no --out", "the folder to make", "add --out DIR")
    for name, value in (("--sequences", options.sequences), ("--slots", options.slots)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}", "a positive number", "correct it")
    from s2quant.evaluate.ranks import find_ranks
    from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
    from s2quant.quantize.exchange import join_exchange
    from s2quant.runtime.load import parse_device

    ranks = find_ranks(options.device)  # several by --processes or `accelerate launch`: they share the work
    device = ranks.device(options.device)
    exchange = join_exchange(ranks.rank, ranks.world, parse_device(device))
    try:
        with progress(options.quiet or not ranks.is_first) as report:
            records = quantize_checkpoint(
                QuantizeOptions(
                    recipe=options.recipe,
                    model=options.model,
                    out=options.out,
                    device=device,
                    calibration=options.calibration,
                    resume=options.resume,
                    eval_folder=Path(__file__).resolve().parents[2] / "eval",  # beside the package, in a checkout
                    num_sequences=options.sequences,
                    num_slots=options.slots,
                    low_memory=options.low_memory,
                    exchange=exchange,
                ),
                report,
            )
    except S2QuantError:  # raised in all; after any other, NCCL's end could wait for those in a collective
        ranks.close()
        raise
    ranks.close()
    if not ranks.is_first:
        return 0
    if options.json:
        print(json.dumps({"out": str(options.out), "modules": list(records)}))
    else:
        print(f"{options.out}: {len(records)} linears quantized, verified; details in {options.out / 'README.md'}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from s2quant.checkpoint.config import S2Config
    from s2quant.quantize.plan import make_plan
    from s2quant.recipe import load_recipe

    plan = make_plan(load_recipe(options.recipe), S2Config.load(options.model))
    print(json.dumps(_plan_json(plan)) if options.json else _plan_text(plan))
    return 0


def _plan_json(plan: Plan) -> dict[str, Any]:
    modules = [
        {
            "name": module.name,
            "kind": module.kind,
            "method": module.settings.method if module.settings else "keep",
            "bits": module.settings.bits if module.settings else None,
            "group_size": module.settings.group_size if module.settings else None,
            "bytes": module.num_bytes,
            "dense_bytes": module.dense_bytes,
        }
        for module in plan.modules
    ]
    return {
        "modules": modules,
        "quantized": len(plan.quantized),
        "dense": len(plan.dense_linears),
        "tensors": plan.num_tensors,
        "tensor_bytes": plan.num_bytes,
        "dense_tensor_bytes": plan.dense_bytes,
    }


def _plan_text(plan: Plan) -> str:
    lines = []
    for module in plan.modules:
        settings = module.settings
        what = "keep" if settings is None else f"{settings.method} {settings.bits} bit g{settings.group_size}"
        lines.append(f"{module.name:58} {module.kind:9} {what:14} {module.dense_bytes:>13,} -> {module.num_bytes:>13,}")
    lines.append(
        f"{len(plan.quantized)} linears quantized, {len(plan.dense_linears)} kept; {plan.num_tensors} tensors, "
        f"{plan.num_bytes:,} bytes, {100 * plan.num_bytes / plan.dense_bytes:.1f} % of {plan.dense_bytes:,}"
    )
    return "\n".join(lines)
