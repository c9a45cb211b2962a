"""`python tools/preloaded.py LIBRARY.so ... -- WORDS`: load libraries of torch operations, then run `s2quant WORDS`.

gptqmodel compiles its kernels unless their operations are there already.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(arguments: list[str]) -> int:
    import torch

    from s2quant.cli import main as s2quant

    end = arguments.index("--")
    for library in arguments[:end]:
        torch.ops.load_library(library)
    return s2quant(arguments[end + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
