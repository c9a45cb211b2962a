"""Figures as people read them: a rate in percent, bytes in GB, a difference with its sign.

Every function returns None for a figure that is missing or not finite; templates print that as "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

MISSING = "not measured"
ARMS = ("baseline", "model", "floor")
BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
FAILURES = {
    "no_end": "No end token",
    "empty": "Empty",
    "truncated": "Truncated",
    "run_on": "Run-on",
    "repeated_words": "Repeated words",
    "repeated_codes": "Repeated codes",
    "long_silence": "Long silence",
    "clipping": "Clipping",
    "not_finite": "Not finite (NaN)",
}


def get(data: Any, *path: str) -> Any:
    """Follow keys through nested objects.

    Args:
        data: The outermost object.
        *path: One key per level.

    Returns:
        The value, or None where a level is absent or null.
    """
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def finite(value: Any) -> float | None:
    """Take a number for what it is.

    Args:
        value: Anything from a JSON file.

    Returns:
        The number; None for null, text, a boolean, NaN or an infinity.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def fixed(value: Any, digits: int, signed: bool = False) -> str | None:
    """Write a number with a fixed number of decimals.

    Args:
        value: The number.
        digits: Decimals.
        signed: Whether a number above 0 gets a plus.

    Returns:
        The text, with thousands separated by commas; None when missing.
    """
    number = finite(value)
    if number is None:
        return None
    return f"{number or 0.0:{'+' if signed and number else ''},.{digits}f}"


def adaptive(value: Any, signed: bool = False) -> str | None:
    """Write a number with about three significant digits.

    Args:
        value: The number.
        signed: Whether a number above 0 gets a plus.

    Returns:
        The text; None when missing.
    """
    number = finite(value)
    if number is None:
        return None
    size = abs(number)
    if size == 0:
        return "0"
    if size < 0.001:
        return f"{number:{'+' if signed else ''}.1e}"
    digits = next((d for limit, d in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if size >= limit), 4)
    return fixed(number, digits, signed)


def figure(value: Any, unit: str | None, signed: bool = False) -> str | None:
    """Write a figure of a metric, without its unit.

    Args:
        value: The number as results.json has it.
        unit: Its unit there; a "fraction" is written in percent (points, for a difference).
        signed: Whether it is a difference.

    Returns:
        The text; None when missing.
    """
    number = finite(value)
    if unit == "fraction" and number is not None:
        return fixed(100 * number, 2, signed)
    if unit in ("cosine", "ratio"):
        return fixed(number, 3, signed)
    return adaptive(number, signed)


def unit_name(unit: str | None, difference: bool = False) -> str:
    """Name the unit that `figure` writes in.

    Args:
        unit: The unit in results.json.
        difference: Whether it is of a difference between two rates.

    Returns:
        "%", "points", or the unit itself.
    """
    if unit == "fraction":
        return "points" if difference else "%"
    return {"seconds": "s"}.get(unit or "", unit or "")


def interval(pair: Any, unit: str | None, signed: bool = False) -> str | None:
    """Write an interval in brackets.

    Args:
        pair: [low, high].
        unit: The unit in results.json.
        signed: Whether it is of a difference.

    Returns:
        "[low, high]"; None when an end is missing.
    """
    ends = bounds(pair)
    return ends and f"[{figure(ends[0], unit, signed)}, {figure(ends[1], unit, signed)}]"


def bounds(pair: Any) -> tuple[float, float] | None:
    """Take an interval for what it is.

    Args:
        pair: [low, high] from a JSON file.

    Returns:
        The two ends; None when either is missing.
    """
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    low, high = finite(pair[0]), finite(pair[1])
    return None if low is None or high is None else (low, high)


def with_interval(value: Any, pair: Any, unit: str | None, signed: bool = False) -> str | None:
    """Write a figure followed by its interval.

    Args:
        value: The figure.
        pair: [low, high], or None.
        unit: The unit in results.json.
        signed: Whether it is a difference.

    Returns:
        The text, without brackets where the interval is missing; None when the figure is.
    """
    text, ends = figure(value, unit, signed), interval(pair, unit, signed)
    return text if text is None or ends is None else f"{text} {ends}"


def byte_unit(values: Iterable[Any]) -> tuple[float, str]:
    """Choose one unit for a column of sizes.

    Args:
        values: Sizes in bytes; missing ones are passed over.

    Returns:
        The number of bytes in the unit, and its name.
    """
    largest = max((number for number in map(finite, values) if number is not None), default=1e9)
    return next((unit for unit in BYTE_UNITS if largest >= unit[0]), BYTE_UNITS[-1])


def scaled(value: Any, unit: tuple[float, str]) -> str | None:
    """Write a size in a chosen unit.

    Args:
        value: A size in bytes.
        unit: From `byte_unit`.

    Returns:
        The text; None when missing.
    """
    number = finite(value)
    return None if number is None else fixed(number / unit[0], 0 if unit[1] == "bytes" else 2)


def ratio(above: Any, below: Any) -> float | None:
    """Divide two figures.

    Args:
        above: Numerator.
        below: Denominator.

    Returns:
        The ratio; None when either is missing or the denominator is 0.
    """
    top, bottom = finite(above), finite(below)
    return None if top is None or not bottom else top / bottom


def failure_name(kind: str) -> str:
    """Name a kind of failure.

    Args:
        kind: Its key in the records.

    Returns:
        Words for it.
    """
    return FAILURES.get(kind, kind.replace("_", " ").capitalize())


def shown(value: Any) -> str:
    """Write any scalar of a manifest.

    Args:
        value: A JSON scalar, or a list of them.

    Returns:
        Text; null is "none".
    """
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
