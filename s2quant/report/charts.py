"""Small plots as plain shapes: geometry here, SVG in a template, so that every label is escaped in one place.

All are 360 units wide, the width of a phone: text keeps its size there, and two or three stand side by side on a desk.
Colours come from the style sheet by class: "baseline", "model", "floor", "margin".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from s2quant.report.format import bounds, figure, finite, unit_name

WIDTH = 360.0
LETTER = 6.5  # width of a letter of a label, on average
Number = float | None


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One SVG element.

    Args:
        kind: line, rect, circle or text.
        style: Its class in the style sheet.
        attrs: Its geometry.
        text: What a text says, or the tooltip of a shape.
    """

    kind: str
    style: str
    attrs: dict[str, Any]
    text: str = ""


@dataclass(kw_only=True)
class Chart:
    """One plot.

    Args:
        title: What it shows.
        caption: How to read it.
        height: In the units of WIDTH.
        marks: Its elements, back to front.
        legend: (class, words) of each series.
    """

    title: str
    caption: str
    height: float
    marks: list[Mark] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)

    def line(self, style: str, x1: float, y1: float, x2: float, y2: float, text: str = "") -> None:
        """Add a line.

        Args:
            style: Class.
            x1: Start.
            y1: Start.
            x2: End.
            y2: End.
            text: Tooltip.
        """
        ends = {"x1": _trim(x1), "y1": _trim(y1), "x2": _trim(x2), "y2": _trim(y2)}
        self.marks.append(Mark(kind="line", style=style, attrs=ends, text=text))

    def rect(self, style: str, x: float, y: float, width: float, height: float, text: str = "") -> None:
        """Add a rectangle.

        Args:
            style: Class.
            x: Left.
            y: Top.
            width: Width.
            height: Height.
            text: Tooltip.
        """
        box = {"x": _trim(x), "y": _trim(y), "width": _trim(max(0, width)), "height": _trim(max(0, height))}
        self.marks.append(Mark(kind="rect", style=style, attrs=box, text=text))

    def dot(self, style: str, x: float, y: float, text: str = "") -> None:
        """Add a dot.

        Args:
            style: Class.
            x: Centre.
            y: Centre.
            text: Tooltip.
        """
        self.marks.append(Mark(kind="circle", style=style, attrs={"cx": _trim(x), "cy": _trim(y), "r": 4}, text=text))

    def label(self, text: str, x: float, y: float, anchor: str = "middle", style: str = "label") -> None:
        """Add words.

        Args:
            text: The words.
            x: Anchor.
            y: Baseline.
            anchor: start, middle or end.
            style: Class.
        """
        place = {"x": _trim(x), "y": _trim(y), "text-anchor": anchor}
        self.marks.append(Mark(kind="text", style=style, attrs=place, text=text))


def _trim(value: float) -> float:
    return round(value, 1)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear map from values to a stretch of the plot.

    Args:
        low: Value at the start.
        high: Value at the end.
        start: Place of low.
        end: Place of high.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Place a value, kept within the stretch.

        Args:
            value: The value.

        Returns:
            Its place.
        """
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Choose round values to mark.

        Args:
            count: About how many.

        Returns:
            Multiples of 1, 2 or 5 times a power of ten within the scale.
        """
        rough = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def scale_over(values: Sequence[Number], start: float, end: float, zero: bool = True) -> Scale:
    """Make a scale that shows all values with some room.

    Args:
        values: What to show; missing ones are passed over.
        start: Place of the lowest.
        end: Place of the highest.
        zero: Whether 0 is shown too.

    Returns:
        The scale, never of zero length.
    """
    known = [value for value in values if value is not None] + ([0.0] if zero else [])
    low, high = min(known, default=0.0), max(known, default=1.0)
    room = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    below = 0.0 if zero and low == 0 < high else room
    return Scale(low=low - below, high=high + room, start=start, end=end)


