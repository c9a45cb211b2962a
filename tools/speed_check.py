"""Check and time the fast decoder's kernels on one GPU: linears, exactness, whole frames, variants, a profile.

    python tools/speed_check.py --out DIR [--only kernels,linears,...] [--seconds 360]

Needs no files: weights are random, drawn on the device. Parts run in the order of what they are worth, each in a time
of its own; DIR/speed.json is written after every item and DIR/speed.md after every part, so that a run that is cut off
keeps what it measured. A part that fails is recorded and does not lose the others; where it took the GPU's context with
it, the others go on in a new process, with the launches as they were when they first ran right (`--how first`). The
part "tune" writes DIR/tuned.py, to be committed as s2quant/runtime/kernels/tuned.py. `--size tiny --device cpu` with
TRITON_INTERPRET=1 tries the script itself (an interpreter's times mean nothing).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import triton

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.speed.check import PARTS, WHOLE_S, Check
from tools.speed.page import markdown
from tools.speed.parts import BATCHES, WORK


def go_on_anew(check: Check, after: str) -> None:
    """Run the parts that are left in a new process; the GPU's context is lost."""
    left = [name for name in PARTS[PARTS.index(after) + 1 :] if name in check.options.only]
    seconds = check.until - time.perf_counter()
    if not left or seconds < 20 or check.options.how == "first":
        return
    check.say(f"the GPU's context is lost: {', '.join(left)} go on in a new process, launched as at first")
    check.keep()
    arguments = ["--out", str(check.options.out), "--only", ",".join(left), "--size", check.size]
    arguments += ["--device", str(check.device), "--seconds", f"{seconds:.0f}", "--how", "first", "--go-on"]
    arguments += ["--variants", check.options.variants, "--models", check.options.models]
    arguments += ["--cases", check.options.cases]
    arguments += [part for library in check.options.preload for part in ("--preload", str(library))]
    os.execv(sys.executable, [sys.executable, __file__, *arguments])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--size", choices=sorted(BATCHES), default="s2-pro")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=WHOLE_S, help="for all parts together")
    parser.add_argument("--how", choices=("best", "first"), default="best", help="how kernels are launched")
    parser.add_argument("--variants", default="", metavar="REGEX", help='of "w4a16 batch 64, without early"')
    parser.add_argument("--cases", default="", metavar="REGEX", help='of "w4 w1+w3 M=64": what the part "tune" times')
    parser.add_argument("--models", default="", help="some of w4a16,bf16,fast8,w8a16, instead of these; or g128")
    parser.add_argument("--go-on", action="store_true", help="keep what is in DIR/speed.json")
    parser.add_argument("--preload", type=Path, action="append", default=[], help="a torch extension of gptqmodel's")
    options = parser.parse_args()
    options.only = [name for name in PARTS if name in options.only.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def main() -> int:
    options = parse()
    check = Check(options)
    if options.go_on:
        check.facts = json.loads((options.out / "speed.json").read_text())
    else:
        device = torch.cuda.get_device_name() if check.cuda else str(check.device)
        check.facts = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "parts_s": {}}
    check.facts.setdefault("how", {})
    for library in options.preload:
        torch.ops.load_library(str(library))
    failed = 0
    for name in options.only:
        started = time.perf_counter()
        check.begin(name)
        check.facts["how"][name] = options.how
        try:
            WORK[name](check)
        except Exception as error:  # noqa: BLE001 - see Check.tried
            failed += 1
            check.facts[f"{name}_failed"] = f"{type(error).__name__}: {str(error)[:2000]}"
            check.say(f"{name} failed: {traceback.format_exc()[-3000:]}")
        check.facts["parts_s"][name] = time.perf_counter() - started
        check.say(f"{name}: {time.perf_counter() - started:.1f} s")
        check.keep()
        (options.out / "speed.md").write_text(markdown(check.facts))
        try:
            if check.cuda:
                torch.cuda.synchronize()
        except RuntimeError:
            go_on_anew(check, name)
            failed += 1
            break
    print(markdown(check.facts))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
