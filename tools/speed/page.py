"""What the speed check found, as a page."""

from __future__ import annotations

import json
from typing import Any


def markdown(facts: dict[str, Any]) -> str:
    """Put the facts into a page."""
    about = f"Device: {facts['device']}, torch {facts['torch']}, Triton {facts['triton']}."
    lines = ["# Speed of the fast decoder", "", f"{about} Written by `tools/speed_check.py`.", ""]
    speeds = facts.get("bandwidth", {})
    rates = {name: value for name, value in speeds.items() if name.endswith("_bytes_per_s")}
    if rates:
        words = ", ".join(f"{name.removesuffix('_bytes_per_s')} {value / 1e12:.2f}" for name, value in rates.items())
        lines += [f"Memory, TB/s: {words}.", ""]
    if any("errors" in row for row in facts.get("kernels", [])):
        rows = [row for row in facts["kernels"] if "right" in row]
        lines += [f"{sum(row['right'] for row in rows)} of {len(rows)} products right against float64.", ""]
    lines += _frames(facts) + _variants(facts) + _linears(facts, speeds.get("read_bytes_per_s"))
    for table in facts.get("profile", []):
        if "kernels" not in table:
            continue
        lines += [f"Profile of {table['frame']}:", "", "| kernel | launches | us per frame |", "|---|--:|--:|"]
        lines += [f"| {key} | {count:.0f} | {total:.1f} |" for key, count, total in table["kernels"][:14]] + [""]
    if facts.get("exact"):
        lines += ["```json", json.dumps(facts["exact"], indent=1), "```", ""]
    return "\n".join(lines)


def _frames(facts: dict[str, Any]) -> list[str]:
    rows = [row for row in facts.get("frames", []) if "ms" in row]
    if not rows:
        return []
    head = [
        "| model | batch | kernels | ms/frame | in the engine's loop | RTF | s of audio per s | ready, s |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    return [
        *head,
        *(
            f"| {row['model']} | {row['batch']} | {'fused' if row['fused'] else 'plain PyTorch'} | {row['ms']:.2f} | "
            f"{row['ms_loop']:.2f} | {row['rtf']:.3f} | {row['audio_s_per_s']:.0f} | {row['ready_s']:.1f} |"
            for row in rows
        ),
        "",
    ]


def _variants(facts: dict[str, Any]) -> list[str]:
    rows = [row for row in facts.get("variants", []) if "ms" in row]
    if not rows:
        return []
    whole = {(row["model"], row["batch"]): row["ms"] for row in rows if row["how"] == "as used"}
    lines = ["| model | batch | launched | ms/frame | more than as used |", "|---|--:|---|--:|--:|"]
    for row in rows:
        best = whole.get((row["model"], row["batch"]))
        more = "" if best is None else f"{row['ms'] - best:+.3f}"
        lines.append(f"| {row['model']} | {row['batch']} | {row['how']} | {row['ms']:.3f} | {more} |")
    return [*lines, ""]


def _linears(facts: dict[str, Any], speed: float | None) -> list[str]:
    rows = [row for row in facts.get("linears", []) if "ours_us" in row]
    if not rows:
        return []
    names = list(dict.fromkeys(key for row in rows for key in row if key.endswith("_us")))
    head = ["linear", "rows", *(f"{name.removesuffix('_us')}, us" for name in names), "floor, us"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for row in rows:
        cells = [f"{row[name]:.1f}" if name in row else "" for name in names]
        floor = "" if speed is None else f"{1e6 * row['bytes'] / speed:.1f}"
        lines.append("| " + " | ".join([row["case"], str(row["rows"]), *cells, floor]) + " |")
    return [*lines, ""]
