"""Time one token through a linear of the real size on a CPU: bf16 against the int4 backend.

python tools/cpu_linear_speed.py [--threads 1] [--repeats 200]
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

SHAPES = ((9728, 2560), (2560, 9728))  # outputs, inputs: w1 and w2


def median_ms(call: Callable[[Tensor], Tensor], x: Tensor, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        call(x)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[5:])


@torch.inference_mode()
def main() -> None:
    from s2quant.quantize.rtn import rtn_quantize
    from s2quant.recipe import LinearSettings
    from s2quant.runtime.linears import make_linear

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for rows, columns in SHAPES:
        weight, x = torch.randn(rows, columns).bfloat16(), torch.randn(1, columns).bfloat16()
        plain, _ = rtn_quantize(weight, LinearSettings(desc_act=False))
        order = torch.randperm(columns)  # as act order leaves it: the activations have to be gathered
        linear = make_linear(replace(plain, codes=plain.codes[:, order], g_idx=plain.g_idx[order]), torch.bfloat16)
        assert linear.backend == "int4"
        dense = median_ms(lambda x, weight=weight: F.linear(x, weight), x, options.repeats)
        int4 = median_ms(linear, x, options.repeats)
        print(f"{columns} -> {rows}: bf16 {dense:.2f} ms, int4 {int4:.2f} ms, {dense / int4:.1f} times as fast")


if __name__ == "__main__":
    main()
