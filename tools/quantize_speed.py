"""Time the quantizing of a few layers of the real size, by one process and by several, and hold the results together.

    python tools/quantize_speed.py --out OUT [--layers 4] [--sequences 256] [--processes 1,2] [--parts] [--trace]

The model has random weights and so many layers of the Slow AR, all of whose linears are quantized; the calibration
sequences are random codes of full length, so that no time goes into speaking them. Each number of processes quantizes
by `s2quant quantize`, several started by `accelerate launch`; with --parts once more, with every part of the work
waited for (parts-RANK.json; such a run is slower as a whole), with --trace once more, with torch's profiler over some
stages (trace-RANK.json, 6 layers or more); with --profile what the hosts did, too. Writes
OUT/quantize_speed.json after every run. Exit status 1: a run failed, or its tensors differ from the first one's.
`--size tiny --device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launched import Launcher  # noqa: E402
from low_memory_check import RECIPES, unequal  # noqa: E402

from s2quant.calibrate.sequences import CalibrationSet, save_set  # noqa: E402
from s2quant.checkpoint.config import S2Config  # noqa: E402
from s2quant.checkpoint.reader import open_checkpoint  # noqa: E402
from s2quant.export.calibration import calibration_lines, set_key  # noqa: E402
from s2quant.export.random import CONFIGS, write_random  # noqa: E402
from s2quant.files import write_json  # noqa: E402
from s2quant.recipe import load_recipe  # noqa: E402
from s2quant.records import folder_hashes, git_commit, versions  # noqa: E402
from s2quant.runtime.load import device_name, parse_device  # noqa: E402

TEXT_POSITIONS = 128  # before the frames of a sequence, of the 1024 at the real size


def slow_recipe(source: Path, out: Path) -> Path:
    """Write a copy of a recipe that quantizes all linears of the Slow AR, and nothing else.

    Args:
        source: The recipe.
        out: The copy.

    Returns:
        The copy.
    """
    raw = yaml.safe_load(source.read_text("utf-8"))
    raw["calibration"]["source"] = str((source.parent / raw["calibration"]["source"]).resolve())
    layers = "text_model.model.layers.*"
    raw["rules"] = [
        {"keep": "text_model.model.embeddings"},
        {"keep": "audio_decoder.**"},
        {"quantize": f"{layers}.attention.{{wqkv,wo}}"},
        {"quantize": f"{layers}.feed_forward.{{w1,w3,w2}}"},
    ]
    out.write_text(yaml.safe_dump(raw, sort_keys=False), "utf-8")
    return out


def random_sequence(config: S2Config, length: int, seed: int) -> torch.Tensor:
    """Draw a calibration sequence: text, then frames.

    Args:
        config: The model's configuration.
        length: Positions.
        seed: Seed.

    Returns:
        int64 [1+N, length].
    """
    generator = torch.Generator().manual_seed(seed)
    text = min(TEXT_POSITIONS, length // 2)
    codes = torch.randint(config.fast.vocab_size, (1 + config.num_codebooks, length), generator=generator)
    codes[1:, :text] = 0
    codes[0, :text] = torch.randint(1, 200, (text,), generator=generator)
    semantic = config.semantic_end_id - config.semantic_begin_id + 1
    codes[1, text:] %= semantic
    codes[0, text:] = config.semantic_begin_id + codes[1, text:]
    return codes


def write_set(recipe_path: Path, model: Path, num_sequences: int, out: Path) -> None:
    """Store random sequences as the calibration set of a recipe and a model."""
    recipe, checkpoint = load_recipe(recipe_path), open_checkpoint(model)
    lines = calibration_lines(recipe, None, num_sequences)
    length = recipe.calibration.max_positions
    made = CalibrationSet(
        ids=tuple(line.id for line in lines),
        sequences=tuple(random_sequence(checkpoint.config, length, seed) for seed in range(len(lines))),
        dropped={},
        key=set_key(recipe, lines, folder_hashes(model)),
    )
    save_set(made, out)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "s2quant-quantize-speed")
    parser.add_argument("--size", choices=tuple(RECIPES), default="s2-pro")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--processes", default="1", help="numbers of processes, in turn: 1,2")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--seconds", type=float, default=150, help="of one run")
    parser.add_argument("--commit", help="the commit, when the files are no checkout")
    parser.add_argument("--preload", type=Path, nargs="*", default=[], help="libraries of torch operations")
    return parser.parse_args(words)


def prepared(options: argparse.Namespace) -> dict[str, Path]:
    """Make model, recipe and calibration set under --work."""
    work = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    raw = CONFIGS[options.size]()
    raw["text_config"]["n_layer"] = options.layers
    paths = {"model": work / "bf16", "calibration": work / "calibration.safetensors", "work": work}
    write_random(raw, paths["model"], device=options.device, ends=False)
    paths["recipe"] = slow_recipe(ROOT / "recipes" / RECIPES[options.size], work / "recipe.yaml")
    write_set(paths["recipe"], paths["model"], options.sequences, paths["calibration"])
    return paths


def run(options: argparse.Namespace, paths: Mapping[str, Path], processes: int, watch: str) -> dict[str, Any]:
    """Quantize once; say how long the phases took, and what differs from the first run's folder."""
    name = f"by{processes}{f'-{watch}' if watch else ''}"
    watched = options.out.absolute() / name
    watched.mkdir(exist_ok=True)
    launcher = Launcher(
        num_processes=processes,
        preload=options.preload,
        log=watched / "log.txt",
        profile=watched if options.profile and not watch else None,
        parts=watched if watch == "parts" else None,
        trace=watched if watch == "trace" else None,
    )
    out, first = paths["work"] / name, paths["work"] / "first"
    partial = out.with_name(f"{name}.partial")
    words = ["quantize", str(paths["recipe"]), "--model", str(paths["model"]), "--out", str(out), "--quiet"]
    words += ["--device", options.device, "--sequences", str(options.sequences)]
    words += ["--calibration", str(paths["calibration"])]
    phases = {
        "start": [partial / "run.json"],
        "quantizing": [partial / "stages" / "*"],
        "writing": [out / "manifest.json"],
    }
    facts = launcher.run(words, processes > 1, options.seconds, phases)
    if facts["status"] == 0:
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        facts |= {key: manifest[key] for key in ("peak_device_bytes", "peak_host_bytes")}
        modules = json.loads((out / "s2quant" / "records.json").read_text("utf-8"))["modules"]
        facts["gptq_seconds"] = sum(module["seconds"] for module in modules)
        facts["hessian_seconds"] = sum(module["hessian_seconds"] for module in modules)
        if first.exists():
            facts["unequal"] = unequal(first, out)
            shutil.rmtree(out)
        else:
            out.rename(first)
    if watch:
        found = sorted(watched.glob(f"{watch}-*.json"))
        facts[watch] = {path.stem: json.loads(path.read_text("utf-8")) for path in found}
    return facts


def main(words: Sequence[str] | None = None) -> int:
    """Make a model, quantize it in turn, and write what was measured."""
    options = arguments(words)
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    paths = prepared(options)
    facts: dict[str, Any] = {
        "device": device_name(parse_device(options.device)),
        "commit": options.commit or git_commit(),
        "versions": versions(),
        "layers": options.layers,
        "sequences": options.sequences,
        "prepared_s": time.perf_counter() - began,
        "runs": {},
    }
    failed = False
    for processes in (int(word) for word in options.processes.split(",")):
        for watch in ("", *(["parts"] if options.parts else []), *(["trace"] if options.trace else [])):
            found = run(options, paths, processes, watch)
            facts["runs"][f"{processes} {watch}".rstrip()] = found
            failed |= found["status"] != 0 or bool(found.get("unequal"))
            write_json(options.out / "quantize_speed.json", facts)
    print(json.dumps(facts, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
