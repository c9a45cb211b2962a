"""`s2quant compare`: what two checkpoints differ in, answering as `diff`: 0 the same, 1 different, 2 an error."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2quant.cli.common import add_quiet, progress

if TYPE_CHECKING:
    from s2quant.export.compare import Comparison


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "compare", help="say what two checkpoints differ in", epilog="Exit status: 0 the same, 1 different, 2 an error."
    )
    command.set_defaults(run=_compare)
    command.add_argument("a", type=Path, metavar="A", help="a checkpoint folder")
    command.add_argument("b", type=Path, metavar="B", help="another")
    command.add_argument("--json", action="store_true", help="print JSON")
    add_quiet(command)


def _compare(options: argparse.Namespace) -> int:
    from s2quant.export.compare import compare_folders

    with progress(options.quiet) as report:
        found = compare_folders(options.a, options.b, report)
    print(json.dumps(found.to_json()) if options.json else comparison_text(found))
    return 0 if found.is_same else 1


def comparison_text(found: Comparison) -> str:
    """Write a comparison as lines: modules that differ, names in one only, fields, files, totals."""
    lines = []
    for module in found.modules:
        if module.is_same:
            continue
        error = "not comparable" if module.error is None else f"error {module.error:.6f}"
        stored = module.storage[0] if module.storage[0] == module.storage[1] else " -> ".join(module.storage)
        lines.append(f"{module.name:58} {stored:20} {module.num_bytes[0]:>13,} -> {module.num_bytes[1]:>13,}  {error}")
    lines += [f"only in {side}: {name}" for side, names in zip("AB", found.only, strict=True) for name in names]
    lines += [f"config.json {name}: {json.dumps(a)} -> {json.dumps(b)}" for name, a, b in found.config]
    lines += [f"{name} differs" for name in found.files]
    lines.append(
        f"{sum(not module.is_same for module in found.modules)} of {len(found.modules)} common modules differ; "
        f"{found.num_bytes[0]:,} -> {found.num_bytes[1]:,} tensor bytes; "
        f"{found.bits_per_weight[0]:.2f} -> {found.bits_per_weight[1]:.2f} bits per weight of linears"
    )
    return "\n".join(lines + (["the same"] if found.is_same else []))
