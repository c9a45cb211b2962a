"""What a card says of an evaluation: the metrics, and what decides beside them, KL and failed clips.

All of it is read from results.json; a figure that was not measured has no row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

HEAD = ("metric", "unit", "backend", "baseline", "this model", "difference [95 % interval]", "noise floor", "n")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Args:
        kind: What the hub calls the metric.
        value: The model's figure; None where it is unknown.
        cells: What is printed, one per column.
    """

    kind: str
    value: float | None
    cells: tuple[str, ...]


def measured_table(results: Mapping[str, Any], note: str = "") -> str:
    """Write the figures as a table in markdown.

    Args:
        results: The object in results.json.
        note: What must be known of them first; a sentence.

    Returns:
        Note, suite, table and verdict.
    """
    suite = results["suite"]
    lines = [
        *([note, ""] if note else []),
        f"Suite {suite['name']} version {suite['version']}, {suite['num_utterances']} utterances, "
        f"seeds {', '.join(map(str, suite['seeds']))}; the baseline spoke in the same runtime.",
        "",
        f"| {' | '.join(HEAD)} |",
        "|---|---|---|--:|--:|--:|--:|--:|",
        *(f"| {' | '.join(row.cells)} |" for row in measured_rows(results)),
    ]
    sentence = (results.get("verdict") or {}).get("sentence")
    return "\n".join(lines + (["", f"Verdict: {sentence}."] if sentence else []))


def eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """List the figures for the hub's own table, the model-index.

    Args:
        results: The object in results.json.

    Returns:
        One per row whose figure of the model is known.
    """
    suite = results["suite"]
    return [
        EvalResult(
            task_type="text-to-speech",
            dataset_type=suite["name"],
            dataset_name=f"s2quant suite {suite['name']}, {suite['num_utterances']} utterances",
            dataset_revision=str(suite["sha256"]),
            metric_type=row.kind,
            metric_name=row.cells[0],
            metric_value=row.value,
        )
        for row in measured_rows(results)
        if row.value is not None
    ]


def measured_rows(results: Mapping[str, Any]) -> list[Row]:
    """List what was measured: the metrics, KL of the semantic and of the residual codebooks, failed clips.

    Args:
        results: The object in results.json.

    Returns:
        The rows.
    """
    rows = []
    for metric in results.get("metrics") or ():
        low_high = "" if metric.get("interval") is None else " [{}, {}]".format(*map(_number, metric["interval"]))
        cells = (
            metric["name"],
            metric["unit"],
            metric["backend"] or "",
            _number(metric["baseline"]),
            _number(metric["model"]),
            _number(metric["delta"]) + low_high,
            _number(metric["floor_delta"]),
            str(metric["n"]),
        )
        kind = "wer" if metric["name"].startswith("WER") else metric["name"]
        rows.append(Row(kind=kind, value=metric["model"], cells=cells))
    return rows + _divergences(results) + _failed_clips(results)


def _divergences(results: Mapping[str, Any]) -> list[Row]:
    """Compare distributions with the baseline's; the first codebook is the semantic one, all others are residual."""
    books = (results.get("tokens") or {}).get("codebooks") or []
    groups = (
        ("kl_semantic", "KL to the baseline, semantic codebook", books[:1]),
        ("kl_residual", "KL to the baseline, mean of the residual codebooks", books[1:]),
    )
    rows = []
    for kind, name, some in groups:
        value = _mean([book.get("kl_mean") for book in some])
        if value is not None:
            floor = _small(_mean([book.get("floor_kl_mean") for book in some]))
            n = str(some[0].get("n", "-"))
            rows.append(Row(kind=kind, value=value, cells=(name, "nats", "", "-", _small(value), "-", floor, n)))
    return rows


def _failed_clips(results: Mapping[str, Any]) -> list[Row]:
    """Give the clips with a failure of any kind; where nobody looked for failures, those that were not spoken."""
    kinds = {row["kind"]: row["arms"] for row in results.get("failures") or ()}
    kind, name = ("any", "Failed clips") if "any" in kinds else ("error", "Clips that could not be spoken")
    arms = kinds.get(kind) or {}
    rates = {arm: found["count"] / found["n"] for arm, found in arms.items() if found["n"]}
    if "model" not in rates:
        return []
    base = rates.get("baseline")
    counted = {
        arm: f"{_number(rates[arm])} ({arms[arm]['count']} of {arms[arm]['n']})" if arm in rates else "-"
        for arm in ("baseline", "model")
    }
    delta = _number(None if base is None else rates["model"] - base)
    floor = _number(None if base is None or "floor" not in rates else rates["floor"] - base)
    cells = (name, "fraction", "", counted["baseline"], counted["model"], delta, floor, str(arms["model"]["n"]))
    return [Row(kind="failed_clips" if kind == "any" else "unspoken_clips", value=rates["model"], cells=cells)]


def _mean(values: list[float | None]) -> float | None:
    """Average numbers of which none is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    """Print a divergence, whose first digits may come late."""
    return "-" if value is None else f"{value:.4f}" if value >= 0.001 else f"{value:.2g}"
