"""`python tools/preloaded.py [--profile DIR] LIBRARY.so ... -- WORDS`: run `s2quant WORDS` with libraries loaded.

gptqmodel compiles its kernels unless their operations are there already. With --profile, what the host did is written
to DIR/profile-RANK.txt: Python's functions by their own time and by all of it (a wait for a GPU counts where it is).
"""

from __future__ import annotations

import cProfile
import os
import pstats
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FUNCTIONS = 60  # of each list


def main(arguments: list[str]) -> int:
    import torch

    from s2quant.cli import main as s2quant

    end = arguments.index("--")
    before, words = arguments[:end], arguments[end + 1 :]
    folder = Path(before[1]) if before[:1] == ["--profile"] else None
    for library in before[2 if folder else 0 :]:
        torch.ops.load_library(library)
    if folder is None:
        return s2quant(words)
    profile = cProfile.Profile()
    try:
        return profile.runcall(s2quant, words)
    finally:
        with (folder / f"profile-{os.environ.get('RANK', '0')}.txt").open("w") as file:
            stats = pstats.Stats(profile, stream=file).strip_dirs()
            for order in ("tottime", "cumulative"):
                stats.sort_stats(order).print_stats(FUNCTIONS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
