"""From records to results.json and summary.csv: a versioned schema that the report reads.

    results_version  RESULTS_VERSION
    suite            what was spoken and how, names of what listened
    arms             by arm: path_name, tensor_bytes, quantized, dense, bits, num_clips, num_with_audio, num_errors
    verdict          passed, sentence, reasons, gates [name, unit, value, limit, passed, reason]
    statistics       level, num_resamples, cluster_by
    metrics          rows [name, unit, better, backend, baseline, model, floor, delta, interval, floor_delta, ...]
    failures         rows [kind, mcnemar_p, arms {arm: count, n, interval}]
    tokens           codebooks, im_end, confidence, ... of `summarise_tokens`, or null; in it layer_groups, rows of
                     `summarise_groups`, or null
    speed            device, rows [arm, concurrency, rtf, ...], or null
    breakdown        by lang, length, tags: rows [group, n, baseline, model, delta, interval]
    worst            [utterance, seed], the worst first, or null without anything to judge by
    provenance       the manifest

What was not measured is null, never 0. The same records give the same file: nothing in it depends on when, in how
many processes or in how many goes they were made, but for the timings in "speed".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2quant.evaluate.metrics import (
    Metric,
    Table,
    error_rate,
    failure_rows,
    has_failed,
    list_metrics,
    make_table,
    metric_row,
    to_prompt,
)
from s2quant.evaluate.plan import EvalPlan, suite_facts
from s2quant.evaluate.score import Backends
from s2quant.evaluate.stats import LEVEL, NUM_RESAMPLES
from s2quant.evaluate.verdict import judge
from s2quant.files import atomic_file
from s2quant.records import Arm, UtteranceRecord

RESULTS_VERSION = 1
NUM_WORST = 20
LENGTHS = ((40, "under 40 characters"), (80, "40 to 79 characters"), (None, "80 characters and more"))


def breakdown(table: Table, metric: Metric) -> dict[str, list[dict[str, Any]]]:
    """Split the headline error rate.

    Args:
        table: The records.
        metric: The corpus rate.

    Returns:
        Rows by "lang", "length" (of the text without marks) and "tags".
    """
    splits: dict[str, Callable[[UtteranceRecord], str]] = {
        "lang": lambda record: record.lang,
        "length": lambda record: _length(record.reference),
        "tags": lambda record: "with tags" if record.has_tags else "without tags",
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for name, group_of in splits.items():
        names = dict.fromkeys(group_of(row["model"]) for row in table.rows)
        order = [label for _, label in LENGTHS] if name == "length" else sorted(names)
        found[name] = [_group(group, table.some(_is(group_of, group)), metric) for group in order if group in names]
    return found


def _is(group_of: Callable[[UtteranceRecord], str], group: str) -> Callable[[UtteranceRecord], bool]:
    return lambda record: group_of(record) == group


def _group(group: str, table: Table, metric: Metric) -> dict[str, Any]:
    row = metric_row(table, metric, {})
    return {"group": group, **{key: row[key] for key in ("n", "baseline", "model", "delta", "interval")}}


def _length(text: str) -> str:
    return next(label for most, label in LENGTHS if most is None or len(text) < most)


def worst(table: Table, most: int = NUM_WORST) -> list[list[Any]] | None:
    """Name the clips that lost most against the baseline: by errors and new failures, then by voice.

    Args:
        table: The records.
        most: How many at most.

    Returns:
        [utterance, seed] of the model, the worst first; None without a baseline or without anything to judge by.
    """
    if "baseline" not in table.arms:
        return None
    losses: list[tuple[float, float, str, int]] = []
    known = False
    for row in table.rows:
        rates = [error_rate(row[arm]) for arm in ("baseline", "model")]
        failed = [has_failed(row[arm]) for arm in ("baseline", "model")]
        voices = [to_prompt(row[arm]) for arm in ("baseline", "model")]
        known = known or None not in rates or None not in failed
        loss = rates[1] - rates[0] if rates[0] is not None and rates[1] is not None else 0.0
        loss += float(bool(failed[1]) and not failed[0])
        voice = voices[0] - voices[1] if voices[0] is not None and voices[1] is not None else 0.0
        if loss > 0:
            losses.append((-loss, -voice, row["model"].utt, row["model"].seed))
    return [[utt, seed] for _, _, utt, seed in sorted(losses)[:most]] if known else None


def build_results(
    plan: EvalPlan,
    records: Sequence[UtteranceRecord],
    backends: Backends,
    *,
    arms: Mapping[Arm, Mapping[str, Any]],
    tokens: Mapping[str, Any] | None,
    speed: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Compose results.json.

    Args:
        plan: The plan.
        records: One per clip of it.
        backends: What listened.
        arms: Facts of each checkpoint.
        tokens: From `summarise_tokens`.
        speed: From `measure_speed`.
        provenance: The manifest.

    Returns:
        The object. The same records give the same object.
    """
    table = make_table(plan, records)
    metrics = list_metrics(plan, table, backends)
    rows = [metric_row(table, metric, plan.suite.margins) for metric in metrics]
    failures = failure_rows(table, "failures" in plan.metrics)
    verdict = judge(plan, table.silent, rows, failures, tokens, speed)
    headline = next((metric for metric in metrics if metric.margin_key == "wer"), None)
    return {
        "results_version": RESULTS_VERSION,
        "suite": suite_facts(plan) | {"asr": backends.asr, "similarity": backends.similarity},
        "arms": {arm: dict(arms[arm]) | _counts(records, arm) for arm in plan.arms},
        "verdict": verdict,
        "statistics": {"level": LEVEL, "num_resamples": NUM_RESAMPLES, "cluster_by": table.cluster_by},
        "metrics": rows,
        "failures": failures,
        "tokens": tokens,
        "speed": speed,
        "breakdown": breakdown(table, headline) if headline else {},
        "worst": worst(table),
        "provenance": dict(provenance),
    }