def tick_text(value: float, scale: Scale, unit: str | None) -> str:
    """Write a tick with just the decimals that its scale needs.

    Args:
        value: The tick.
        scale: Where it stands.
        unit: As in results.json; a "fraction" is written in percent.

    Returns:
        The text.
    """
    factor = 100 if unit == "fraction" else 1
    ticks = scale.ticks()
    step = (ticks[1] - ticks[0]) * factor if len(ticks) > 1 else 1
    if step < 1e-4 and max(abs(scale.low), abs(scale.high)) * factor < 1e-2:
        return f"{value * factor:.0e}" if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{value * factor:.{digits}f}"
    return text.replace("-", "\u2212") if float(text) else "0"


def forest_strip(metric: dict[str, Any]) -> Chart | None:
    """Draw one metric's difference with its interval, against the margin and the noise floor.

    Args:
        metric: A row of "metrics" in results.json.

    Returns:
        The plot; None when the difference was not measured.
    """
    delta, ends, unit = finite(metric.get("delta")), bounds(metric.get("interval")), metric.get("unit")
    if delta is None:
        return None
    floor, floor_ends = finite(metric.get("floor_delta")), bounds(metric.get("floor_interval"))
    worse = -1.0 if metric.get("better") == "higher" else 1.0
    size = finite(metric.get("margin"))
    margin = None if size is None else worse * abs(size)
    scale = scale_over([delta, *(ends or ()), floor, *(floor_ends or ()), margin], 10, WIDTH - 10)
    if scale.low == 0:
        scale = Scale(low=-0.15 * scale.high, high=scale.high, start=scale.start, end=scale.end)
    name = str(metric.get("name"))
    words = figure(delta, unit, signed=True)
    limit = "" if margin is None else f", margin {figure(abs(margin), unit)}"
    chart = Chart(title=name, caption=f"Model minus baseline: {words} {unit_name(unit, True)}{limit}", height=88)
    if margin is not None:
        edge = scale.end if worse > 0 else scale.start
        chart.rect("zone", min(scale(margin), edge), 4, abs(edge - scale(margin)), 50, "worse than the margin")
        chart.line("margin", scale(margin), 4, scale(margin), 54, f"margin {figure(margin, unit, signed=True)}")
    _axis(chart, scale, 54, unit)
    chart.line("zero", scale(0), 4, scale(0), 54)
    if floor_ends:
        chart.rect("floor", scale(floor_ends[0]), 36, scale(floor_ends[1]) - scale(floor_ends[0]), 8, "noise floor")
    if floor is not None:
        chart.line("floor-mark", scale(floor), 34, scale(floor), 46, f"floor {figure(floor, unit, signed=True)}")
    if ends:
        chart.line("model-range", scale(ends[0]), 20, scale(ends[1]), 20, "95 % interval")
    chart.dot("model", scale(delta), 20, f"delta {words}")
    chart.label(
        "worse \u2192" if worse > 0 else "\u2190 worse",
        WIDTH - 10 if worse > 0 else 10,
        86,
        "end" if worse > 0 else "start",
    )
    chart.label(
        "\u2190 better" if worse > 0 else "better \u2192",
        10 if worse > 0 else WIDTH - 10,
        86,
        "start" if worse > 0 else "end",
    )
    return chart


def _axis(chart: Chart, scale: Scale, y: float, unit: str | None) -> None:
    chart.line("axis", scale.start, y, scale.end, y)
    for tick in scale.ticks():
        chart.line("axis", scale(tick), y, scale(tick), y + 4)
        text = tick_text(tick, scale, unit)
        half = 3.2 * len(text)
        chart.label(text, min(max(scale(tick), half), WIDTH - half), y + 15)


