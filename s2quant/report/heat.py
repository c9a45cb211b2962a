"""Heat maps of damage: one per bit width, blocks from left to right, kinds of linear from top to bottom.

All maps of a run share one logarithmic scale of eight steps, so that colours can be compared between widths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2quant.report.charts import WIDTH, Chart
from s2quant.report.format import adaptive, finite

STEPS = 8
LEFT, ROW, GAP = 78.0, 17.0, 8.0


@dataclass(frozen=True, kw_only=True)
class HeatScale:
    """A logarithmic scale in STEPS steps.

    Args:
        low: The smallest value above 0.
        high: The largest.
    """

    low: float
    high: float

    def step(self, value: float) -> int:
        """Find the step of a value.

        Args:
            value: 0 or more.

        Returns:
            0 to STEPS - 1.
        """
        if value <= self.low:
            return 0
        share = math.log(value / self.low) / max(1e-9, math.log(self.high / self.low))
        return min(STEPS - 1, int(STEPS * share))

    def legend(self) -> list[tuple[str, str]]:
        """Name the steps.

        Returns:
            (class, words) each.
        """
        edges = [self.low * (self.high / self.low) ** (number / STEPS) for number in range(STEPS + 1)]
        return [(f"heat{n}", f"{adaptive(edges[n])} to {adaptive(edges[n + 1])}") for n in range(STEPS)]


def heat_scale(values: Iterable[Any]) -> HeatScale | None:
    """Make a scale that holds all values.

    Args:
        values: Damages; missing ones and zeros are passed over.

    Returns:
        The scale; None when there is nothing to show.
    """
    known = [value for value in map(finite, values) if value is not None and value > 0]
    return HeatScale(low=min(known), high=max(known)) if known else None


def heat_maps(units: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Draw a map for each bit width.

    Args:
        units: `units` of sensitivity.json.

    Returns:
        The maps, from the fewest bits on; none when nothing was measured.
    """
    cells = {(unit["name"], one["bits"]): one["kl"] for unit in units for one in unit["candidates"]}
    scale = heat_scale(cells.values())
    if scale is None:
        return []
    return [_map(units, bits, cells, scale) for bits in sorted({bits for _, bits in cells})]


def _map(
    units: Sequence[Mapping[str, Any]], bits: int, cells: Mapping[tuple[str, int], Any], scale: HeatScale
) -> Chart:
    rows = list(dict.fromkeys((unit["part"], unit["kind"]) for unit in units))
    num_layers = 1 + max((unit["layer"] or 0 for unit in units), default=0)
    width = min(24.0, (WIDTH - LEFT - 2) / num_layers)
    tops, top = {}, 2.0
    for number, row in enumerate(rows):
        top += GAP if number and row[0] != rows[number - 1][0] else 0
        tops[row] = top
        top += ROW
    chart = Chart(
        title=f"{bits} bit",
        caption="Nats per frame when only this linear is replaced; a block in each column",
        height=top + 18,
        legend=scale.legend(),
    )
    for (part, kind), y in tops.items():
        chart.label(f"{part} {kind}", LEFT - 6, y + 0.75 * ROW, "end")
    for unit in units:
        value = finite(cells.get((unit["name"], bits)))
        style = "heat-none" if value is None else f"heat{scale.step(value)}"
        x, y = LEFT + width * (unit["layer"] or 0), tops[unit["part"], unit["kind"]]
        words = f"{unit['name']}, {bits} bit: {adaptive(value) or 'not measured'}"
        chart.rect(style, x, y, width - 1, ROW - 1, words)
    every = max(1, math.ceil(22 / width))
    for layer in range(0, num_layers, every):
        chart.label(str(layer), LEFT + width * (layer + 0.5), top + 12)
    return chart
