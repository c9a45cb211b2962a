"""Quantize a random checkpoint of the real size on one GPU, verify it, speak with it, and write what was measured.

    python tools/gpu_check.py --out reports/2026-01-01-real-size [--work DIR] [--sequences 32] [--model DIR]

Needs about 25 GB of disk under --work. With --model the bf16 checkpoint given is used instead of a random one.
`--full-length` makes every calibration sequence as long as the recipe allows (1024 positions at the real size): weights
whose speech does not end, and a copy of the recipe that takes speech without an end. `--keep` leaves the folders under
--work, and the calibration set beside them. `--preload FILE.so` loads torch extension libraries first (prebuilt kernels
of gptqmodel, so that nothing is compiled).
Writes report.json and report.md; exits 1 if a count is not what the recipe calls for. report.json is written after
every step, so that a run that is cut off keeps what it measured. `--size tiny --device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EXPECTED = {
    "s2-pro": {"quantized": 171, "dense": 30, "tensors": 871, "tensor_bytes": 4_238_063_616},
    "tiny": {"quantized": 17, "dense": 14, "tensors": 107, "tensor_bytes": 14_661_120},
}
TEXT = "Hello [laughing] there. This sentence is spoken by a model of the real size."


class Phases:
    """Seconds by phase, from the progress reports of the job itself; `keep` is called after each."""

    def __init__(self, keep: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self.keep = keep
        self.name, self.since = "start", time.perf_counter()

    def __call__(self, phase: str, done: int, total: int) -> None:
        name = "quantizing" if phase.startswith(("text_model", "audio_decoder")) else phase
        if name != self.name:
            now = time.perf_counter()
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self.since
            print(f"  {self.name}: {now - self.since:.1f} s; {name} ...", flush=True)
            self.name, self.since = name, now
            self.keep()


class Clock:
    """Wall time and peak memory of a device."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device.startswith("cuda")

    def now(self) -> float:
        """Wait for the device and read the clock, in seconds."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset_peak(self) -> None:
        """Give cached memory back and start to measure its peak again."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Most bytes allocated on the GPU since `reset_peak`; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.is_cuda else None


def timed_speech(folder: Path, device: str, num_frames: int) -> dict[str, Any]:
    """Speak once to warm up and once for the clock, past every end of speech, batch 1."""
    from s2quant import load_engine
    from s2quant.runtime.speech import Request

    clock = Clock(device)
    clock.reset_peak()
    started = clock.now()
    engine = load_engine(folder, device=device, num_slots=1)
    load_s = clock.now() - started
    engine.speak(Request(text=TEXT, max_frames=8, ignore_end=True))
    started = clock.now()
    speech = engine.speak(Request(text=TEXT, max_frames=num_frames, ignore_end=True))
    ar_s = clock.now() - started
    engine.decode(speech.codes)
    started = clock.now()
    audio = engine.decode(speech.codes)
    codec_s = clock.now() - started
    return {
        "load_s": load_s,
        "frames": speech.codes.shape[1],
        "ar_ms_per_frame": 1e3 * ar_s / num_frames,
        "ar_rtf": ar_s / (num_frames * 2048 / 44100),
        "codec_s": codec_s,
        "audio_s": len(audio) / 44100,
        "audio_is_finite": bool(torch.isfinite(audio).all()),
        "audio_rms": float(audio.square().mean().sqrt()),
        "peak_device_bytes": clock.peak_bytes(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "s2quant-gpu-check")
    parser.add_argument("--model", type=Path, help="a bf16 checkpoint of --size, instead of a random one")
    parser.add_argument("--size", choices=sorted(EXPECTED), default="s2-pro")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--slots", type=int, help="calibration lines spoken at a time, if not as `quantize` chooses")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--full-length", action="store_true", help="calibration sequences of the most positions")
    parser.add_argument("--keep", action="store_true", help="leave what was made under --work")
    parser.add_argument("--commit", help="the commit, when the files are no checkout")
    parser.add_argument("--preload", type=Path, nargs="*", default=[])
    return parser.parse_args()


