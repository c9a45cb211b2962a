"""Check and time the fast decoder's kernels on one GPU: linears, whole frames, exactness, a profile.

    python tools/speed_check.py --out DIR [--only kernels,linears,...] [--seconds 540]

Needs no files: weights are random, drawn on the device. Writes DIR/speed.json after every part and DIR/speed.md at
the end; a part that fails is recorded and does not lose the others. `--size tiny --device cpu` with
TRITON_INTERPRET=1 tries the script itself (an interpreter's times mean nothing).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PARTS = ("bandwidth", "kernels", "tune", "frames", "exact", "profile", "linears")
BATCHES = {"s2-pro": (1, 8, 32, 64), "tiny": (1,)}
ROWS = {"s2-pro": (1, 2, 4, 8, 16, 32, 64), "tiny": (1, 9)}
TUNED_ROWS = {"s2-pro": (1, 16, 32, 64), "tiny": (1,)}
LIMITS = {"out": 6e-3, "hidden": 1e-5, "squares": 1e-5}  # bf16 rounding of the result; float32 sums


class Check:
    """The options, what was found so far, and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.perf_counter()
        self.device = torch.device(options.device)
        self.until = self.started + options.seconds
        self.facts: dict[str, Any] = {}
        self.models: dict[str, Any] = {}

    def left(self, share: float = 1.0) -> float:
        """Give the moment when a share of the time left will have passed."""
        now = time.perf_counter()
        return now + share * max(0.0, self.until - now)

    def keep(self) -> None:
        """Write what was found."""
        (self.options.out / "speed.json").write_text(json.dumps(self.facts, indent=1, default=str) + "\n")

    def say(self, text: str) -> None:
        """Print with the time."""
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)


def config_of(size: str) -> Any:
    """Give the configuration of a size; the tiny one is one that the kernels take."""
    from s2quant.checkpoint.config import S2Config
    from s2quant.export.random import s2_pro_config, tiny_config

    if size == "s2-pro":
        return S2Config.from_json(s2_pro_config())
    raw = tiny_config()
    raw["text_config"] |= {"intermediate_size": 256}
    raw["audio_decoder_config"] |= {"intermediate_size": 256, "n_layer": 1}
    return S2Config.from_json(raw)


def sizes_of(config: Any) -> dict[str, int]:
    """Give the sizes that the linears have."""
    slow = config.slow
    return {
        "dim": slow.dim,
        "qkv": slow.qkv_dim,
        "heads": slow.n_head * slow.head_dim,
        "middle": slow.intermediate_size,
        "semantic": config.semantic_end_id - config.semantic_begin_id + 1,
        "residual": min(1024, config.codebook_size),
    }


def bandwidth(check: Check) -> dict[str, Any]:
    from tools.speed.timing import copy_bandwidth

    size = 4 << 30 if check.device.type == "cuda" else 1 << 24
    return {"copy_bytes_per_s": copy_bandwidth(check.device, size)}


def kernels(check: Check) -> list[dict[str, Any]]:
    from s2quant.runtime.kernels.linear import columns_for
    from tools.speed import linears

    found = []
    cases = linears.cases(sizes_of(config_of(check.options.size)))
    if check.device.type == "cuda":
        columns = {columns_for(rows): rows for rows in ROWS[check.options.size]}.values()
        wanted = [job for case in cases for rows in columns for job in linears.jobs(case, rows, False)]
        failed = linears.compile_all(wanted, min(14, os.cpu_count() or 1), check.left(0.3))
        check.say(f"{len(wanted)} kernels compiled, {failed} not")
    for case in cases:
        for rows in ROWS[check.options.size]:
            torch.manual_seed(rows)
            row: dict[str, Any] = {"case": f"{case.kind} {case.name}", "rows": rows}
            try:
                row["errors"] = linears.errors(case, rows, check.device)
                row["right"] = all(value <= LIMITS[name] for name, value in row["errors"].items())
            except Exception as error:  # noqa: BLE001 - one kernel that fails must not lose the rest
                row |= {"right": False, "failed": f"{type(error).__name__}: {str(error)[:1500]}"}
            if not row["right"]:
                check.say(f"WRONG {row}")
            found.append(row)
    check.say(f"{sum(row['right'] for row in found)} of {len(found)} products right")
    return found


