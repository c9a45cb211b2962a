"""Quantize within 12 GB of a GPU, killed on the way and gone on with, or by several GPUs; hold that to one plain go.

    python tools/gpu_check.py --out OUT --work WORK --sequences 256 --full-length --keep
    python tools/low_memory_check.py --out OUT2 --work WORK [--stages 12] [--sequences 256] [--groups 4]
    python tools/low_memory_check.py --out OUT3 --work WORK --processes 2

The first command leaves under WORK a bf16 checkpoint, its quantized folder, the calibration set and, where sequences
have their full length, the recipe; the second quantizes the same once more by `s2quant quantize --low-memory`, ends it
with SIGKILL as soon as so many stages are done, goes on with `--resume`, and compares every tensor. What it takes is
measured by the run itself (manifest.json), of the process that went on. The calibration set is read, not spoken again:
with two lines at a time that takes longer than all else. With --groups it is spoken, and the run is killed a first time
as soon as so many groups of lines are; it is then held to a plain run on the set that it spoke, since other lines side
by side speak otherwise. Writes DIR/low_memory.json; a call that was cut off is gone on with by `--go-on`. With
--processes the same is quantized in one go by so many processes instead, in all the memory there is, to
DIR/shared.json; with --profile each writes DIR/profile-RANK.txt, where its time went. Exit status 1: something differs,
failed, or was done before it could be killed. `--size tiny --device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launched import Launcher  # noqa: E402

from s2quant.checkpoint.reader import open_checkpoint  # noqa: E402
from s2quant.files import write_json  # noqa: E402
from s2quant.records import git_commit  # noqa: E402

POLL_S = 0.02
MEASURED = ("device", "peak_device_bytes", "peak_calibration_bytes", "peak_host_bytes", "low_memory")
RECIPES = {"s2-pro": "s2-pro-w4a16.yaml", "tiny": "tiny-w4a16.yaml"}


def killed(launcher: Launcher, words: Sequence[str], parts: Path, wanted: int, limit_s: float) -> dict[str, Any]:
    """Run a command until so many parts are done, and kill it.

    Args:
        launcher: Starts it.
        words: After `s2quant`.
        parts: The folder in which each finished part, a group of lines or a stage, has a file of its own.
        wanted: Parts.
        limit_s: Its time.

    Returns:
        seconds, done (parts), and status (None: killed).
    """
    began = time.perf_counter()
    with launcher.log.open("ab") as log:
        process = subprocess.Popen(
            launcher.command(words, shared=False),
            cwd=ROOT, env=launcher.environment(), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        status = None
        try:
            while process.poll() is None and time.perf_counter() - began < limit_s and finished(parts) < wanted:
                time.sleep(POLL_S)
            status = process.poll()
        finally:  # also when this script is ended itself
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"seconds": time.perf_counter() - began, "done": finished(parts), "status": status}


def finished(parts: Path) -> int:
    """Count the files of finished parts."""
    return len(list(parts.glob("[!.]*.safetensors")))


def unequal(one: Path, other: Path) -> list[str]:
    """Name the tensors of two checkpoints that have not the same bytes, or are in one only."""
    first, second = open_checkpoint(one), open_checkpoint(other)
    names = [set(checkpoint.entries) for checkpoint in (first, second)]
    found = sorted(names[0] ^ names[1])
    for name in sorted(names[0] & names[1]):
        a, b = first.tensor(name), second.tensor(name)
        if a.dtype != b.dtype or not torch.equal(a, b):
            found.append(name)
    return found


def low_memory(
    facts: dict[str, Any],
    keep: Callable[[], None],
    launcher: Launcher,
    line: list[str],
    partial: Path,
    options: argparse.Namespace,
    left: Callable[[], float],
) -> dict[str, Any]:
    """Quantize, killed once or twice on the way.

    Args:
        facts: What is known; each go is added.
        keep: Writes it down.
        launcher: Starts a go.
        line: The words after `s2quant`.
        partial: The run's folder.
        options: Of the command line.
        left: Seconds that are left.

    Returns:
        The last go, with its status.
    """
    goes = [("killed", partial / "stages", options.stages)]
    if options.groups:
        goes.insert(0, ("killed_speaking", partial / "speech", options.groups))
    for name, parts, wanted in goes:
        if facts.get(name, {}).get("done", 0) >= wanted:
            continue  # before the call that was cut off
        more = ["--resume"] if partial.exists() else []
        facts[name] = killed(launcher, [*line, *more], parts, wanted, left())
        keep()
        if facts[name]["status"] is not None or facts[name]["done"] < wanted:
            return {"status": 1}
    facts["gone_on"] = launcher.run([*line, "--resume"], limit_s=left())
    return dict(facts["gone_on"])


def main(words: Sequence[str] | None = None) -> int:
    """Quantize in two goes, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="what gpu_check.py --keep has left")
    parser.add_argument("--size", choices=tuple(RECIPES), default="s2-pro")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, default=256, help="as gpu_check.py was told")
    parser.add_argument("--stages", type=int, default=12, help="stages after which it is killed; not with --processes")
    parser.add_argument("--groups", type=int, default=0, help="speak, too; groups after which it is killed first")
    parser.add_argument("--go-on", action="store_true", help="go on with a call that was cut off")
    parser.add_argument("--processes", type=int, default=1, help="more than 1: shared, in one go, instead")
    parser.add_argument("--profile", action="store_true", help="write what each process's host did")
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--commit", help="the commit, when the files are no checkout")
    parser.add_argument("--preload", type=Path, nargs="*", default=[], help="libraries of torch operations")
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    work, until = options.work.absolute(), time.perf_counter() + options.seconds
    own = work / RECIPES[options.size]
    recipe = own if own.exists() else ROOT / "recipes" / RECIPES[options.size]
    shared = options.processes > 1
    log = (options.out / f"{'shared' if shared else 'low_memory'}.log").absolute()
    profile = options.out if options.profile else None
    launcher = Launcher(num_processes=options.processes, preload=options.preload, log=log, profile=profile)
    out = work / ("shared" if shared else "low-memory")
    partial = out.with_name(f"{out.name}.partial")
    again = work / "low-memory-again"
    for folder in () if options.go_on else (out, partial, again):
        shutil.rmtree(folder, ignore_errors=True)
    line = ["quantize", str(recipe), "--model", str(work / "bf16"), "--out", str(out), "--device", options.device]
    line += ["--sequences", str(options.sequences), "--quiet"]
    plain = line.copy()
    if not options.groups:
        line += ["--calibration", str(work / "calibration.safetensors")]
    line += [] if shared else ["--low-memory"]
    facts: dict[str, Any] = {"recipe": recipe.name, "sequences": options.sequences}
    if options.go_on and log.with_suffix(".json").exists():
        facts = json.loads(log.with_suffix(".json").read_text("utf-8"))

    def left() -> float:
        return until - time.perf_counter()

    def keep() -> None:
        write_json(log.with_suffix(".json"), facts)

    if shared:
        phases = {
            "start": [partial / "run.json"],
            "quantizing": [partial / "stages" / "*"],
            "writing": [out / "manifest.json"],
        }
        done = facts["shared"] = launcher.run(line, True, left(), phases)
    else:
        done = low_memory(facts, keep, launcher, line, partial, options, left)
    keep()
    if done["status"] == 0:
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        facts |= {name: manifest[name] for name in MEASURED}
        facts["calibration"] = manifest["inputs"]["calibration"]
        facts["commit"] = options.commit or git_commit()
        facts["processes"] = manifest["processes"]
        if options.groups:
            plain[plain.index(str(out))] = str(again)
            plain += ["--calibration", str(out / "s2quant" / "calibration.safetensors")]
            facts["again"] = launcher.run(plain, limit_s=left())
        facts["unequal"] = unequal(again if options.groups else work / "w4a16", out)
        keep()
    print(json.dumps(facts, indent=1))
    return int(facts.get("unequal") != [])


if __name__ == "__main__":
    sys.exit(main())
