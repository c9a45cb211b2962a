"""How linears are best cut up on a Hopper GPU: written by `tools/speed_check.py`, part "tune". Nothing is measured yet.

Keys: kind, outputs, inputs, gated, groups of 8 rows. Values: warps, tiles, depth, columns. Others go by rule.
"""

from __future__ import annotations

TABLE: dict[tuple[str, int, int, bool, int], tuple[int, int, int, int]] = {}
