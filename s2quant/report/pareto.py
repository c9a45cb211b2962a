"""The trade-off between size and damage: a line through the best choices, and named points beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from s2quant.report.charts import WIDTH, Chart, Scale, scale_over
from s2quant.report.format import adaptive, byte_unit, finite, scaled

LEFT, BOTTOM, TOP, LETTER = 50.0, 214.0, 10.0, 6.2


def pareto_chart(curve: Mapping[str, Any]) -> Chart | None:
    """Draw damage over size, the damage on a logarithmic scale.

    Args:
        curve: The object of curve.json: "points" (num_bytes, kl) along the best choices and "named" ones with a name
            and perhaps kl_together, measured as a whole.

    Returns:
        The plot; None with fewer than two points of a damage above 0.
    """
    points = [(row["num_bytes"], finite(row["kl"])) for row in curve["points"]]
    line = [(size, kl) for size, kl in points if kl]
    named = [row for row in curve["named"] if finite(row["kl"]) or finite(row.get("kl_together"))]
    if len(line) < 2:
        return None
    unit = byte_unit(size for size, _ in line)
    every = (*named, *curve["points"])
    kls = [kl for row in every for key in ("kl", "kl_together") if (kl := finite(row.get(key)))]
    across = scale_over([row["num_bytes"] / unit[0] for row in (*named, *curve["points"])], LEFT, WIDTH - 8, zero=False)
    low, high = math.floor(math.log10(min(kls))), math.ceil(math.log10(max(kls)) + 1e-9)
    down = Scale(low=low, high=max(high, low + 1), start=BOTTOM, end=TOP)
    chart = Chart(
        title="Size and damage",
        caption=f"Nats per frame over {unit[1]} of tensors; damages added up, and measured as a whole where it was",
        height=BOTTOM + 26,
        legend=[("model", "best choice at each size"), ("baseline", "named recipes, damages added up")],
    )
    _grid(chart, across, down)
    for (size, kl), (next_size, next_kl) in pairwise(line):
        chart.line("model-range", across(size / unit[0]), down(math.log10(kl)), across(next_size / unit[0]),
                   down(math.log10(next_kl)), f"{scaled(size, unit)} {unit[1]}: {adaptive(kl)}")  # fmt: skip
    for row in curve["points"]:
        value = finite(row["kl_together"])
        if value:
            words = f"{scaled(row['num_bytes'], unit)} {unit[1]}, as a whole: {adaptive(value)}"
            chart.dot("floor", across(row["num_bytes"] / unit[0]), down(math.log10(value)), words)
    if any(finite(row.get("kl_together")) for row in every):
        chart.legend.append(("floor", "measured as a whole"))
    _names(chart, named, lambda size: across(size / unit[0]), down)
    return chart


def _names(chart: Chart, named: Sequence[Mapping[str, Any]], across: Callable[[float], float], down: Scale) -> None:
    """Draw the named points, and write each name where it covers no other."""
    taken: list[tuple[float, float, float]] = []  # left, right, baseline
    for row in named:
        x = across(row["num_bytes"])
        for key, style in (("kl", "baseline"), ("kl_together", "floor")):
            value = finite(row.get(key))
            if value:
                chart.dot(style, x, down(math.log10(value)), f"{row['name']}: {adaptive(value)} nats per frame")
        name, value = str(row["name"]), finite(row["kl"]) or finite(row.get("kl_together"))
        if not value:
            continue
        y, width = down(math.log10(value)) + 4, LETTER * len(name)
        places = [(x + side * 7, y + rise, side) for rise in (0, -11, 11, -22, 22) for side in (1, -1)]
        spans = [(min(at, at + side * width), max(at, at + side * width), height) for at, height, side in places]
        number = next((n for n, span in enumerate(spans) if _is_free(span, taken)), 0)
        taken.append(spans[number])
        chart.label(name, places[number][0], places[number][1], "start" if places[number][2] > 0 else "end")


def _is_free(span: tuple[float, float, float], taken: Sequence[tuple[float, float, float]]) -> bool:
    left, right, y = span
    if left < LEFT or right > WIDTH or not TOP <= y <= BOTTOM - 2:
        return False
    return not any(left < other[1] and right > other[0] and abs(y - other[2]) < 11 for other in taken)


def _grid(chart: Chart, across: Scale, down: Scale) -> None:
    for power in range(int(down.low), int(down.high) + 1):
        chart.line("grid", LEFT, down(power), WIDTH - 4, down(power))
        chart.label(f"{10.0**power:g}", LEFT - 5, down(power) + 4, "end")
    chart.line("axis", LEFT, BOTTOM, WIDTH - 4, BOTTOM)
    for tick in across.ticks():
        chart.line("axis", across(tick), BOTTOM, across(tick), BOTTOM + 4)
        chart.label(f"{tick:g}", across(tick), BOTTOM + 17)


def named_rows(named: Sequence[Mapping[str, Any]], dense_bytes: int) -> list[tuple[str | None, ...]]:
    """Put the named points into cells of a table.

    Args:
        named: As in curve.json.
        dense_bytes: Size of the bf16 checkpoint.

    Returns:
        Name, bytes, share of the bf16 size, damage added up, damage as a whole, the best choice of that size.
    """
    return [
        (
            str(row["name"]),
            f"{row['num_bytes']:,}",
            f"{100 * row['num_bytes'] / dense_bytes:.1f}",
            adaptive(row["kl"]),
            adaptive(row.get("kl_together")),
            adaptive(row.get("kl_best")),
        )
        for row in named
    ]
