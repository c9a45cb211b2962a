"""The training code of s2-mini lies in tools/, which is not a package of ours."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
