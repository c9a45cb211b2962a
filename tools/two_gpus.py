"""Prove that several GPUs do the work of one: the same output, by as many processes as GPUs, in a fraction of the time.

    python tools/two_gpus.py --out DIR [--work /dev/shm/two] [--num-processes 2] [--only eval,quantize]

Does the same once by one process and once by `accelerate launch --multi_gpu --num_processes N` (with --launcher s2quant
by `s2quant ... --processes N`):

- eval: quantizes models/s2-mini, then evaluates it against the original (`s2quant eval`);
- quantize: a bf16 checkpoint of random weights of the real size (11 GB under --work, and 6 GB twice) by the recipe of
  the release (`s2quant quantize`), calibrated on fewer and shorter sequences; with --full-length on sequences of 1024
  positions. On a GPU a short run comes first, so that neither compiles kernels.

Outputs are compared file by file (`same_output.py`, which names what is left out). Every part has a time of its own;
DIR/two_gpus.json is written after every command, and DIR/two_gpus.md from it. Exit status 1: something differs, failed
or was out of time. `--size tiny --device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_check import full_length_recipe  # noqa: E402
from launched import LAUNCHERS, Launcher  # noqa: E402
from same_output import compare_quantized, compare_runs  # noqa: E402

from s2quant.calibrate.sequences import LEAST_GROUPS, line_groups  # noqa: E402
from s2quant.checkpoint.reader import open_checkpoint  # noqa: E402
from s2quant.cli.common import numbers  # noqa: E402
from s2quant.export.calibration import calibration_lines  # noqa: E402
from s2quant.export.memory import calibration_slots  # noqa: E402
from s2quant.export.random import CONFIGS, write_random  # noqa: E402
from s2quant.recipe import load_recipe  # noqa: E402
from s2quant.records import git_commit, versions  # noqa: E402
from s2quant.runtime.load import device_name, parse_device  # noqa: E402

PARTS = ("eval", "quantize")
RECIPES = {"s2-pro": "s2-pro-w4a16.yaml", "tiny": "tiny-w4a16.yaml"}
MINI = ROOT / "models" / "s2-mini"
NEEDED = {
    "eval": ("accelerate", "gptqmodel", "pandas", "scipy", "statsmodels", "transformers"),
    "wer": ("whisper", "jiwer"),
    "quantize": ("accelerate", "gptqmodel", "transformers"),
}
WARM_UP_FRAMES = 8  # of a line that is spoken so that kernels are compiled
START = "start"  # the phase of imports, checks and hashes


class Check:
    """The options, the clock, and what was found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started, self.until, self.part = options, time.perf_counter(), float("inf"), ""
        self.launcher = Launcher(
            num_processes=options.num_processes,
            preload=options.preload,
            log=options.out / "two_gpus.log",
            launcher=options.launcher,
        )
        self.facts: dict[str, Any] = {
            "device": device_name(parse_device(options.device)),
            "host": f"{platform.machine()}, {self.launcher.environment()['OMP_NUM_THREADS']} threads a process",
            "num_processes": options.num_processes,
            "launcher": options.launcher,
            "commit": options.commit or git_commit(),
            "versions": versions(("accelerate", "openai-whisper", "jiwer", "pandas", "scipy", "statsmodels")),
            "parts": {},
        }

    def left(self) -> float:
        """Give the seconds that the part has left."""
        return self.until - time.perf_counter()

    def keep(self) -> None:
        """Write what was found so far."""
        (self.options.out / "two_gpus.json").write_text(json.dumps(self.facts, indent=1) + "\n")
        (self.options.out / "two_gpus.md").write_text(markdown(self.facts))

    def fresh(self, name: str) -> Path:
        """Name a folder under --work that a command makes; what an earlier try left there is removed."""
        folder: Path = self.options.work / name
        for path in (folder, folder.with_name(f"{name}.partial")):
            shutil.rmtree(path, ignore_errors=True)
        return folder

    def run(
        self, part: dict[str, Any], name: str, words: Sequence[str], fine: Sequence[int] = (0,), **more: Any
    ) -> Any:
        """Run a command within the part's time and keep its facts; one that fails ends the part."""
        print(f"  {name}: {' '.join(words)}", flush=True)
        part[name] = self.launcher.run([*words, "--quiet"], limit_s=self.left(), **more)
        self.keep()
        print(f"  {name}: {json.dumps(part[name])}", flush=True)
        if part[name]["status"] not in fine:
            raise RuntimeError(f"{name}: " + ("out of time" if part[name]["status"] is None else "failed"))
        return part[name]


