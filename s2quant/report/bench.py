"""The result of `s2quant bench` for a reader: a table in words, and a plot that needs nothing but a browser.

Only reads the object that `s2quant.evaluate.speed.measure_speed` gives (and that bench.json holds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2quant.report.charts import Series, columns
from s2quant.report.svg import svg_file

_COLUMNS = (
    ("batch", "concurrency", "{:d}"),
    ("arm", "arm", "{}"),
    ("ms/frame", "ms_per_frame", "{:.2f}"),
    ("AR RTF", "ar_rtf", "{:.3f}"),
    ("RTF", "rtf", "{:.3f}"),
    ("frames/s", "frames_per_s", "{:.1f}"),
    ("audio s/s", "audio_s_per_s", "{:.2f}"),
    ("first audio s", "first_audio_s", "{:.3f}"),
    ("peak GB", "peak_device_bytes", "{:.2f}"),
    ("time/first arm", "ratio", "{:.3f}"),
)
_FIRST_AUDIO = (
    ("first audio with a voice", "state", "{}"),
    ("arm", "arm", "{}"),
    ("first audio s", "first_audio_s", "{:.3f}"),
    ("of it the voice s", "voice_s", "{:.3f}"),
    ("voice frames", "num_voice_frames", "{:d}"),
)
_UPSTREAM = (
    ("fish-speech", "mode", "{}"),
    ("positions", "positions", "{:d}"),
    ("ms/frame", "ms_per_frame", "{:.2f}"),
    ("AR RTF", "ar_rtf", "{:.3f}"),
    ("prefill s", "prefill_s", "{:.3f}"),
    ("warm-up s", "warmup_s", "{:.1f}"),
    ("peak GB", "peak_device_bytes", "{:.2f}"),
    ("same first code", "same_first_code", "{}"),
    ("its time over ours", "ratios", "{}"),
)
_STREAMS = (
    ("streams", "streams", "{:d}"),
    ("arm", "arm", "{}"),
    ("first audio s", "first_audio_s", "{:.3f}"),
    ("slowest", "slowest_first_audio_s", "{:.3f}"),
    ("underruns", "underruns", "{:d}"),
    ("in streams", "streams_with_underruns", "{:d}"),
    ("longest gap s", "longest_gap_s", "{:.3f}"),
    ("late s", "late_s", "{:.3f}"),
    ("audio s/s", "audio_s_per_s", "{:.2f}"),
)


def bench_table(result: Mapping[str, Any]) -> str:
    """Put timings into Markdown tables, one row per batch size and arm; then first sounds and streams, if any.

    Args:
        result: What `measure_speed` gave.

    Returns:
        The tables, with a line above them that says on what they were measured, and one per arm below that says what
        computed its linears and frames.
    """
    tables = [_table(_COLUMNS, result["rows"])]
    if result["first_audio"]:
        tables.append(_table(_FIRST_AUDIO, result["first_audio"]))
    if result["streams"]:
        tables.append(_table(_STREAMS, result["streams"]))
    if result["upstream"]:
        tables.append(_table(_UPSTREAM, result["upstream"]))
    about = (
        f"{result['device']}, {result['dtype']}, {result['decoder']} decoder, "
        f"{result['num_frames']} frames, medians of {result['repeats']} "
        f"rounds, warm-up of {result['warmup_s']:.1f} s left out"
    )
    made = "\n".join(f"- {name}: {arm['decoding']['text']}" for name, arm in result["arms"].items())
    return "\n\n".join([about, *tables, made]) + "\n"


def _table(columns: Sequence[tuple[str, str, str]], rows: Sequence[Mapping[str, Any]]) -> str:
    head = [title for title, _, _ in columns]
    return markdown_table(head, [[_cell(row, key, form) for _, key, form in columns] for row in rows])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align a Markdown table so that it reads well in a terminal too.

    Args:
        head: Titles.
        rows: Cells.

    Returns:
        The lines, without a newline at the end.
    """
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    value = row[key]
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number:.2f}" for name, number in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return form.format(value / 1e9 if key.endswith("_bytes") else value)


def bench_svg(result: Mapping[str, Any]) -> str:
    """Draw ms per frame over batch sizes, one bar per arm.

    Args:
        result: What `measure_speed` gave.

    Returns:
        A whole SVG file.
    """
    sizes = list(dict.fromkeys(row["concurrency"] for row in result["rows"]))
    arms = list(dict.fromkeys(row["arm"] for row in result["rows"]))
    value = {(row["concurrency"], row["arm"]): row["ms_per_frame"] for row in result["rows"]}
    series = [
        Series(name=arm, style=f"arm{place % 4}", shape="bar", values=[value[size, arm] for size in sizes])
        for place, arm in enumerate(arms)
    ]
    chart = columns(
        "Milliseconds per frame by batch size", str(result["device"]), [str(size) for size in sizes], series
    )
    assert chart is not None
    return svg_file(chart)
