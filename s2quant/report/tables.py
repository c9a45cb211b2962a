"""The tables of the report, drawn by both the markdown and the HTML page.

A cell is finished text; None is a figure that was not measured. Units stand once, in the head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from s2quant.report.format import (
    adaptive,
    byte_unit,
    failure_name,
    figure,
    finite,
    fixed,
    get,
    ratio,
    scaled,
    shown,
    unit_name,
    with_interval,
)
from s2quant.report.load import Run

Cell = str | None
METRIC_HEAD = (
    "Metric",
    "Unit",
    "Baseline",
    "Model",
    "Model - baseline [95\u00a0%]",
    "Margin",
    "Verdict",
    "Smallest detectable",
    "Floor",
    "Floor - baseline [95\u00a0%]",
    "n",
    "Prompts",
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table.

    Args:
        caption: What it holds.
        head: Column names with units.
        rows: Cells, None where not measured.
        words: How many columns at the start hold words; the others hold figures, aligned right.
    """

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    words: int = 1


def size_table(run: Run) -> Table:
    """Size on disk of both checkpoints.

    Args:
        run: The evaluation.

    Returns:
        One row per arm.
    """
    arms = {arm: get(run.results, "arms", arm) for arm in ("baseline", "model")}
    unit = byte_unit(get(arm, "tensor_bytes") for arm in arms.values())
    whole = get(arms["baseline"], "tensor_bytes")
    rows = []
    for name, arm in arms.items():
        part = ratio(get(arm, "tensor_bytes"), whole)
        bits = get(arm, "bits")
        counts = [fixed(get(arm, key), 0) for key in ("quantized", "dense")]
        share = None if part is None else fixed(100 * part, 1)
        rows.append((run.arm_label(name), scaled(get(arm, "tensor_bytes"), unit), share, *counts, bits and str(bits)))
    head = ("Checkpoint", f"Tensors, {unit[1]}", "Of baseline, %", "Quantized modules", "Dense modules", "Bits")
    return Table(caption="Size on disk, without the codec", head=head, rows=rows)


def speed_rows(run: Run) -> list[tuple[int, dict[str, dict[str, Any]]]]:
    """Sort the timings.

    Args:
        run: The evaluation.

    Returns:
        (concurrency, timing by arm), lowest concurrency first.
    """
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in get(run.results, "speed", "rows") or []:
        found.setdefault(int(row.get("concurrency") or 1), {})[str(row.get("arm"))] = row
    return sorted(found.items())


def speed_table(run: Run) -> Table | None:
    """Speed and memory.

    Args:
        run: The evaluation.

    Returns:
        For each concurrency a row per arm and one of ratios; None when speed was not measured.
    """
    groups = speed_rows(run)
    if not groups:
        return None
    keys = ("ms_per_frame", "rtf", "first_audio_s", "frames_per_s", "audio_s_per_s", "peak_device_bytes")
    unit = byte_unit(row.get(keys[-1]) for _, arms in groups for row in arms.values())
    rows: list[tuple[Cell, ...]] = []
    for concurrency, arms in groups:
        for arm, row in sorted(arms.items()):
            figures = [adaptive(row.get(key)) for key in keys[:-1]]
            rows.append((str(concurrency), run.arm_label(arm), *figures, scaled(row.get(keys[-1]), unit)))
        if {"baseline", "model"} <= set(arms):
            ratios = [ratio(arms["model"].get(key), arms["baseline"].get(key)) for key in keys]
            rows.append((str(concurrency), "Model / baseline", *(fixed(value, 3) for value in ratios)))
    head = (
        "Concurrent",
        "Arm",
        "ms per frame",
        "RTF",
        "First audio, s",
        "Frames per s",
        "Audio s per s",
        f"Peak device memory, {unit[1]}",
    )
    device, warmup = get(run.results, "speed", "device"), adaptive(get(run.results, "speed", "warmup_s"))
    caption = f"Speed on {device or 'an unnamed device'}"
    caption += f"; warm-up of {warmup} s left out" if warmup else ""
    return Table(caption=caption, head=head, rows=rows, words=2)


def stage_table(run: Run) -> Table | None:
    """Where the time goes.

    Args:
        run: The evaluation.

    Returns:
        A row per concurrency and arm; None when no stage was timed.
    """
    names = {"encode": "Reference encoding, s", "prefill": "Prefill, s", "ar": "Autoregression, s", "codec": "Codec, s"}
    rows: list[tuple[Cell, ...]] = []
    extra = dict.fromkeys(
        key for _, arms in speed_rows(run) for row in arms.values() for key in row.get("stages_s") or {}
    )
    keys = [*names, *(key for key in extra if key not in names)]
    for concurrency, arms in speed_rows(run):
        for arm, row in sorted(arms.items()):
            if row.get("stages_s"):
                rows.append(
                    (str(concurrency), run.arm_label(arm), *(adaptive(get(row, "stages_s", key)) for key in keys))
                )
    head = ("Concurrent", "Arm", *(names.get(key, f"{key}, s") for key in keys))
    return Table(caption="The same time by stage", head=head, rows=rows, words=2) if rows else None


