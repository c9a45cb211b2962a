"""Size against damage: the best choice at every size, and well-known recipes beside it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2quant.files import atomic_file, write_json
from s2quant.report.pareto import pareto_chart
from s2quant.report.sensitivity import CURVE, write_sensitivity_report
from s2quant.report.svg import svg_file
from s2quant.search.solve import Solution
from s2quant.search.table import Sensitivity
from s2quant.search.together import combinations


def best_at(points: Sequence[Solution], num_bytes: int) -> float | None:
    """Bound the damage at a size.

    Args:
        points: From `walk`.
        num_bytes: The size.

    Returns:
        The least damage of a point that is not larger, interpolated to the size (what no choice can beat); None when
        nothing is that small.
    """
    for before, after in zip([None, *points], points, strict=False):
        if after.num_bytes > num_bytes:
            continue
        if before is None or before.num_bytes <= num_bytes:
            return after.damage
        share = (before.num_bytes - num_bytes) / (before.num_bytes - after.num_bytes)
        return before.damage + share * (after.damage - before.damage)
    return None


def named_points(table: Sensitivity, points: Sequence[Solution]) -> list[dict[str, Any]]:
    """Place the combinations that every run measures as a whole beside the best choices.

    Args:
        table: What was measured.
        points: From `walk`.

    Returns:
        name, bits, num_bytes, kl, kl_together and kl_best of each.
    """
    measured = {row["name"]: row for row in table.raw["together"]}
    return [
        _beside(points, _named(table, name, choice, measured.get(name)))
        for name, choice in combinations(table.units, table.raw["bits"]).items()
    ]


def make_curve(
    table: Sensitivity,
    points: Sequence[Solution],
    named: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Compute the curve.

    Args:
        table: What was measured.
        points: From `walk`.
        named: From `named_points`.
        found: More of these: name, num_bytes, kl and kl_together.

    Returns:
        The object of curve.json: every step of the best choices, and the named points.
    """
    return {
        "schema_version": 1,
        "sensitivity_sha256": table.sha256,
        "points": [_point(point) for point in points],
        "named": [*named, *(_beside(points, row) for row in found)],
    }


def _beside(points: Sequence[Solution], row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "kl_best": best_at(points, row["num_bytes"])}


def _point(point: Solution) -> dict[str, Any]:
    widths = [choice.bits for choice in point.choices.values()]
    counts = {f"num_{bits}_bit": widths.count(bits) for bits in sorted({*widths})}
    return {"num_bytes": point.num_bytes, "kl": point.damage, "kl_together": None, **counts}


def _named(
    table: Sensitivity, name: str, choice: Mapping[str, int], measured: Mapping[str, Any] | None
) -> dict[str, Any]:
    damages = [table.damage[unit][bits] for unit, bits in choice.items()]
    saved = sum(unit.dense_bytes - unit.num_bytes[choice[unit.name]] for unit in table.units if unit.name in choice)
    shown = f"{table.raw['recipe']['name']}" if name == "the recipe" else name
    return {
        "name": shown,
        "bits": sorted(set(choice.values())),
        "num_bytes": table.dense_bytes - saved,
        "kl": None if any(kl is None for kl in damages) else sum(kl for kl in damages if kl is not None),
        "kl_together": measured["kl"] if measured else None,
    }


def write_curve(folder: Path, curve: Mapping[str, Any]) -> None:
    """Write curve.json, curve.csv and curve.svg, over older ones, and the folder's report anew.

    Args:
        folder: What `s2quant sensitivity` made.
        curve: From `make_curve`.

    Raises:
        UserError: The disk refuses.
    """
    pandas = importlib.import_module("pandas")
    frame = pandas.DataFrame(curve["points"])
    counts = [column for column in frame.columns if column.startswith("num_") and column.endswith("_bit")]
    frame[counts] = frame[counts].fillna(0).astype(int)
    order = sorted(counts, key=lambda column: -int(column.split("_")[1]))
    with atomic_file(folder / "curve.csv", overwrite=True) as partial:
        frame[["num_bytes", "kl", "kl_together", *order]].to_csv(partial, index=False)
    chart = pareto_chart(curve)
    if chart is not None:
        with atomic_file(folder / "curve.svg", overwrite=True) as partial:
            partial.write_text(svg_file(chart), encoding="utf-8")
    with atomic_file(folder / CURVE, overwrite=True) as partial:
        write_json(partial, curve)
    write_sensitivity_report(folder)
