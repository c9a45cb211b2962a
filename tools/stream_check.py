"""Measure on one GPU what a listener meets: first sound, streams without gaps, memory, loading; fish-speech beside us.

    python tools/stream_check.py --out DIR --work /dev/shm/stream [--against CHECKOUT] [--only folders,tests,bench,...]

Makes a bf16 checkpoint of random weights of the real size under --work (11 GB) and a W4A16 one of the release's recipe
(6 GB; rounded to nearest, with a random act order that w1 and w3 share: the time does not depend on the numbers). All
else is done by `s2quant` commands in processes of their own, so that a part that fails or is out of memory loses
nothing else. The part "prompts", only where it is asked for, checks prompts read by graphs, and times first sounds
without graphs, with those of prompts, and with those of the codec too, as is usual. Writes DIR/stream.json after every
part, and what each command printed beside it. Folders that are there are used again. `--size tiny --device cpu` tries
the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PARTS = ("folders", "tests", "load", "bench", "memory", "against")
RECIPES = {"s2-pro": "s2-pro-w4a16.yaml", "tiny": "tiny-w4a16.yaml"}
FIRST = {
    "first-eager": ("--no-prompt-graphs", "--no-codec-graphs"),
    "first-prompt-graphs": ("--prompt-graphs", "--no-codec-graphs"),
    "first-graphs": ("--prompt-graphs",),  # the codec's by themselves, on a GPU
}
ROOM_FRAMES = 4000  # with the prompt nearly 4096 positions; all are spoken
LOAD = """
import json, sys, time
started = time.perf_counter()
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import Request
imported = time.perf_counter()
engine = load_engine(sys.argv[1], sys.argv[2], linears=sys.argv[3], num_slots=1, decoder="fast")
loaded = time.perf_counter()
next(engine.stream("Hello there.", max_frames=60))
ready = time.perf_counter()
print(json.dumps({"import_s": imported - started, "load_s": loaded - imported, "first_sound_s": ready - loaded}))
"""
SPEAK = """
import json, sys, torch
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import Request
limit = float(sys.argv[5]) * 1e9 if len(sys.argv) > 5 else None
folder, device, linears, frames = sys.argv[1:5]
engine = load_engine(
    folder, device, linears=linears, num_slots=1, decoder="fast", memory_limit_bytes=limit, encoder_on_host=True
)
text = "Hello there. This sentence is spoken."
samples = 0
for chunk, speech in engine.stream_request(Request(text=text, max_frames=int(frames), ignore_end=True)):
    samples += len(chunk)
peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
print(json.dumps({"samples": samples, "num_frames": speech.codes.shape[1], "peak_device_bytes": peak}))
"""


class Check:
    """The options, the clock, and what was found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.perf_counter()
        self.facts: dict[str, Any] = {"size": options.size, "device": options.device, "parts": {}}
        self.bf16, self.w4 = options.work / "bf16", options.work / "w4a16"

    def left(self) -> float:
        """Give the seconds that are left."""
        return self.options.seconds - (time.perf_counter() - self.started)

    def run(self, name: str, words: list[str], **environment: str) -> dict[str, Any]:
        """Run a command of s2quant, or of Python, within the time that is left; keep what it prints."""
        began = time.perf_counter()
        with (self.options.out / f"{name}.err").open("w") as errors:
            done = subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                timeout=max(1, self.left()),
            )
        (self.options.out / f"{name}.out").write_bytes(done.stdout)
        said = (self.options.out / f"{name}.err").read_text(errors="replace").strip().splitlines()
        return {
            "seconds": time.perf_counter() - began,
            "status": done.returncode,
            "last": done.stdout.decode(errors="replace").strip().splitlines()[-1:],
            "error": said[-4:] if done.returncode else [],
        }

    def bench(self, name: str, models: list[Path], *words: str) -> dict[str, Any]:
        """Run `s2quant bench`, its files under DIR/name."""
        options, arms = self.options, [part for model in models for part in ("--model", str(model))]
        decoder = ["--device", options.device, "--linears", options.linears, "--decoder", "fast", "--quiet"]
        out = ["--out", str(options.out / name)]
        return self.run(name, ["-m", "s2quant.cli", "bench", *arms, *decoder, *out, *words])


def folders(check: Check) -> dict[str, Any]:
    """Make both checkpoints."""
    from s2quant.export.random import CONFIGS, write_random

    seconds = {}
    for name, make in (("bf16", None), ("w4a16", quantized)):
        folder, began = check.options.work / name, time.perf_counter()
        if not folder.exists():
            if make is None:
                write_random(CONFIGS[check.options.size](), folder, device=check.options.device)
            else:
                make(check, folder)
        seconds[name] = time.perf_counter() - began
    sizes = {folder.name: sum(path.stat().st_size for path in folder.iterdir()) for folder in (check.bf16, check.w4)}
    return {"seconds": seconds, "bytes": sizes}