def forest(title: str, rows: Sequence[dict[str, Any]], unit: str | None) -> Chart | None:
    """Draw the differences of several groups, one below the other.

    Args:
        title: What was measured.
        rows: Groups of "breakdown" in results.json.
        unit: Its unit.

    Returns:
        The plot; None when no difference was measured.
    """
    known = [row for row in rows if finite(row.get("delta")) is not None]
    if not known:
        return None
    every: list[Number] = [finite(row["delta"]) for row in known]
    every += [end for row in known for end in bounds(row.get("interval")) or ()]
    scale = scale_over(every, 116, WIDTH - 10)
    if scale.low == 0:
        scale = Scale(low=-0.1 * scale.high, high=scale.high, start=scale.start, end=scale.end)
    foot = 24.0 * len(known) + 6
    caption = f"Model minus baseline, {unit_name(unit, True)}; bars are 95 % intervals"
    chart = Chart(title=title, caption=caption, height=foot + 20)
    chart.line("zero", scale(0), 2, scale(0), foot)
    for place, row in enumerate(known):
        y = 24 * place + 16.0
        ends = bounds(row.get("interval"))
        name = str(row.get("group"))
        chart.label(name if len(name) < 18 else name[:16] + "\u2026", 106, y + 4, "end")
        if ends:
            chart.line("model-range", scale(ends[0]), y, scale(ends[1]), y)
        chart.dot("model", scale(float(row["delta"])), y, f"{name}: {figure(row['delta'], unit, signed=True)}")
    _axis(chart, scale, foot, unit)
    return chart


@dataclass(frozen=True, kw_only=True)
class Series:
    """One row of values over the categories of a plot.

    Args:
        name: Words for the legend.
        style: Class: baseline, model, floor.
        shape: bar, dot or tick.
        values: One per category; None is not drawn.
        ranges: (low, high) per category, drawn as a thin line.
    """

    name: str
    style: str
    shape: str
    values: Sequence[Number]
    ranges: Sequence[tuple[float, float] | None] = ()


def columns(
    title: str,
    caption: str,
    categories: Sequence[str],
    series: Sequence[Series],
    unit: str | None = None,
    zero: bool = True,
) -> Chart | None:
    """Draw values over categories.

    Args:
        title: What it shows.
        caption: How to read it.
        categories: Words below each column.
        series: What is drawn; bars stand beside each other.
        unit: As in results.json.
        zero: Whether the axis holds 0.

    Returns:
        The plot; None when there is nothing to draw.
    """
    series = [row for row in series if any(value is not None for value in row.values)]
    if not series:
        return None
    every = [value for row in series for value in row.values]
    every += [end for row in series for pair in row.ranges if pair for end in pair]
    scale = scale_over(every, 166, 8, zero)
    if unit == "fraction" and scale.high > 1 >= max(value for value in every if value is not None):
        scale = Scale(low=scale.low, high=1.0, start=scale.start, end=scale.end)
    chart = Chart(title=title, caption=caption, height=190, legend=[(row.style, row.name) for row in series])
    for tick in scale.ticks():
        chart.line("axis" if tick == 0 and zero else "grid", 44, scale(tick), WIDTH - 4, scale(tick))
        chart.label(tick_text(tick, scale, unit), 40, scale(tick) + 4, "end")
    step = (WIDTH - 50) / len(categories)
    bars = [row for row in series if row.shape == "bar"]
    stride = math.ceil(max(map(len, categories)) * LETTER / step)  # of the words that fit; tooltips have all
    for place, name in enumerate(categories):
        if place % stride == 0:
            chart.label(name, 46 + step * (place + 0.5), 182)
        for row in series:
            _column(chart, scale, row, place, step, bars, f"{name}, {row.name}: ", unit)
    return chart


def _column(
    chart: Chart,
    scale: Scale,
    row: Series,
    place: int,
    step: float,
    bars: Sequence[Series],
    prefix: str,
    unit: str | None,
) -> None:
    value = row.values[place]
    x = 46 + step * (place + 0.5)
    pair = row.ranges[place] if row.ranges else None
    if pair:
        chart.line(f"{row.style}-range", x, scale(pair[0]), x, scale(pair[1]), f"{prefix}median to p90")
    if value is None:
        return
    text = prefix + str(figure(value, unit))
    if row.shape == "bar":
        width = min(18.0, 0.74 * step / len(bars))
        left = x + width * (bars.index(row) - len(bars) / 2)
        base, top = scale(max(0.0, scale.low)), scale(value)
        chart.rect(row.style, left, min(base, top), width - 1, max(1.0, abs(base - top)), text)
    elif row.shape == "dot":
        chart.dot(row.style, x, scale(value), text)
    else:
        chart.line(f"{row.style}-mark", x - 0.3 * step, scale(value), x + 0.3 * step, scale(value), text)