def failure_table(run: Run) -> Table | None:
    """Count failures by kind.

    Args:
        run: The evaluation.

    Returns:
        A row per kind; None when failures were not looked for.
    """
    arms = run.arms()
    rows: list[tuple[Cell, ...]] = []
    for row in run.rows("failures"):
        cells: list[Cell] = []
        for arm in arms:
            found = get(row, "arms", arm)
            count, total = get(found, "count"), get(found, "n")
            cells.append(None if finite(count) is None else f"{count} / {'?' if total is None else total}")
            cells.append(with_interval(ratio(count, total), get(found, "interval"), "fraction"))
        rows.append((failure_name(str(row.get("kind"))), *cells, fixed(row.get("mcnemar_p"), 3)))
    names = [name for arm in arms for name in (f"{arm.capitalize()}, clips", f"{arm.capitalize()}, % [95\u00a0%]")]
    head = ("Kind", *names, "McNemar p")
    return Table(caption="Clips that failed, by kind", head=head, rows=rows) if rows else None


def coverage_table(run: Run) -> Table:
    """Count what was really measured in each arm.

    Args:
        run: The evaluation.

    Returns:
        A row per arm.
    """
    rows = []
    for arm in run.arms():
        records = [record for record in run.records if record["arm"] == arm]
        parts = [sum(bool(record.get(key)) for record in records) for key in ("audio", "error", "asr", "sim", "tokens")]
        rows.append((run.arm_label(arm), str(len(records)), *map(str, parts)))
    head = ("Arm", "Records", "With audio", "With an error", "Transcribed", "Voice compared", "Token metrics")
    return Table(caption="What the figures rest on, in records (one per utterance and seed)", head=head, rows=rows)


def error_lines(run: Run, limit: int = 10) -> list[str]:
    """Tell which errors the records hold.

    Args:
        run: The evaluation.
        limit: The most lines.

    Returns:
        One sentence per distinct error, the most frequent first.
    """
    found = Counter(f"{record['arm']}: {record['error']}" for record in run.records if record.get("error"))
    lines = [f"{count} x {text}" for text, count in found.most_common(limit)]
    return lines + ([f"... and {len(found) - limit} more kinds"] if len(found) > limit else [])


def metric_table(run: Run) -> Table | None:
    """All metrics with their differences, intervals, floors and verdicts.

    Args:
        run: The evaluation.

    Returns:
        A row per metric; None when there is none.
    """
    rows: list[tuple[Cell, ...]] = []
    for row in run.rows("metrics"):
        unit = row.get("unit")
        cells = (
            figure(row.get("baseline"), unit),
            figure(row.get("model"), unit),
            with_interval(row.get("delta"), row.get("interval"), unit, signed=True),
            figure(row["margin"], unit) if row.get("margin") is not None else "none",
            str(row.get("verdict") or "none"),
            figure(row.get("mde"), unit),
            figure(row.get("floor"), unit),
            with_interval(row.get("floor_delta"), row.get("floor_interval"), unit, signed=True),
            fixed(row.get("n"), 0),
            fixed(row.get("num_clusters"), 0),
        )
        backend = f"\nby {row['backend']}" if row.get("backend") else ""
        units = "/".join(dict.fromkeys((unit_name(unit), unit_name(unit, True)))) or "none"
        rows.append((f"{row.get('name')}{backend}", units, *cells))
    return (
        Table(caption="Metrics, paired by utterance and seed", head=METRIC_HEAD, rows=rows, words=2) if rows else None
    )


def gate_table(run: Run) -> Table | None:
    """The gates of the suite.

    Args:
        run: The evaluation.

    Returns:
        A row per gate; None when the suite has none.
    """
    units = {row.get("name"): row.get("unit") for row in run.rows("metrics")}
    rows: list[tuple[Cell, ...]] = []
    for gate in get(run.results, "verdict", "gates") or []:
        name = str(gate.get("name"))
        unit = (
            gate.get("unit")
            or units.get(name)
            or next((units[key] for key in units if str(key).startswith(name)), None)
        )
        result = {True: "passed", False: "broken"}.get(gate.get("passed"))
        figures = [figure(gate.get(key), unit) for key in ("value", "limit")]
        rows.append((name, result, unit_name(unit, True) or "as given", *figures))
    return (
        Table(caption="Gates", head=("Gate", "Result", "Unit", "Value", "Limit"), rows=rows, words=3) if rows else None
    )


def breakdown_tables(run: Run) -> list[Table]:
    """The headline error rate by language, length and tags.

    Args:
        run: The evaluation.

    Returns:
        One table per way to group.
    """
    names = {"lang": "Language", "length": "Length", "tags": "Tags"}
    tables = []
    for key, groups in (get(run.results, "breakdown") or {}).items():
        rows = [_group(row) for row in groups or []]
        title = names.get(key, str(key).capitalize())
        head = (title, "n", "Baseline, %", "Model, %", "Model - baseline, points [95\u00a0%]")
        if rows:
            tables.append(Table(caption=f"Error rate by {title.lower()}", head=head, rows=rows))
    return tables


def _group(row: dict[str, Any]) -> tuple[Cell, ...]:
    rates = [figure(row.get(arm), "fraction") for arm in ("baseline", "model")]
    delta = with_interval(row.get("delta"), row.get("interval"), "fraction", signed=True)
    return (str(row.get("group")), fixed(row.get("n"), 0), *rates, delta)


def provenance_table(run: Run) -> Table:
    """Everything that is needed to make the run again.

    Args:
        run: The evaluation.

    Returns:
        Every scalar of the suite and the manifest, by its path.
    """
    parts = {"suite": get(run.results, "suite"), "run": get(run.results, "provenance")}
    rows = [row for name, part in parts.items() for row in _flat(name, part)]
    return Table(caption="Provenance", head=("Fact", "Value"), rows=rows, words=2)


def _flat(path: str, value: Any) -> Iterable[tuple[str, Cell]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}", inner)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for place, inner in enumerate(value):
            yield from _flat(f"{path}.{place}", inner)
    elif value not in (None, {}):
        yield path, shown(value)
