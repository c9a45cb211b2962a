"""`s2quant demo`: the whole job on a tiny checkpoint of random weights, on a CPU.

Random weights say nothing: the demo shows that every step works and where its files are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
from s2quant.export.random import tiny_config, write_random
from s2quant.export.verify import inspect_folder
from s2quant.files import atomic_folder, check_new
from s2quant.recipe import default_recipe
from s2quant.runtime.audio import write_wav
from s2quant.runtime.engine import load_engine
from s2quant.runtime.speech import Request

TEXT = "Hello [laughing] there."


def run_demo(out: Path, report: Callable[[str, int, int], None]) -> list[str]:
    """Make a checkpoint, quantize it, inspect both, speak with both.

    Args:
        out: The folder to make.
        report: Told of progress.

    Returns:
        Lines to print.

    Raises:
        UserError: The folder exists or cannot be written.
    """
    check_new(out)
    rows = [f"{'checkpoint':12} {'quantized':>9} {'bytes':>12} {'frames':>6} {'sound':>8} {'RTF':>6}"]
    with atomic_folder(out) as folder:
        report("random checkpoint", 0, 1)
        write_random(tiny_config(), folder / "bf16", seed=0)
        quantize_checkpoint(
            QuantizeOptions(recipe=default_recipe("tiny-w4a16"), model=folder / "bf16", out=folder / "w4a16"), report
        )
        for name in ("bf16", "w4a16"):
            report(f"speaking with {name}", 0, 1)
            found = inspect_folder(folder / name)
            assert not found.faults, found.faults
            engine = load_engine(folder / name)
            speech = engine.speak(Request(text=TEXT, seed=1))
            audio = engine.decode(speech.codes)
            rate = engine.codec.sample_rate if engine.codec else 0
            write_wav(folder / f"{name}.wav", audio, rate)
            seconds = len(audio) / rate
            rows.append(
                f"{name:12} {found.num_quantized:9} {found.num_bytes:12,} {speech.codes.shape[1]:6} "
                f"{seconds:6.2f} s {speech.seconds / seconds:6.2f}"
            )
    return [*rows, f"listen: {out / 'bf16.wav'} and {out / 'w4a16.wav'} (random weights: noise, but every step ran)"]
