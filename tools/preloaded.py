"""`python tools/preloaded.py [--profile DIR | --parts DIR | --trace DIR] LIB.so ... -- WORDS`: `s2quant`, watched.

gptqmodel compiles its kernels unless their operations are there already, in libraries loaded before. With --profile,
what the host did is written to DIR/profile-RANK.txt: Python's functions by their own time and by all of it, and the
package's own (a wait for a GPU counts where it is). With --parts, how long the parts of quantizing took, each with its
GPU waited for, to DIR/parts-RANK.json. With --trace, what the GPU waits for in some of the stages that are quantized,
to DIR/trace-RANK.json.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

FUNCTIONS = 60  # of each list


def main(arguments: list[str]) -> int:
    import torch

    from s2quant.cli import main as s2quant

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--parts", type=Path)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("libraries", nargs="*")
    end = arguments.index("--")
    options, words = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    for library in options.libraries:
        torch.ops.load_library(library)
    rank = os.environ.get("RANK", "0")
    profile, parts = cProfile.Profile(), None
    if options.parts is not None:
        from parts import QUANTIZING, SOLVER, Parts

        parts = Parts([*QUANTIZING, *SOLVER])
    if options.trace is not None:
        from traced import Trace

        Trace(options.trace / f"trace-{rank}.json")
    try:
        return profile.runcall(s2quant, words) if options.profile is not None else s2quant(words)
    finally:
        if options.profile is not None:
            with (options.profile / f"profile-{rank}.txt").open("w") as file:
                stats = pstats.Stats(profile, stream=file)
                for order in ("tottime", "cumulative"):
                    stats.sort_stats(order).print_stats(FUNCTIONS)
                stats.sort_stats("cumulative").print_stats("s2quant/(quantize|calibrate|export)/", FUNCTIONS)
        if parts is not None:
            from s2quant.files import write_json

            write_json(options.parts / f"parts-{rank}.json", parts.table())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
