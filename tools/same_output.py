"""Whether two runs made the same: every file to the byte, but for times and for who did the work.

What is left out of a comparison is named here, in one place, and said in what the tools write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from s2quant.files import sha256_file

MOST_NAMED = 20
EVAL_LEFT_OUT = {
    "records.jsonl: wall_s": "how long a clip took",
    "run.json, work/*.jsonl": "work in progress, a file for each process; records.jsonl is made of them",
}
QUANTIZE_LEFT_OUT = {
    "manifest.json: peak_device_bytes, peak_calibration_bytes, peak_host_bytes, num_processes, processes": (
        "who did the work, and what memory that took"
    ),
    "s2quant/records.json: seconds, hessian_seconds": "how long a linear took",
}
_MANIFEST = ("peak_device_bytes", "peak_calibration_bytes", "peak_host_bytes", "num_processes", "processes")
_MODULE = ("seconds", "hessian_seconds")


def compare_quantized(one: Path, other: Path) -> dict[str, Any]:
    """Compare two folders that `s2quant quantize` made.

    Args:
        one: A folder.
        other: Another.

    Returns:
        equal, differences (sentences), left_out, and how many files and bytes were compared.
    """
    apart = {"manifest.json", "s2quant/records.json"}
    files = _files(one, "**/*") | _files(other, "**/*")
    faults = [*_files_faults(one, other, files - apart)]
    manifests = [_without(_read(folder / "manifest.json"), _MANIFEST) for folder in (one, other)]
    faults += _value_faults("manifest.json", *manifests)
    modules = [_read(folder / "s2quant" / "records.json")["modules"] for folder in (one, other)]
    faults += _row_faults("s2quant/records.json", *({row["module"]: _without(row, _MODULE) for row in rows}
                                                    for rows in modules))  # fmt: skip
    return _found(faults, QUANTIZE_LEFT_OUT, one, files) | {"linears": len(modules[0])}


def compare_runs(one: Path, other: Path) -> dict[str, Any]:
    """Compare two folders that `s2quant eval` made, without timings.

    Args:
        one: A folder.
        other: Another.

    Returns:
        As `compare_quantized`, with the number of records.
    """
    rows = [[json.loads(line) for line in (folder / "records.jsonl").read_text("utf-8").splitlines()]
            for folder in (one, other)]  # fmt: skip
    faults = [f"{len(some) - len(_by_clip(some))} records name a clip twice" for some in rows
              if len(_by_clip(some)) != len(some)]  # fmt: skip
    faults += _row_faults("records.jsonl", *map(_by_clip, rows))
    same = ("results.json", "summary.csv", "manifest.json", "audio/**/*", "work/voices/*",
            "work/sequences/*", "work/tokens/damage-*")  # fmt: skip
    files = {name for folder in (one, other) for pattern in same for name in _files(folder, pattern)}
    faults += _files_faults(one, other, files)
    return _found(faults, EVAL_LEFT_OUT, one, files) | {"records": len(rows[0])}


def _found(faults: list[str], left_out: Mapping[str, str], folder: Path, files: Iterable[str]) -> dict[str, Any]:
    compared = [folder / name for name in files if (folder / name).is_file()]
    return {
        "equal": not faults,
        "num_differences": len(faults),
        "differences": faults[:MOST_NAMED],
        "left_out": dict(left_out),
        "files": len(compared),
        "bytes": sum(path.stat().st_size for path in compared),
    }


def _by_clip(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{row['arm']} {row['utt']} {row['seed']}": _without(row, ("wall_s",)) for row in rows}


def _files(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file()}


def _files_faults(one: Path, other: Path, names: Iterable[str]) -> list[str]:
    faults = []
    for name in sorted(names):
        there = [(folder / name).is_file() for folder in (one, other)]
        if not all(there):
            faults.append(f"{name}: only in the {'first' if there[0] else 'second'}")
        elif sha256_file(one / name) != sha256_file(other / name):
            faults.append(f"{name}: other bytes")
    return faults


def _row_faults(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    faults = [f"{name}: {key}: only in the first" for key in one if key not in other]
    faults += [f"{name}: {key}: only in the second" for key in other if key not in one]
    for key in one:
        if key in other:
            faults += _value_faults(f"{name}: {key}", one[key], other[key])
    return faults


def _value_faults(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**one, **other} if (key in one) != (key in other) or one[key] != other[key]]
    return [f"{name}: {key}: {_short(one.get(key))}, {_short(other.get(key))}" for key in keys]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _without(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    left_out = set(names)
    return {key: value for key, value in row.items() if key not in left_out}


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
