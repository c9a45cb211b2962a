"""`s2quant random`, `inspect` and `export`: checkpoint folders made, read and written in another layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2quant.cli.common import add_quiet, progress

if TYPE_CHECKING:
    from s2quant.export.verify import Inspection


def add(commands: Any) -> None:
    """Add the commands."""
    _add_random(commands)
    _add_inspect(commands)
    _add_export(commands)


def _add_random(commands: Any) -> None:
    command = commands.add_parser("random", help="write a checkpoint of random weights in the real layout")
    command.set_defaults(run=_random)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--size", choices=("tiny", "s2-pro"), help="a built-in size")
    which.add_argument("--config", type=Path, metavar="FILE", help="a config.json")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    command.add_argument("--seed", type=int, default=0, help="seed of the weights")
    command.add_argument("--device", default="cpu", help="where numbers are drawn; they differ between devices")
    add_quiet(command)


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser("inspect", help="list every module of a checkpoint and say whether it is sound")
    command.set_defaults(run=_inspect)
    command.add_argument("model", type=Path, metavar="DIR", help="a checkpoint folder")
    command.add_argument("--headers", action="store_true", help="do not read the tensors' values")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_export(commands: Any) -> None:
    command = commands.add_parser("export", help="write a checkpoint in the layout of an engine")
    command.set_defaults(run=_export)
    command.add_argument("model", type=Path, metavar="DIR", help="a checkpoint folder")
    command.add_argument("--profile", required=True, choices=("native", "bf16", "vllm-omni", "sglang-omni"),
                         help="native: as the release; bf16: dequantized, for engines that load no GPTQ; "
                         "vllm-omni, sglang-omni: packed, as these engines load it (docs/serving.md)")  # fmt: skip
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    add_quiet(command)


def _random(options: argparse.Namespace) -> int:
    from s2quant.export.random import CONFIGS, write_random
    from s2quant.files import read_json
    from s2quant.runtime.load import parse_device

    parse_device(options.device)
    raw = CONFIGS[options.size]() if options.size else read_json(options.config)
    with progress(options.quiet) as report:
        report("drawing weights", 0, 1)
        write_random(raw, options.out, options.seed, device=options.device)
    print(f"{options.out}: random weights, seed {options.seed}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from s2quant.export.verify import inspect_folder

    found = inspect_folder(options.model, values=not options.headers)
    print(json.dumps(found.to_json()) if options.json else _inspection_text(found))
    return 1 if found.faults else 0


def _inspection_text(found: Inspection) -> str:
    lines = [
        f"{module.name:58} {module.kind:9} {module.dtype:4} "
        f"{'dense' if module.bits is None else f'{module.bits} bit g{module.group_size}':10} {module.num_bytes:>13,}"
        for module in found.modules
    ]
    lines.append(
        f"{found.num_quantized} linears quantized, {found.num_dense} dense; {found.num_tensors} tensors, "
        f"{found.num_bytes:,} bytes"
    )
    lines += [f"FAULT {fault}" for fault in found.faults] or ["sound"]
    return "\n".join(lines)


def _export(options: argparse.Namespace) -> int:
    from s2quant.export.profiles import export_checkpoint

    with progress(options.quiet) as report:
        report(f"exporting {options.profile}", 0, 1)
        notes = export_checkpoint(options.model, options.out, options.profile)
    print("\n".join([f"{options.out}: profile {options.profile}, verified", *notes]))
    return 0
