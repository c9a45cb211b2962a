"""`s2quant publish`: a checkpoint folder made ready for a model hub, and uploaded when asked."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("publish", help="prepare a checkpoint for a model hub; uploads only with --push")
    command.set_defaults(run=_publish)
    command.add_argument("model", type=Path, metavar="DIR", help="a checkpoint folder, or one prepared before")
    command.add_argument(
        "--eval", type=Path, metavar="RUN",
        help="folder of an evaluation of DIR, or of what DIR was exported from: its table goes on the card",
    )  # fmt: skip
    command.add_argument("--repo", metavar="OWNER/NAME", help="the repository on the hub")
    command.add_argument("--out", type=Path, metavar="DIR", help="the folder to make (default: DIR.hub)")
    command.add_argument(
        "--push", action="store_true", help="upload, by your own login; a folder prepared before is taken as it is"
    )


def _publish(options: argparse.Namespace) -> int:
    from s2quant.errors import UserError
    from s2quant.export.publish import check_repo, is_prepared, prepare, push, take_up

    if options.push and options.repo is None:
        raise UserError("--push without --repo", "the repository to upload to", "add --repo OWNER/NAME")
    check_repo(options.repo)
    model = options.model.absolute()
    if options.out is None and is_prepared(model):
        out, is_there = model, True
    else:
        out = options.out or model.with_name(f"{model.name}.hub")
        is_there = options.push and os.path.isdir(out)
    upload = (take_up if is_there else prepare)(model, out, options.eval, options.repo)
    for name, size in upload.files.items():
        print(f"{size:>15,}  {name}")
    total = f"{len(upload.files)} files, {sum(upload.files.values()):,} bytes, prepared in {out}"
    if is_there:
        total += " before, taken as they are"
    if options.push:
        print(f"{total}; uploaded: {push(upload)}")
    else:
        print(f"{total}; nothing was uploaded (--push uploads to {upload.repo or '--repo'})")
    return 0
