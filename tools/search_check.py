"""Find a recipe for a random checkpoint of the real size on one GPU, quantize by it and speak, each by its command.

    python tools/search_check.py --out DIR --work WORK [--frames 256] [--bits 2,3,4,8] [--model DIR]

Needs about 30 GB under --work. `s2quant sensitivity` speaks 40 calibration lines and measures every linear at every
width, `s2quant search` finds a recipe within the bytes of recipes/s2-pro-w4a16.yaml, `s2quant quantize` quantizes by it
on the lines spoken before, `s2quant inspect` looks at the folder, and `s2quant speak` speaks with it. The weights are
random and hardly ever end their speech, so every line has --frames frames; the damage measured is that of noise, the
time and the memory are those of the size. Writes DIR/search.json after every step, the found recipe, and the report of
the sensitivity run. With `--go-on` a call that was cut off is gone on with. Exit status 1: a step failed, or the folder
has more bytes than the budget or other bytes than the search foretold. `--size tiny --device cpu` tries the script.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_check import calibration_recipe  # noqa: E402
from launched import Launcher  # noqa: E402

from s2quant.checkpoint.reader import open_checkpoint  # noqa: E402
from s2quant.export.random import CONFIGS, write_random  # noqa: E402
from s2quant.files import partial_folder, read_json, write_json  # noqa: E402
from s2quant.quantize.plan import make_plan  # noqa: E402
from s2quant.recipe import load_recipe  # noqa: E402
from s2quant.records import git_commit, versions  # noqa: E402
from s2quant.runtime.load import device_name, parse_device  # noqa: E402

RECIPES = {"s2-pro": "s2-pro-w4a16.yaml", "tiny": "tiny-w4a16.yaml"}
REPORTED = (
    "sensitivity.json",
    "sensitivity.csv",
    "manifest.json",
    "report.md",
    "report.html",
    "curve.csv",
    "curve.svg",
)
TEXT = "Hello there. This sentence is spoken by what the search has found."


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a bf16 checkpoint of --size, instead of a random one")
    parser.add_argument("--size", choices=tuple(RECIPES), default="s2-pro")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--frames", type=int, default=256, help="frames of a calibration line")
    parser.add_argument("--sequences", type=int, default=40)
    parser.add_argument("--held", type=int, default=8)
    parser.add_argument("--bits", default="2,3,4,8")
    parser.add_argument("--seconds", type=float, default=580)
    parser.add_argument("--go-on", action="store_true", help="go on with a call that was cut off")
    parser.add_argument("--commit", help="the commit, when the files are no checkout")
    parser.add_argument("--preload", type=Path, nargs="*", default=[], help="libraries of torch operations")
    return parser.parse_args(words)


class Check:
    """The commands in their order, and what they said."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.until = options, time.perf_counter() + options.seconds
        self.launcher = Launcher(num_processes=1, preload=options.preload, log=(options.out / "search.log").absolute())
        self.file = options.out / "search.json"
        self.facts: dict[str, Any] = {
            "device": device_name(parse_device(options.device)),
            "commit": options.commit or git_commit(),
            "versions": versions(),
            "frames": options.frames,
            "bits": options.bits,
            "steps": {},
        }
        if options.go_on and self.file.exists():
            before = read_json(self.file)
            told = ("device", "commit", "versions", "frames", "bits")
            changed = [key for key in told if before[key] != self.facts[key]]
            if changed:
                raise SystemExit(f"{self.file} has another {' and another '.join(changed)}: start anew")
            self.facts = before

    def keep(self) -> None:
        """Write what is known."""
        write_json(self.file, self.facts)

    def step(self, name: str, words: Sequence[str], made: Path) -> bool:
        """Run a command unless it was run before; one that was cut off is gone on with.

        Args:
            name: Of the step.
            words: After `s2quant`.
            made: What it makes.

        Returns:
            Whether it has ended well.
        """
        steps: dict[str, list[dict[str, Any]]] = self.facts["steps"]
        goes = steps.setdefault(name, [])
        if goes and goes[-1]["status"] == 0:
            return True
        if words[0] == "search":
            made.unlink(missing_ok=True)  # by a call that was cut off
        more = ["--resume"] if partial_folder(made).exists() else []
        goes.append(self.launcher.run([*words, *more], limit_s=self.until - time.perf_counter()))
        self.keep()
        print(f"{name}: {json.dumps(goes[-1])}", flush=True)
        return bool(goes[-1]["status"] == 0)


def main(words: Sequence[str] | None = None) -> int:
    """Find, quantize and speak."""
    options = arguments(words)
    work, out = options.work.absolute(), options.out.absolute()
    if options.model is not None and options.model.resolve().is_relative_to(work.resolve()):
        raise SystemExit(f"--model {options.model} lies in --work {options.work}, which is emptied first: move one")
    if not options.go_on:
        shutil.rmtree(work, ignore_errors=True)
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    check = Check(options)
    budget = ROOT / "recipes" / RECIPES[options.size]
    recipe = calibration_recipe(budget, work, options.frames)
    model = options.model or work / "bf16"
    if options.model is None and not model.exists():
        write_random(CONFIGS[options.size](), model, seed=0, device=options.device, ends=False)
    measured, found, quantized = work / "sensitivity", out / "found.yaml", work / "found"
    lines = ["--model", str(model), "--device", options.device, "--sequences", str(options.sequences), "--quiet"]
    is_measured = check.step(
        "sensitivity",
        ["sensitivity", str(recipe), *lines, "--out", str(measured), "--held", str(options.held)]
        + ["--bits", options.bits, "--no-weights"],
        measured,
    )
    if not is_measured:
        return 1
    check.facts["process"] = read_json(measured / "manifest.json")["process"]
    limit = make_plan(load_recipe(budget), open_checkpoint(model).config).num_bytes
    is_fine = check.step(
        "search", ["search", str(measured), "--budget", str(limit), "--out", str(found), "--curve", "--quiet"], found
    )
    for name in REPORTED:
        if (measured / name).exists():
            shutil.copyfile(measured / name, out / name)
    calibration = ["--calibration", str(measured / "calibration.safetensors")]
    is_fine = is_fine and check.step(
        "quantize", ["quantize", str(found), *lines, *calibration, "--out", str(quantized)], quantized
    )
    sound = out / "found.wav"
    say = ["speak", TEXT, "--model", str(quantized), "--device", options.device, "--max-frames", "60", "--out"]
    is_fine = is_fine and check.step("inspect", ["inspect", str(quantized)], quantized / "manifest.json")
    is_fine = is_fine and check.step("speak", [*say, str(sound)], sound)
    if not is_fine:
        return 1
    foretold = make_plan(load_recipe(found), open_checkpoint(model).config).num_bytes
    actual = read_json(quantized / "manifest.json")["tensor_bytes"]
    check.facts |= {"budget_bytes": limit, "foretold_bytes": foretold, "tensor_bytes": actual}
    check.keep()
    return int(not actual == foretold <= limit)


if __name__ == "__main__":
    sys.exit(main())