def both(
    check: Check,
    part: dict[str, Any],
    words: Callable[[Path], list[str]],
    phases: Callable[[Path], Mapping[str, Sequence[Path]]],
    compare: Callable[[Path, Path], dict[str, Any]],
    fine: Sequence[int] = (0,),
) -> None:
    """Run a command by one process and by several, and compare their times and their folders."""
    name = check.part
    folders = [check.fresh(f"{name}-one"), check.fresh(f"{name}-several")]
    one, several = (
        check.run(part, what, words(folder), fine, shared=what == "several", phases=phases(folder))
        for what, folder in zip(("one", "several"), folders, strict=True)
    )
    part["ratio"] = one["seconds"] / several["seconds"]
    rest = [run["seconds"] - run["phases_s"].get(START, 0.0) for run in (one, several)]
    part["ratio_after_start"] = rest[0] / rest[1]
    part["phases_ratio"] = {
        phase: seconds / several["phases_s"][phase]
        for phase, seconds in one["phases_s"].items()
        if several["phases_s"].get(phase)
    }
    check.keep()
    part |= compare(*folders)
    if one["status"] != several["status"]:
        part["equal"] = False
        part["differences"] = [f"exit status: {one['status']}, {several['status']}", *part["differences"]]
    check.keep()


# ---- parts -----------------------------------------------------------------------------------------------------------


def eval_part(check: Check, part: dict[str, Any]) -> None:
    """Evaluate s2-mini, quantized, against s2-mini."""
    options, model = check.options, check.options.quantized
    if model is None:
        model = check.fresh("s2-mini-w4a16")
        words = ["quantize", str(ROOT / "recipes" / "s2-mini-w4a16.yaml"), "--model", str(MINI), "--out", str(model)]
        words += ["--sequences", str(options.mini_sequences), "--device", options.device]
        check.run(part, "made", words)
    metrics = options.metrics
    if metrics is None:
        metrics = "tokens,failures" + ("" if missing("wer") else ",wer")
    part["metrics"] = metrics

    def evaluate(out: Path, limit: int = options.limit) -> list[str]:
        found = ["eval", str(options.suite), "--model", str(model), "--baseline", str(MINI), "--out", str(out)]
        found += ["--device", options.device, "--metrics", metrics, "--seeds", options.seeds, "--no-report"]
        return [*found, "--limit", str(limit), "--slots", str(options.slots)]

    def phases(out: Path) -> dict[str, list[Path]]:
        work = out / "work"
        return {
            START: [out / "run.json"],
            "speaking": [work / "clips-*.jsonl"],
            "token metrics": [work / "tokens" / "*"],
            "transcribing": [work / "transcripts-*.jsonl"],
            "summing up": [out / "results.json"],
        }

    fine = (0, 1)  # 1: a gate of the suite; not what is asked here
    if options.device == "cuda":  # so that neither run compiles kernels, but those of contexts met later
        check.run(part, "warm_up", evaluate(check.fresh("warm-up"), min(options.limit, options.slots)), fine)
    both(check, part, evaluate, phases, compare_runs, fine)


def quantize_part(check: Check, part: dict[str, Any]) -> None:
    """Quantize a random checkpoint."""
    options, model = check.options, check.options.model or check.options.work / f"{check.options.size}-bf16"
    if not model.exists() and options.full_length:
        print(f"  made: {model}", flush=True)
        write_random(CONFIGS[options.size](), model, seed=0, device=options.device, ends=False)
    elif not model.exists():
        check.run(part, "made", ["random", "--size", options.size, "--out", str(model), "--device", options.device])
    original = ROOT / "recipes" / RECIPES[options.size]
    if options.full_length:
        recipe = full_length_recipe(original, options.work)
    else:
        recipe = shorter_recipe(original, options.work, options.max_frames)
    slots = options.calibration_slots or usual_slots(options, recipe, model)
    part |= {"sequences": options.sequences, "full_length": options.full_length, "slots": slots}
    part["calibration_groups"] = len(line_groups(["" for _ in range(options.sequences)], slots))  # that are shared

    def quantize(out: Path, recipe: Path = recipe, sequences: int = options.sequences) -> list[str]:
        words = ["quantize", str(recipe), "--model", str(model), "--out", str(out), "--device", options.device]
        return [*words, "--sequences", str(sequences), "--slots", str(slots)]

    if options.device == "cuda":
        (options.work / "short").mkdir(exist_ok=True)
        short = shorter_recipe(recipe, options.work / "short", WARM_UP_FRAMES)
        check.run(part, "warm_up", quantize(check.fresh("quantize-warm-up"), short, slots))
        check.fresh("quantize-warm-up")

    def phases(out: Path) -> dict[str, list[Path]]:
        partial = out.with_name(f"{out.name}.partial")
        return {
            "start, calibration speech": [partial / "calibration.safetensors"],
            "quantizing": [partial / "stages" / "*"],
            "writing": [out / "manifest.json"],
        }

    both(check, part, quantize, phases, compare_quantized)
    manifests = [json.loads((options.work / f"quantize-{what}" / "manifest.json").read_text("utf-8"))
                 for what in ("one", "several")]  # fmt: skip
    part["calibration"] = manifests[0]["inputs"]["calibration"]
    for what, manifest in zip(("one", "several"), manifests, strict=True):
        part[what]["memory"] = manifest["processes"]


