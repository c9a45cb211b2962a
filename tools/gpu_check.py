"""Quantize a random checkpoint of the real size on one GPU, verify it, speak with it, and write what was measured.

    python tools/gpu_check.py --out reports/2026-01-01-real-size [--work DIR] [--sequences 32] [--model DIR]

Needs about 25 GB of disk under --work. With --model the bf16 checkpoint given is used instead of a random one.
`--preload FILE.so` loads torch extension libraries first (prebuilt kernels of gptqmodel, so that nothing is compiled).
Writes report.json and report.md; exits 1 if a count is not what the release's recipe calls for.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

EXPECTED = {"quantized": 171, "dense": 30, "tensors": 871, "tensor_bytes": 4_238_063_616}
TEXT = "Hello [laughing] there. This sentence is spoken by a model of the real size."


class Phases:
    """Seconds by phase, from the progress reports of the job itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.name, self.since = "start", time.perf_counter()

    def __call__(self, phase: str, done: int, total: int) -> None:
        name = "quantizing" if phase.startswith(("text_model", "audio_decoder")) else phase
        if name != self.name:
            now = time.perf_counter()
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self.since
            self.name, self.since = name, now
            print(f"  {name} ...", flush=True)


def timed_speech(folder: Path, num_frames: int) -> dict[str, Any]:
    """Speak once to warm up and once for the clock; eager PyTorch, batch 1."""
    from s2quant import load_engine
    from s2quant.runtime.speech import Request

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    engine = load_engine(folder, device="cuda", num_slots=1)
    torch.cuda.synchronize()
    load_s = time.perf_counter() - started
    speech, seed = engine.speak(Request(text=TEXT, seed=0, max_frames=8)), 0
    for seed in range(1, 20):  # random weights end when they like: take the first long enough
        torch.cuda.synchronize()
        started = time.perf_counter()
        speech = engine.speak(Request(text=TEXT, seed=seed, max_frames=num_frames))
        torch.cuda.synchronize()
        ar_s = time.perf_counter() - started
        if speech.codes.shape[1] >= num_frames // 2:
            break
    engine.decode(speech.codes)
    torch.cuda.synchronize()
    started = time.perf_counter()
    audio = engine.decode(speech.codes)
    torch.cuda.synchronize()
    codec_s = time.perf_counter() - started
    frames = speech.codes.shape[1]
    return {
        "load_s": load_s,
        "seed": seed,
        "frames": frames,
        "stop_reason": speech.stop_reason,
        "ar_ms_per_frame": 1e3 * ar_s / frames,
        "ar_rtf": ar_s / (frames * 2048 / 44100),
        "codec_s": codec_s,
        "audio_s": len(audio) / 44100,
        "audio_is_finite": bool(torch.isfinite(audio).all()),
        "audio_rms": float(audio.square().mean().sqrt()),
        "peak_device_bytes": torch.cuda.max_memory_allocated(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/s2quant-gpu-check"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "s2-pro-w4a16.yaml")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--commit", help="the commit, when the files are no checkout")
    parser.add_argument("--preload", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    for library in options.preload:
        torch.ops.load_library(str(library.resolve()))
    from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
    from s2quant.export.random import s2_pro_config, write_random
    from s2quant.export.verify import inspect_folder
    from s2quant.records import git_commit, versions

    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "host": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "commit": git_commit() or options.commit,
        "versions": versions(),
        "recipe": options.recipe.name,
        "sequences": options.sequences,
    }
    model = options.model or options.work / "bf16"
    if options.model is None:
        print("random checkpoint of the real size ...", flush=True)
        started = time.perf_counter()
        write_random(s2_pro_config(), model, seed=0, device="cuda")
        facts["random_s"] = time.perf_counter() - started
    print("quantize ...", flush=True)
    torch.cuda.empty_cache()
    phases, started = Phases(), time.perf_counter()
    out = options.work / "w4a16"
    records = quantize_checkpoint(
        QuantizeOptions(
            recipe=options.recipe,
            model=model,
            out=out,
            device="cuda",
            num_sequences=options.sequences,
            num_slots=options.slots,
        ),
        phases,
    )
    facts["quantize_s"] = time.perf_counter() - started
    facts["phases_s"] = phases.seconds
    manifest = json.loads((out / "manifest.json").read_text())
    for key in ("peak_device_bytes", "peak_calibration_bytes"):
        facts[key] = manifest[key]
    facts["calibration"] = manifest["inputs"]["calibration"]
    errors = sorted(record["output_error"] for record in records)
    rtn = sorted(record["output_error_rtn"] for record in records)
    facts["output_error"] = {"median": errors[len(errors) // 2], "worst": errors[-1], "median_rtn": rtn[len(rtn) // 2]}
    facts["gptq_seconds"] = sum(record["seconds"] for record in records)
    facts["hessian_seconds"] = sum(record["hessian_seconds"] for record in records)
    facts["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = inspect_folder(out)
    facts["inspect"] = {key: value for key, value in found.to_json().items() if key != "modules"}
    facts["speech"] = {name: timed_speech(folder, options.frames) for name, folder in (("bf16", model), ("w4a16", out))}
    facts["counts_right"] = options.model is not None or all(facts["inspect"][k] == v for k, v in EXPECTED.items())
    (options.out / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
    (options.out / "report.md").write_text(markdown(facts))
    print(markdown(facts))
    shutil.rmtree(options.work)
    return 0 if facts["counts_right"] and not found.faults else 1


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
        ("peak GPU memory while quantizing, GB", f"{facts['peak_device_bytes'] / 1e9:.2f}"),
        ("peak GPU memory while the bf16 model speaks, GB", f"{(facts['peak_calibration_bytes'] or 0) / 1e9:.2f}"),
        ("peak host memory, GB", f"{facts['peak_host_bytes'] / 1e9:.1f}"),
        ("output error, median / worst", f"{errors['median']:.4f} / {errors['worst']:.4f}"),
        ("output error of round-to-nearest, median", f"{errors['median_rtn']:.4f}"),
    ]  # fmt: skip
    for name, speech in facts["speech"].items():
        rows.append(
            (f"{name}: eager speech, ms/frame (RTF)", f"{speech['ar_ms_per_frame']:.1f} ({speech['ar_rtf']:.2f})")
        )
        rows.append((f"{name}: peak GPU memory, GB", f"{speech['peak_device_bytes'] / 1e9:.2f}"))
        rows.append((f"{name}: load, s", f"{speech['load_s']:.1f}"))
        rows.append((f"{name}: sound finite, RMS", f"{speech['audio_is_finite']}, {speech['audio_rms']:.3f}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"# The real size on one GPU\n\nWritten by `tools/gpu_check.py`.\n\n| | |\n|---|---|\n{table}\n"


if __name__ == "__main__":
    sys.exit(main())
