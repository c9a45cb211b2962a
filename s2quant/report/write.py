"""Write the report of a finished evaluation: report.md, report.html, blind.html and blind-key.json.

The HTML pages ask nothing of the network: styles, scripts, plots, pictures and the audio of the worst clips are inside,
and a content security policy forbids the rest. Texts are user data: templates escape every one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2quant.files import atomic_file, write_json
from s2quant.report.blind import blind_test
from s2quant.report.charts import Chart, forest, forest_strip
from s2quant.report.clips import sample_cards, sample_seed, worst_cards, worst_table
from s2quant.report.format import MISSING, finite, fixed, get, ratio, with_interval
from s2quant.report.load import Run, load_run
from s2quant.report.pages import assets, environment
from s2quant.report.tables import (
    breakdown_tables,
    coverage_table,
    error_lines,
    failure_table,
    gate_table,
    metric_table,
    provenance_table,
    size_table,
    speed_rows,
    speed_table,
    stage_table,
)
from s2quant.report.tokens import token_charts, token_tables


def write_report(folder: Path) -> None:
    """Write report.md, report.html, blind.html and blind-key.json of an evaluation, over older ones.

    Args:
        folder: What `s2quant eval` wrote: records.jsonl, results.json, audio/.

    Raises:
        UserError: Records or results are absent or unreadable, or the disk refuses.
    """
    run = load_run(folder)
    facts = _facts(run)
    test, pairs, key = blind_test(run)
    env = environment()
    pages = {
        "report.md": env.get_template("report.md.j2").render(**facts),
        "report.html": env.get_template("report.html.j2").render(**facts, **assets(env, "report.js")),
        "blind.html": env.get_template("blind.html.j2").render(
            test=test, pairs=pairs, title=facts["title"], **assets(env, "blind.js")
        ),
    }
    for name, page in pages.items():
        with atomic_file(folder / name, overwrite=True) as partial:
            partial.write_text(page, encoding="utf-8")
    with atomic_file(folder / "blind-key.json", overwrite=True) as partial:
        write_json(partial, key)


def _facts(run: Run) -> dict[str, Any]:
    """Gather what both the markdown and the HTML page draw."""
    passed = get(run.results, "verdict", "passed")
    worst = worst_cards(run)
    return {
        "title": f"{run.suite('name') or 'Evaluation'}: {_name(run, 'model')} against {_name(run, 'baseline')}",
        "suite": _suite_line(run),
        "passed": passed if isinstance(passed, bool) else None,
        "sentence": get(run.results, "verdict", "sentence"),
        "gates": gate_table(run),
        "tiles": _tiles(run),
        "size": size_table(run),
        "speed": [table for table in (speed_table(run), stage_table(run)) if table],
        "failures": failure_table(run),
        "coverage": coverage_table(run),
        "errors": error_lines(run),
        "metrics": metric_table(run),
        "strips": [chart for chart in map(forest_strip, run.rows("metrics")) if chart],
        "tokens": token_tables(run),
        "token_charts": token_charts(run),
        "worst": worst,
        "worst_table": worst_table(run),
        "worst_known": run.results.get("worst") is not None,
        "samples": sample_cards(run),
        "sample_seed": sample_seed(run),
        "breakdown": breakdown_tables(run),
        "breakdown_charts": _breakdown_charts(run),
        "provenance": provenance_table(run),
    }


def _name(run: Run, arm: str) -> str:
    return str(get(run.results, "arms", arm, "path_name") or arm)


def _suite_line(run: Run) -> str:
    seeds = run.suite("seeds")
    count = finite(run.suite("num_utterances"))
    parts = [
        run.suite("version") is not None and f"suite version {run.suite('version')}",
        count is not None and f"{count:,.0f} utterances",
        isinstance(seeds, list) and f"seeds {', '.join(map(str, seeds))}",
        run.suite("asr") and f"transcribed by {run.suite('asr')}",
        run.suite("similarity") and f"voices compared by {run.suite('similarity')}",
    ]
    return " \u00b7 ".join(part for part in parts if part)


def _tiles(run: Run) -> list[tuple[str, str | None, str]]:
    """Choose the few figures for the top: (name, figure, what it means)."""
    size = ratio(
        get(run.results, "arms", "model", "tensor_bytes"), get(run.results, "arms", "baseline", "tensor_bytes")
    )
    groups = speed_rows(run)
    arms = groups[0][1] if groups else {}
    speed = ratio(get(arms, "model", "ms_per_frame"), get(arms, "baseline", "ms_per_frame"))
    tiles: list[tuple[str, str | None, str]] = [
        ("Size", None if size is None else f"{100 * size:.1f} %", "of the baseline's tensor bytes"),
        ("Time per frame", None if speed is None else f"{fixed(speed, 2)} \u00d7", "of the baseline's"),
    ]
    for unit, name, words in (("fraction", "Error rate", " points"), ("cosine", "Voice similarity", "")):
        row = next((row for row in run.rows("metrics") if row.get("unit") == unit), {})
        text = with_interval(row.get("delta"), None, unit, signed=True)
        pair = with_interval(row.get("delta"), row.get("interval"), unit, signed=True)
        ends = "" if text is None or pair in (None, text) else f", 95 % {str(pair)[len(text) + 1 :]}"
        tiles.append((name, text and text + words, f"{row.get('name') or 'not among the metrics'}{ends}"))
    failed = {arm: _failed(run, arm) for arm in ("model", "baseline")}
    counts = [None if pair is None else f"{pair[0]} / {pair[1]}" for pair in failed.values()]
    tiles.append(("Failed clips", counts[0], f"baseline {counts[1] or MISSING}"))
    return tiles


def _failed(run: Run, arm: str) -> tuple[int, int] | None:
    """Count clips with any failure, or that could not be spoken, among those that were checked."""
    own = [record for record in run.records if record["arm"] == arm]
    known = [record for record in own if record.get("failures") or record.get("error")]
    failed = sum(bool(record.get("error")) or any((record.get("failures") or {}).values()) for record in known)
    return (failed, len(known)) if known else None


def _breakdown_charts(run: Run) -> list[Chart]:
    names = {"lang": "By language", "length": "By length", "tags": "By tags"}
    groups = get(run.results, "breakdown") or {}
    charts = [forest(names.get(key, str(key)), rows or [], "fraction") for key, rows in groups.items()]
    return [chart for chart in charts if chart]