def tune(check: Check) -> list[dict[str, Any]]:
    from s2quant.runtime.kernels import shapes
    from tools.speed import linears

    cases = linears.cases(sizes_of(config_of(check.options.size)))
    pairs = [(case, rows) for rows in TUNED_ROWS[check.options.size] for case in cases]
    if check.device.type == "cuda":
        wanted = [job for case, rows in pairs for job in linears.jobs(case, rows, True)]
        failed = linears.compile_all(wanted, min(14, os.cpu_count() or 1), check.left(0.35))
        check.say(f"{len(wanted)} shapes compiled, {failed} not")
    until, found = check.left(0.3), []
    for case, rows in pairs:
        try:
            row = linears.tune(case, rows, check.device, until)
        except Exception as error:  # noqa: BLE001 - see above
            check.say(f"tuning {case.kind} {case.name} {rows}: {type(error).__name__}: {str(error)[:500]}")
            continue
        shapes.TUNED[tuple(row["key"])] = row.pop("best")
        row["case"] = f"{case.kind} {case.name}"
        found.append(row)
        floor = row["bytes"] / check.facts.get("bandwidth", {}).get("copy_bytes_per_s", 4.26e12)
        check.say(
            f"{row['case']:16} M={rows:2} {row['us']:6.1f} us (waiting {row['us_waiting']:6.1f}, rule "
            f"{row['us_rule'] or 0:6.1f}, floor {1e6 * floor:5.1f}) {row['shape']} tried {row['tried'][:4]}"
        )
    return found


def linears_table(check: Check) -> list[dict[str, Any]]:
    from tools.speed import linears

    if check.device.type != "cuda":
        return []
    found, until = [], check.left(0.25)
    for case in linears.cases(sizes_of(config_of(check.options.size))):
        made = linears.make(case, check.device)
        weights = linears.copies(made.weight)
        from s2quant.runtime.kernels.linear import columns_for
        from s2quant.runtime.kernels.shapes import shape_for

        for rows in ROWS[check.options.size]:
            if time.perf_counter() > until:
                check.say("time is up for the table of linears")
                return found
            shape = shape_for(made.weight, columns_for(rows))
            row = {"case": f"{case.kind} {case.name}", "rows": rows, "bytes": made.weight.num_bytes}
            row["ours_us"] = 1e6 * linears.seconds_of(case, weights, rows, shape, check.device, True)
            row["cublas_us"] = 1e6 * linears.cublas_seconds(case, made, rows, check.device)
            if case.kind == "w4":
                row["tinygemm_us"] = 1e6 * linears.tinygemm_seconds(case, rows, check.device)
            found.append(row)
            check.say(" ".join(f"{name}={value:.1f}" if isinstance(value, float) else f"{name}={value}"
                               for name, value in row.items()))  # fmt: skip
    return found


def model_of(check: Check, name: str) -> Any:
    """Make a model once."""
    from tools.speed import frames

    if name in check.models:
        return check.models[name]
    if name == "bf16":
        check.models[name] = frames.random_model(config_of(check.options.size), check.device)
        check.say("bf16 model made")
    else:
        recipe = ROOT / "recipes" / ("s2-pro-w4a16.yaml" if check.options.size == "s2-pro" else "tiny-w4a16.yaml")
        made, count = frames.quantized_model(model_of(check, "bf16"), recipe, "triton", check.device)
        check.models[name] = made
        check.facts["w4a16_linears"] = count
        check.say(f"W4A16 model made: {count}")
    return check.models[name]


def frames_part(check: Check) -> list[dict[str, Any]]:
    from tools.speed import frames

    residual = min(1024, config_of(check.options.size).codebook_size)
    position = 480 if check.options.size == "s2-pro" else 40
    found: list[dict[str, Any]] = []
    check.facts["frames"] = found
    for batch in BATCHES[check.options.size]:
        for name in ("w4a16", "bf16"):
            model = model_of(check, name)
            plain = [] if batch not in (1, 32) or name == "w4a16" or check.device.type != "cuda" else [False]
            for fused in (True, *plain):
                try:
                    row = {"model": name, **frames.frame_times(model, batch, position, residual, fused)}
                except Exception as error:  # noqa: BLE001 - see above
                    check.say(f"{name} batch {batch}: {traceback.format_exc()[-2500:]}")
                    row = {"model": name, "batch": batch, "failed": f"{type(error).__name__}: {str(error)[:500]}"}
                found.append(row)
                check.keep()
                check.say(str({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}))
    return found


def exact_part(check: Check) -> dict[str, Any]:
    from tools.speed import frames

    config = config_of(check.options.size)
    residual = min(1024, config.codebook_size)
    big = check.options.size == "s2-pro"
    models = {name: model_of(check, name) for name in ("bf16", "w4a16")}
    found: dict[str, Any] = {}
    prompt, forced, position, drawn = (40, 200, 300, 20) if big else (12, 2, 20, 1)

    def replayed(name: str, batch: int) -> dict[str, Any]:
        return frames.graph_is_eager(models[name], batch, position, residual, drawn)

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "teacher_forced": lambda: frames.exactness(models, prompt, forced, residual),
        "graph_bf16": lambda: replayed("bf16", 3),
        "graph_w4a16": lambda: replayed("w4a16", 8 if big else 2),
    }
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # noqa: BLE001 - see above
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
            check.say(traceback.format_exc()[-2500:])
        check.say(f"{name}: {json.dumps(found[name])}")
    return found