def main() -> int:
    options = arguments()
    for library in options.preload:
        torch.ops.load_library(str(library.resolve()))
    from s2quant.export.random import CONFIGS, write_random
    from s2quant.export.verify import inspect_folder
    from s2quant.records import git_commit, versions
    from s2quant.runtime.load import device_name, parse_device

    if options.model is not None and options.model.resolve().is_relative_to(options.work.resolve()):
        raise SystemExit(f"--model {options.model} lies in --work {options.work}, which is emptied first: move one")
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    recipe = ROOT / "recipes" / f"{options.size}-w4a16.yaml"
    if options.full_length:
        recipe = full_length_recipe(recipe, options.work)
    facts: dict[str, Any] = {
        "device": device_name(parse_device(options.device)),
        "host": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "commit": options.commit or git_commit(),
        "versions": versions(),
        "size": options.size,
        "recipe": recipe.name,
        "sequences": options.sequences,
        "full_length": options.full_length,
    }

    def keep() -> None:
        (options.out / "report.json").write_text(json.dumps(facts, indent=2) + "\n")

    started = time.perf_counter()
    model = options.model or options.work / "bf16"
    if options.model is None:
        print("random checkpoint ...", flush=True)
        write_random(CONFIGS[options.size](), model, seed=0, device=options.device, ends=not options.full_length)
        facts["random_s"] = time.perf_counter() - started
        keep()
    print(f"quantize ... ({time.perf_counter() - started:.0f} s so far)", flush=True)
    out = options.work / "w4a16"
    phases = Phases(keep)
    facts["phases_s"] = phases.seconds  # filled while the job runs
    facts |= timed_quantization(options, recipe, model, out, phases)
    keep()
    print(f"inspect ... ({time.perf_counter() - started:.0f} s so far)", flush=True)
    found = inspect_folder(out)
    facts["inspect"] = {key: value for key, value in found.to_json().items() if key != "modules"}
    facts["counts_right"] = all(facts["inspect"][key] == value for key, value in EXPECTED[options.size].items())
    facts["speech"] = {}
    for name, folder in (("w4a16", out), ("bf16", model)):
        print(f"speak {name} ... ({time.perf_counter() - started:.0f} s so far)", flush=True)
        facts["speech"][name] = timed_speech(folder, options.device, options.frames)
        keep()
    (options.out / "report.md").write_text(markdown(facts))
    print(markdown(facts))
    if not options.keep:
        shutil.rmtree(options.work)
    return 0 if facts["counts_right"] and not found.faults else 1


def full_length_recipe(recipe: Path, work: Path) -> Path:
    """Write a copy of a recipe whose calibration sequences have the most positions, from speech that need not end.

    Args:
        recipe: The recipe.
        work: Where the copy goes.

    Returns:
        The copy.
    """
    return calibration_recipe(recipe, work, yaml.safe_load(recipe.read_text("utf-8"))["calibration"]["max_positions"])


def calibration_recipe(recipe: Path, work: Path, num_frames: int) -> Path:
    """Write a copy of a recipe whose calibration speech need not end.

    Args:
        recipe: The recipe.
        work: Where the copy goes.
        num_frames: Most frames of a line.

    Returns:
        The copy.
    """
    raw = yaml.safe_load(recipe.read_text("utf-8"))
    calibration = raw["calibration"]
    source = str((recipe.parent / calibration["source"]).resolve())
    calibration |= {"source": source, "max_frames": num_frames, "require_end": False}
    copy = work / recipe.name
    copy.write_text(yaml.safe_dump(raw, sort_keys=False), "utf-8")
    return copy


