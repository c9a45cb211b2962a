"""Time linears on a CPU: what the model's quantized linears cost there, by backend, against bf16.

    python tools/cpu_linear_speed.py [--threads 1] [--repeats 100] [--rows 1,8,256] [--group-size 32]

The shapes are those of Fish Audio S2 Pro and of s2-mini, the inputs in act order. All ways take turns, so that other
work on the machine meets them alike: a figure is the median of its times, and its ratio to bf16 that of the two medians
(below 1 is faster). "auto 4" and "auto 8" are what the runtime chooses for 4 and 8 bits, the backend beside them.
`--repeats` is for one row of a small shape; large products are timed less often, never less than 5 times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SHAPES = (  # outputs, inputs: wqkv, wo, w1 and w2 of S2 Pro, then s2-mini's
    *((6144, 2560), (2560, 4096), (9728, 2560), (2560, 9728)),
    *((512, 256), (256, 256), (768, 256), (256, 768)),
)
BIG = 2**24  # products of one call that take about as long as 100 calls of a small linear


def times_ms(ways: dict[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> dict[str, float]:
    """Time some ways in turns.

    Args:
        ways: Name to linear.
        x: bf16 [rows, inputs].
        repeats: Turns; one more is warm-up.

    Returns:
        Name to the median, ms.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, call in ways.items():
            started = time.perf_counter()
            call(x)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(some[1:]) for name, some in seconds.items()}


def linears(out_features: int, in_features: int, group_size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Make a dense linear, what "auto" makes of it in 4 and 8 bits, and the reference in 8 bits.

    Args:
        out_features: Outputs.
        in_features: Inputs.
        group_size: Inputs that share a scale.

    Returns:
        Name to linear.
    """
    from s2quant.quantize.rtn import rtn_quantize
    from s2quant.recipe import LinearSettings
    from s2quant.runtime.linears import make_linear

    weight = torch.randn(out_features, in_features).bfloat16()
    order = torch.randperm(in_features)  # as act order leaves it: the activations have to be gathered
    found: dict[str, Callable[[Tensor], Tensor]] = {"bf16": lambda x: F.linear(x, weight)}
    for bits in (4, 8):
        plain, _ = rtn_quantize(weight, LinearSettings(bits=bits, group_size=group_size, desc_act=False))
        shuffled = replace(plain, codes=plain.codes[:, order], g_idx=plain.g_idx[order])
        linear = make_linear(shuffled, torch.bfloat16)
        found[f"auto {bits} ({linear.backend})"] = linear
    return found | {"reference 8": make_linear(shuffled, torch.bfloat16, "reference")}


@torch.inference_mode()
def main() -> None:
    """Time all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--rows", default="1,8,256")
    parser.add_argument("--group-size", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s)")
    for out_features, in_features in SHAPES:
        ways = linears(out_features, in_features, options.group_size)
        for rows in map(int, options.rows.split(",")):
            repeats = min(options.repeats, max(5, options.repeats * BIG // (rows * out_features * in_features)))
            found = times_ms(ways, torch.randn(rows, in_features).bfloat16(), repeats)
            texts = (f"{name} {ms:.3f} ms ({ms / found['bf16']:.2f})" for name, ms in found.items())
            print(f"{in_features} -> {out_features}, {rows} rows: " + ", ".join(texts), flush=True)


if __name__ == "__main__":
    main()