def profile_part(check: Check) -> dict[str, Any]:
    from tools.speed import frames

    if check.device.type != "cuda":
        return {}
    found: dict[str, Any] = {}
    for name, batch in (("w4a16", 1), ("bf16", 1), ("w4a16", 32), ("w4a16", 64)):
        decoder = frames.seated(model_of(check, name), batch, 480, 1024, fused=True, graphs=None)
        decoder.launch(batch).columns()
        graph = next(iter(decoder._graphs.values()))
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                graph.replay()
            torch.cuda.synchronize()
        rows = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)[:25]
        table = [[event.key[:60], event.count / 3, event.device_time_total / 3] for event in rows]
        found[f"{name} batch {batch}"] = table
        check.say(f"{name} batch {batch}: kernel, launches per frame, us per frame")
        for key, count, total in table:
            print(f"    {key:60} {count:6.0f} {total:9.1f}  ({total / max(count, 1):6.2f} each)", flush=True)
    return found


WORK: dict[str, Callable[[Check], Any]] = {
    "bandwidth": bandwidth,
    "kernels": kernels,
    "tune": tune,
    "linears": linears_table,
    "frames": frames_part,
    "exact": exact_part,
    "profile": profile_part,
}


def markdown(facts: dict[str, Any]) -> str:
    """Put the facts into a page."""
    lines = ["# Speed of the fast decoder", "", f"Device: {facts['device']}. Written by `tools/speed_check.py`.", ""]
    speed = facts.get("bandwidth", {}).get("copy_bytes_per_s")
    if speed:
        lines += [f"Copy bandwidth {speed / 1e12:.2f} TB/s.", ""]
    frames = [row for row in facts.get("frames", []) if "ms" in row]
    if frames:
        lines += ["| model | batch | kernels | ms/frame | in the engine's loop | RTF | s of audio per s | ready, s |"]
        lines += ["|---|--:|---|--:|--:|--:|--:|--:|"]
        lines += [
            f"| {row['model']} | {row['batch']} | {'fused' if row['fused'] else 'plain PyTorch'} | {row['ms']:.2f} | "
            f"{row['ms_loop']:.2f} | {row['rtf']:.3f} | {row['audio_s_per_s']:.0f} | {row['ready_s']:.1f} |"
            for row in frames
        ]
        lines.append("")
    linears = facts.get("linears") or []
    if linears:
        lines += [
            "| linear | rows | ours, us | cuBLAS bf16, us | torch int4, us | floor, us |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for row in linears:
            floor = "" if not speed else f"{1e6 * row['bytes'] / speed:.1f}"
            other = f"{row['tinygemm_us']:.1f}" if "tinygemm_us" in row else ""
            lines.append(
                f"| {row['case']} | {row['rows']} | {row['ours_us']:.1f} | {row['cublas_us']:.1f} | {other} | {floor} |"
            )
        lines.append("")
    if "exact" in facts:
        lines += ["```json", json.dumps(facts["exact"], indent=1), "```", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--size", choices=sorted(BATCHES), default="s2-pro")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=540, help="parts begin only while there is time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options)
    if check.device.type == "cuda":
        check.facts["device"] = torch.cuda.get_device_name()
    else:
        check.facts["device"] = str(check.device)
    import triton

    check.facts |= {"torch": torch.__version__, "triton": triton.__version__, "parts_s": {}}
    failed = 0
    for name in options.only.split(","):
        if time.perf_counter() > check.until:
            check.say(f"no time for {name}")
            check.facts[name] = "no time"
            continue
        started = time.perf_counter()
        try:
            check.facts[name] = WORK[name](check)
        except Exception as error:  # noqa: BLE001 - see above
            failed += 1
            check.facts[f"{name}_failed"] = f"{type(error).__name__}: {str(error)[:2000]}"
            check.say(f"{name} failed: {traceback.format_exc()[-3000:]}")
        check.facts["parts_s"][name] = time.perf_counter() - started
        check.say(f"{name}: {time.perf_counter() - started:.1f} s")
        check.keep()
    page = markdown(check.facts)
    (options.out / "speed.md").write_text(page)
    if check.facts.get("tune"):
        print("TUNED:", json.dumps([[*row["key"], row["shape"]] for row in check.facts["tune"]]))
    print(page)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