def quantized(check: Check, folder: Path) -> None:
    """Write the W4A16 folder."""
    from s2quant.checkpoint.reader import open_checkpoint
    from s2quant.checkpoint.writer import ShardWriter, carry_files
    from s2quant.export.config_files import merged_config, quantization_config
    from s2quant.files import atomic_folder, write_json
    from s2quant.packing import QuantizedWeight, pack
    from s2quant.quantize.plan import make_plan
    from s2quant.quantize.rtn import rtn_quantize
    from s2quant.recipe import load_recipe

    source = open_checkpoint(check.bf16)
    plan = make_plan(load_recipe(ROOT / "recipes" / RECIPES[check.options.size]), source.config)
    orders: dict[str, torch.Tensor] = {}
    with atomic_folder(folder) as partial:
        write_json(partial / "config.json", merged_config(source.config.raw, quantization_config(plan)))
        carry_files(check.bf16, partial)
        writer = ShardWriter(partial)
        for module in plan.modules:
            weight = source.weight(module.name, check.options.device)
            assert isinstance(weight, torch.Tensor)
            if module.settings is None:
                writer.add(module.name if module.kind == "bias" else f"{module.name}.weight", weight)
                continue
            inputs = weight.shape[1]
            order = orders.setdefault(module.name.replace(".w3", ".w1"), torch.randperm(inputs, device=weight.device))
            plain, _ = rtn_quantize(weight[:, order].float(), module.settings, module.name)
            back = torch.argsort(order)
            moved = {"codes": plain.codes[:, back].contiguous(), "g_idx": plain.g_idx[back].contiguous()}
            for part, tensor in pack(QuantizedWeight(**{**vars(plain), **moved})).items():
                writer.add(f"{module.name}.{part}", tensor)
        writer.finish()


def tests(check: Check) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    return check.run("tests", ["-m", "pytest", "-q", "-m", "gpu", "tests/runtime/test_runtime_gpu.py"])


def load(check: Check) -> dict[str, Any]:
    """Time from a new process to the first sound."""
    found = {}
    for folder in (check.bf16, check.w4):
        words = ["-c", LOAD, str(folder), check.options.device, check.options.linears]
        found[folder.name] = check.run(f"load-{folder.name}", words)
    return found


def bench(check: Check) -> dict[str, Any]:
    """Time frames, first sounds and streams of both checkpoints."""
    numbers = "1,8,32" if check.options.size == "s2-pro" else "1,3"
    return check.bench("bench", [check.bf16, check.w4], "--batch", numbers, "--streams", numbers, "--repeats", "2")


def prompts(check: Check) -> dict[str, Any]:
    """Check and time prompts read by graphs, and the first sounds without and with them."""
    options, found = check.options, {}
    sizes = [] if options.size == "s2-pro" else ["--lengths", "1,17,70", "--starts", "0,9", "--repeats", "1"]
    for folder in (check.bf16, check.w4):
        name = f"prompts-{folder.name}"
        words = ["tools/prompt_check.py", str(folder), "--out", str((options.out / f"{name}.json").resolve())]
        found[name] = check.run(name, [*words, "--device", options.device, "--linears", options.linears, *sizes])
    rounds = ("--batch", "1", "--frames", "60", "--repeats", "5" if options.size == "s2-pro" else "1")
    for name, switches in FIRST.items():
        found[name] = check.bench(name, [check.bf16, check.w4], *rounds, *switches)
    return found


def memory(check: Check) -> dict[str, Any]:
    """Speak with room for 4096 positions within less and less memory: the least that is enough is what it takes.

    Where torch's allocator fails for memory in pieces, its segments that expand are tried, too.
    """
    options = check.options
    count = ROOM_FRAMES if options.size == "s2-pro" else 40
    words = ["-c", SPEAK, str(check.w4), options.device, options.linears, str(count)]
    found = {}
    for limit in ("8", "7", "6.5", "6") if options.device.startswith("cuda") else (None,):
        name = f"memory-{limit}"
        limited = [*words, *([] if limit is None else [limit])]
        found[name] = check.run(name, limited)
        if found[name]["status"] != 0 and limit is not None:
            name += "-expandable"
            found[name] = check.run(name, limited, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    return found


def against(check: Check) -> dict[str, Any]:
    """Time fish-speech beside us, if there is one."""
    if check.options.against is None:
        return {"left out": "no --against"}
    words = ["--against", str(check.options.against), "--against-mode", check.options.against_mode]
    return check.bench("against", [check.bf16, check.w4], *words, "--frames", "100", "--repeats", "2")


def main() -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description="Measure first sound, streams, memory and loading on one GPU.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", choices=tuple(RECIPES), default="s2-pro")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--linears", default="auto")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--against-mode", default="both")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)},prompts")
    parser.add_argument("--seconds", type=float, default=560)
    check = Check(parser.parse_args())
    for folder in (check.options.out, check.options.work):
        folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for part in check.options.only.split(","):
        began = time.perf_counter()
        try:
            found = globals()[part](check)
        except Exception as error:  # noqa: BLE001 - the other parts are worth having
            found, failed = {"exception": "".join(traceback.format_exception(error))}, True
        check.facts["parts"][part] = {"took_s": time.perf_counter() - began} | found
        (check.options.out / "stream.json").write_text(json.dumps(check.facts, indent=1) + "\n")
        print(f"{part}: {json.dumps(check.facts['parts'][part])}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