def usual_slots(options: argparse.Namespace, recipe: Path, model: Path) -> int:
    """Say how many texts `quantize` speaks at a time by itself; on a CPU as many as leave every process work."""
    if options.device == "cpu":
        return max(1, options.sequences // LEAST_GROUPS)
    loaded = load_recipe(recipe)
    lines = calibration_lines(loaded, None, options.sequences)
    return calibration_slots(None, open_checkpoint(model), loaded.calibration, lines, parse_device(options.device))


def shorter_recipe(recipe: Path, work: Path, max_frames: int) -> Path:
    """Write a copy of a recipe whose calibration speech is cut, and whose source is found from anywhere.

    Args:
        recipe: The recipe.
        work: Where the copy goes.
        max_frames: Most frames of a line.

    Returns:
        The copy.
    """
    text = recipe.read_text("utf-8")
    text, lines = re.subn(r"(?m)^(  max_frames:) \d+", rf"\1 {max_frames}", text)
    text = re.sub(r"(?m)^(  source:) (calibration/\S+)", rf"\1 {recipe.parent.as_posix()}/\2", text)
    assert lines == 1, recipe
    copy = work / recipe.name
    copy.write_text(text, "utf-8")
    return copy


def missing(part: str) -> list[str]:
    """Name the packages that a part needs and that are not installed."""
    return [name for name in NEEDED[part] if importlib.util.find_spec(name) is None]


# ---- the page --------------------------------------------------------------------------------------------------------


def markdown(facts: Mapping[str, Any]) -> str:
    """Put the facts into a table."""
    several = facts["num_processes"]
    lines = [f"| | 1 process, s | {several} processes, s | ratio | equal |", "|---|--:|--:|--:|---|"]
    notes = []
    for name, part in facts["parts"].items():
        one, other = part.get("one", {}), part.get("several", {})
        equal = {True: "yes", False: "**no**", None: "not known"}[part.get("equal")]
        lines.append(f"| {name} | {_s(one)} | {_s(other)} | {_ratio(one, other)} | {equal} |")
        for phase, seconds in one.get("phases_s", {}).items():
            found = other.get("phases_s", {}).get(phase)
            ratio = f"{seconds / found:.2f}" if found else ""
            lines.append(f"| ... {phase} | {seconds:.1f} | {'' if found is None else f'{found:.1f}'} | {ratio} | |")
        if "equal" in part:
            counted = {key: part[key] for key in ("records", "linears", "files", "bytes") if key in part}
            notes.append(f"{name}: compared {', '.join(f'{value:,} {key}' for key, value in counted.items())}; left "
                         f"out: {'; '.join(f'{key} ({why})' for key, why in part['left_out'].items())}.")  # fmt: skip
        for run in (one, other):
            peaks = [process["peak_device_bytes"] for process in run.get("memory", [])]
            if any(peak is not None for peak in peaks):
                said = ", ".join("?" if peak is None else f"{peak / 1e9:.2f}" for peak in peaks)
                notes.append(f"{name}, {run['processes']} process(es): peak GPU memory while quantizing {said} GB.")
        notes += [f"{name}: differs: {sentence}" for sentence in part.get("differences", [])]
        notes += [f"{name}: {part['error']}"] if "error" in part else []
    head = (
        f"# {several} processes against one\n\nWritten by `tools/two_gpus.py` on {facts['device']}, {facts['host']}, "
        f"processes started by {facts['launcher']}; "
    )
    tail = "".join(f"- {note}\n" for note in notes)
    return f"{head}commit {facts['commit']}.\n\n" + "\n".join(lines) + f"\n\n{tail}"


def _s(run: Mapping[str, Any]) -> str:
    return f"{run['seconds']:.1f}" if run.get("status") is not None else "out of time" if run else ""


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    done = [run.get("status") in (0, 1) for run in (one, other)]
    return f"{one['seconds'] / other['seconds']:.2f}" if all(done) else ""


# ---- all of it -------------------------------------------------------------------------------------------------------


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "s2quant-two-gpus")
    parser.add_argument("--num-processes", type=int, default=2)
    parser.add_argument("--launcher", choices=LAUNCHERS, default=LAUNCHERS[0], help="starts several processes")
    parser.add_argument("--device", default="cuda", help="cuda: a GPU for each process; or cpu")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--eval-seconds", type=float, default=400, help="the time of the part")
    parser.add_argument("--quantize-seconds", type=float, default=540, help="the time of the part")
    parser.add_argument("--seconds", type=float, default=540, help="the time of all parts")
    parser.add_argument("--commit", help="the commit, when the files are no checkout")
    parser.add_argument("--preload", type=Path, nargs="*", default=[], help="libraries of torch operations")
    mini = parser.add_argument_group("eval")
    mini.add_argument("--suite", type=Path, default=ROOT / "eval" / "suites" / "mini-en.yaml")
    mini.add_argument("--limit", type=int, default=128, help="utterances; 12 groups with the slots of the default")
    mini.add_argument("--seeds", default="0")
    mini.add_argument("--slots", type=int, default=8)
    mini.add_argument("--metrics", help="instead of tokens,failures, and wer where whisper is installed")
    mini.add_argument("--quantized", type=Path, help="a quantized s2-mini, instead of one that is made")
    mini.add_argument("--mini-sequences", type=int, default=32, help="calibration sequences of s2-mini")
    pro = parser.add_argument_group("quantize")
    pro.add_argument("--size", choices=tuple(RECIPES), default="s2-pro")
    pro.add_argument("--model", type=Path, help="a bf16 checkpoint of --size, instead of a random one")
    pro.add_argument("--sequences", type=int, default=32)
    pro.add_argument("--full-length", action="store_true", help="random weights whose speech does not end")
    pro.add_argument("--max-frames", type=int, default=192, help="of a calibration line, instead of the recipe's")
    pro.add_argument("--calibration-slots", type=int, help="instead of as many as `quantize` takes by itself")
    options = parser.parse_args(words)
    for name in options.only.split(","):
        if name not in PARTS:
            parser.error(f"--only {name}: parts are {', '.join(PARTS)}")
        if missing(name):
            parser.error(f"{name} needs packages that are not installed: {', '.join(missing(name))}")
    if options.launcher != LAUNCHERS[0] and options.preload:
        parser.error(f"--launcher {options.launcher} --preload: {LAUNCHERS[0]} starts what is preloaded")
    if options.num_processes < 2:
        parser.error(f"--num-processes {options.num_processes}: 2 or more are compared with one")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: cpu or cuda; every process finds a GPU of its own")
    if options.device == "cuda" and torch.cuda.device_count() < options.num_processes:
        parser.error(f"{options.num_processes} processes, but torch sees {torch.cuda.device_count()} CUDA devices")
    if options.metrics is not None and "speed" in options.metrics.split(","):
        parser.error("--metrics speed: timings are never equal")
    numbers("--seeds", options.seeds)
    options.out, options.work = options.out.absolute(), options.work.absolute()
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for."""
    options = parse(words)
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    check = Check(options)
    for name in options.only.split(","):
        part = check.facts["parts"][name] = {}
        check.part, began = name, time.perf_counter()
        check.until = min(check.started + options.seconds, began + getattr(options, f"{name}_seconds"))
        print(f"{name}: up to {check.left():.0f} s", flush=True)
        try:
            {"eval": eval_part, "quantize": quantize_part}[name](check, part)
        except RuntimeError as error:  # of a command: said in its facts
            part["error"] = str(error)
        except Exception as error:  # noqa: BLE001 - the other part is worth having
            part["error"] = "".join(traceback.format_exception(error))
        part["took_s"] = time.perf_counter() - began
        check.keep()
    print((options.out / "two_gpus.md").read_text())
    return 0 if all(part.get("equal") for part in check.facts["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