def _counts(records: Iterable[UtteranceRecord], arm: Arm) -> dict[str, int]:
    own = [record for record in records if record.arm == arm]
    return {
        "num_clips": len(own),
        "num_with_audio": sum(record.audio is not None for record in own),
        "num_errors": sum(record.error is not None for record in own),
    }


def write_summary(path: Path, results: Mapping[str, Any]) -> None:
    """Write the figures as one table, by pandas.

    Args:
        path: The CSV file, replaced if it exists.
        results: From `build_results`.

    Raises:
        UserError: The disk refuses.
    """
    pandas = importlib.import_module("pandas")  # of the eval extra
    rows = [{"section": "metric", **row} for row in results["metrics"]]
    for row in results["failures"]:
        rates = {arm: found["count"] / found["n"] if found["n"] else None for arm, found in row["arms"].items()}
        n = row["arms"]["model"]["n"]
        rows.append({"section": "failures", "name": row["kind"], "unit": "fraction", **rates, "n": n})
    for row in (results["tokens"] or {}).get("codebooks", ()):
        for key, unit in (("kl_mean", "nats"), ("top1_agreement", "fraction"), ("delta_nll", "nats")):
            name, floor = f"{key} of codebook {row['codebook']}", row.get(f"floor_{key}")
            rows.append(
                {"section": "tokens", "name": name, "unit": unit, "model": row[key], "floor": floor, "n": row["n"]}
            )
    for row in (results["tokens"] or {}).get("layer_groups") or ():
        for key in ("kl_semantic", "kl_residual_mean"):
            name = f"{key} of layers {row['name']}"
            rows.append({"section": "tokens", "name": name, "unit": "nats", "model": row[key], "n": row["n"]})
    for row in rows:
        for column in ("interval", "floor_interval"):
            low, high = row.pop(column, None) or (None, None)
            row[f"{column}_low"], row[f"{column}_high"] = low, high
    columns = [
        "section", "name", "unit", "backend", "baseline", "model", "floor", "delta", "interval_low", "interval_high",
        "floor_delta", "floor_interval_low", "floor_interval_high", "n", "num_clusters", "num_missing", "mde",
        "margin", "verdict",
    ]  # fmt: skip
    with atomic_file(path, overwrite=True) as partial:
        pandas.DataFrame(rows, columns=columns).to_csv(partial, index=False)