def timed_quantization(
    options: argparse.Namespace, recipe: Path, model: Path, out: Path, phases: Phases
) -> dict[str, Any]:
    """Do the whole job of `s2quant quantize` and say how long it took, by phase, and what it needed."""
    from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint

    Clock(options.device).reset_peak()
    started = time.perf_counter()
    records = quantize_checkpoint(
        QuantizeOptions(
            recipe=recipe,
            model=model,
            out=out,
            device=options.device,
            num_sequences=options.sequences,
            num_slots=options.slots,
            calibration=options.work / "calibration.safetensors" if options.keep else None,
        ),
        phases,
    )
    seconds = time.perf_counter() - started
    manifest = json.loads((out / "manifest.json").read_text())
    errors = sorted(record["output_error"] for record in records)
    rtn = sorted(record["output_error_rtn"] for record in records)
    return {
        "quantize_s": seconds,
        "phases_s": phases.seconds,
        "peak_device_bytes": manifest["peak_device_bytes"],
        "peak_calibration_bytes": manifest["peak_calibration_bytes"],
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "calibration": manifest["inputs"]["calibration"],
        "output_error": {"median": errors[len(errors) // 2], "worst": errors[-1], "median_rtn": rtn[len(rtn) // 2]},
        "gptq_seconds": sum(record["seconds"] for record in records),
        "hessian_seconds": sum(record["hessian_seconds"] for record in records),
    }


def gigabytes(num_bytes: int | None) -> str:
    return "not measured" if num_bytes is None else f"{num_bytes / 1e9:.2f}"


def markdown(facts: dict[str, Any]) -> str:
    """Put the facts into a page."""
    inspect, calibration, errors = facts["inspect"], facts["calibration"], facts["output_error"]
    rows = [
        ("device", facts["device"]),
        ("commit", facts["commit"]),
        ("recipe", facts["recipe"]),
        ("quantized linears / dense linears", f"{inspect['quantized']} / {inspect['dense']}"),
        ("tensors", inspect["tensors"]),
        ("tensor bytes", f"{inspect['tensor_bytes']:,}"),
        ("faults found by inspect", len(inspect["faults"])),
        ("calibration", f"{calibration['num_sequences']} sequences, {calibration['num_positions']} positions, "
                        f"{calibration['num_frames']} frames, dropped {calibration['dropped']}"),
        ("whole job, s", f"{facts['quantize_s']:.1f}"),
        *((f"... {name}, s", f"{seconds:.1f}") for name, seconds in facts["phases_s"].items() if seconds > 0.05),
        ("... of it Hessians / GPTQ, s", f"{facts['hessian_seconds']:.1f} / {facts['gptq_seconds']:.1f}"),
        ("peak GPU memory while quantizing, GB", gigabytes(facts["peak_device_bytes"])),
        ("peak GPU memory while the bf16 model speaks, GB", gigabytes(facts["peak_calibration_bytes"])),
        ("peak host memory, GB", gigabytes(facts["peak_host_bytes"])),
        ("output error, median / worst", f"{errors['median']:.4f} / {errors['worst']:.4f}"),
        ("output error of round-to-nearest, median", f"{errors['median_rtn']:.4f}"),
    ]  # fmt: skip
    for name, speech in facts["speech"].items():
        rows.append((f"{name}: speech, ms/frame (RTF)", f"{speech['ar_ms_per_frame']:.1f} ({speech['ar_rtf']:.2f})"))
        rows.append((f"{name}: peak GPU memory, GB", gigabytes(speech["peak_device_bytes"])))
        rows.append((f"{name}: load, s", f"{speech['load_s']:.1f}"))
        rows.append((f"{name}: sound finite, RMS", f"{speech['audio_is_finite']}, {speech['audio_rms']:.3f}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    title = f"# The whole job at the size {facts['size']}"
    return f"{title}\n\nWritten by `tools/gpu_check.py`.\n\n| | |\n|---|---|\n{table}\n"


if __name__ == "__main__":
    sys.exit(main())
