"""Metrics of a run: every number of a record, taken over all pairs of all arms, with interval, floor and smallest
detectable difference; and failures, counted by kind.

Pairs are clips of the same text and the same place among the seeds. A pair in which one arm has no value is left out
of both; a clip without sound has a value, all its words deleted, unless its whole arm has no sound at all: then the
arm has no figures, None. Rates are fractions, differences are model - baseline.

Clusters are voices where the suite has enough of them for a bootstrap over voices, else utterances; results say which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2quant.evaluate.failures import KINDS
from s2quant.evaluate.plan import EvalPlan, Key
from s2quant.evaluate.score import Backends
from s2quant.evaluate.stats import (
    Better,
    Difference,
    binomial_interval,
    mcnemar_p,
    mean,
    noninferiority,
    paired_bootstrap,
)
from s2quant.records import Arm, UtteranceRecord

MIN_VOICES = 50  # fewer clusters make a percentile interval far too narrow, see stats.py

Value = float | None
Row = Mapping[Arm, UtteranceRecord]
"""The records of one text and place of a seed, by arm."""
Measure = Callable[[UtteranceRecord], Value]

WORD_ERRORS = ("wer", "wer_mean")
MAX_JUDGED_WER = 0.5  # a baseline above it does not speak, so equal rates prove nothing


@dataclass(frozen=True, kw_only=True)
class Table:
    """All records of a run, side by side.

    Args:
        rows: The pairs.
        clusters: What each row belongs to.
        cluster_by: "voice" or "utterance".
        arms: Arms of the run.
        silent: Arms without one clip that has sound.
    """

    rows: Sequence[Row]
    clusters: Sequence[str]
    cluster_by: str
    arms: Sequence[Arm]
    silent: Sequence[Arm]

    def column(self, arm: Arm, measure: Measure) -> list[Value]:
        """Measure an arm.

        Args:
            arm: The arm.
            measure: Takes a number from a record.

        Returns:
            A value per row; all None for an arm that the run does not have or that is silent.
        """
        if arm not in self.arms or arm in self.silent:
            return [None] * len(self.rows)
        return [measure(row[arm]) for row in self.rows]

    def some(self, chosen: Callable[[UtteranceRecord], bool]) -> Table:
        """Take some of the rows.

        Args:
            chosen: Asked about the model's record.

        Returns:
            The table of those rows.
        """
        kept = [i for i, row in enumerate(self.rows) if chosen(row["model"])]
        rows, clusters = [self.rows[i] for i in kept], [self.clusters[i] for i in kept]
        return Table(rows=rows, clusters=clusters, cluster_by=self.cluster_by, arms=self.arms, silent=self.silent)


def make_table(plan: EvalPlan, records: Sequence[UtteranceRecord]) -> Table:
    """Put the records of a plan side by side.

    Args:
        plan: The plan.
        records: One per clip of it.

    Returns:
        The table.
    """
    index: dict[Key, UtteranceRecord] = {(record.arm, record.utt, record.seed): record for record in records}
    rows = [{job.arm: index[job.key] for job in group} for group in plan.groups()]
    voices = {one.prompt_id for one in plan.utterances}
    by_voice = None not in voices and len(voices) >= MIN_VOICES
    clusters = [str(row["model"].prompt_id) if by_voice else row["model"].utt for row in rows]
    silent = [arm for arm in plan.arms if not any(row[arm].audio for row in rows)]
    name = "voice" if by_voice else "utterance"
    return Table(rows=rows, clusters=clusters, cluster_by=name, arms=plan.arms, silent=silent)


# ---- numbers of a record -------------------------------------------------------------------------------------------


def num_errors(record: UtteranceRecord) -> Value:
    """Count errors of the transcript."""
    asr = record.asr
    return None if asr is None else float(asr["substitutions"] + asr["deletions"] + asr["insertions"])


def num_units(record: UtteranceRecord) -> float:
    """Count words or characters of the text; 0 when it was not transcribed."""
    asr = record.asr
    return 0.0 if asr is None else float(asr["hits"] + asr["substitutions"] + asr["deletions"])


def error_rate(record: UtteranceRecord) -> Value:
    """Give the error rate of one transcript, as `Score.rate` does."""
    errors = num_errors(record)
    return None if errors is None else errors / max(1.0, num_units(record))


def to_prompt(record: UtteranceRecord) -> Value:
    """Give the cosine to the voice."""
    return None if record.sim is None else record.sim["to_prompt"]


def to_baseline(record: UtteranceRecord) -> Value:
    """Give the cosine to the baseline's clip."""
    return None if record.sim is None else record.sim["to_baseline"]


def has_failed(record: UtteranceRecord) -> bool | None:
    """Tell whether anything is wrong with a clip; None when nobody looked."""
    if record.error is not None:
        return True
    return None if record.failures is None else any(record.failures.values())


# ---- metrics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is computed.

    Args:
        name: Its name.
        unit: "fraction", "cosine" or "ratio".
        better: Whether it is better lower or higher; None for neither.
        measure: Takes a value from a record.
        weight: Takes what the sum of values is divided by; None for a mean.
        margin_key: Its margin's name in the suite, if it can have one.
        backend: What measured it.
        reference: The value that stands for the baseline's, where the baseline has none of its own.
    """

    name: str
    unit: str
    better: Better | None
    measure: Measure
    weight: Callable[[UtteranceRecord], float] | None = None
    margin_key: str | None = None
    backend: str | None = None
    reference: float | None = None


def error_name(table: Table) -> str:
    """Name the error rate by what is counted.

    Args:
        table: The records.

    Returns:
        "WER", "CER", or "WER/CER" for suites of both kinds.
    """
    units = {row["model"].asr["unit"] for row in table.rows if row["model"].asr}
    return {("character",): "CER", ("character", "word"): "WER/CER"}.get(tuple(sorted(units)), "WER")


def list_metrics(plan: EvalPlan, table: Table, backends: Backends) -> list[Metric]:
    """Name the metrics that a run has.

    Args:
        plan: The plan.
        table: The records.
        backends: What listened.

    Returns:
        The metrics, in the order of the report.
    """
    found: list[Metric] = []
    if "wer" in plan.metrics:
        name, by = error_name(table), f"{backends.asr}, {plan.suite.normalizer}"
        more: dict[str, Any] = {"unit": "fraction", "better": "lower", "backend": by}
        found.append(Metric(name=f"{name} (corpus)", measure=num_errors, weight=num_units, margin_key="wer", **more))
        found.append(Metric(name=f"{name} (mean)", measure=error_rate, margin_key="wer_mean", **more))
    if "similarity" in plan.metrics:
        more = {"unit": "cosine", "better": "higher", "backend": backends.similarity}
        if any(row["model"].prompt_id for row in table.rows):
            found.append(Metric(name="SIM to prompt", measure=to_prompt, margin_key="similarity_to_prompt", **more))
        if "baseline" in table.arms:
            found.append(Metric(name="SIM to baseline", measure=to_baseline, **more))
    if "baseline" in table.arms:
        measure: Measure = lambda record: record.duration_ratio  # noqa: E731
        found.append(Metric(name="Duration ratio", unit="ratio", better=None, measure=measure, reference=1.0))
    return found


def compare(table: Table, metric: Metric, baseline: Arm, model: Arm) -> Difference | None:
    """Compare two arms in one metric.

    Args:
        table: The records.
        metric: The metric.
        baseline: One arm.
        model: The other.

    Returns:
        The difference, or None when the run has not both arms.
    """
    if baseline not in table.arms or model not in table.arms:
        return None
    own = table.column(baseline, metric.measure)
    if metric.reference is not None:
        own = [metric.reference] * len(table.rows)
    weights = None
    if metric.weight is not None:
        weights = [metric.weight(row[model]) for row in table.rows]
    return paired_bootstrap(table.clusters, own, table.column(model, metric.measure), baseline_weights=weights)


def alone(table: Table, metric: Metric, arm: Arm) -> tuple[Value, int]:
    """Give a metric of one arm, whatever the others have.

    Args:
        table: The records.
        metric: The metric.
        arm: The arm.

    Returns:
        The metric, None without values, and how many values there are.
    """
    values = table.column(arm, metric.measure)
    count = sum(value is not None for value in values)
    if metric.weight is None:
        return mean(values), count
    pairs = [
        (value, metric.weight(row[arm])) for value, row in zip(values, table.rows, strict=True) if value is not None
    ]
    units = sum(weight for _, weight in pairs)
    return (sum(value for value, _ in pairs) / units if units else None), count


def metric_row(table: Table, metric: Metric, margins: Mapping[str, float]) -> dict[str, Any]:
    """Make a row of "metrics" in results.json.

    Args:
        table: The records.
        metric: The metric.
        margins: The suite's.

    Returns:
        The row. Similarity to the baseline has no figure of the baseline: its difference is to the floor. A model is
        not called as good as a baseline that is not understood: above `MAX_JUDGED_WER` it is "inconclusive" at best.
    """
    to_floor = metric.measure is to_baseline
    found = compare(table, metric, "floor" if to_floor else "baseline", "model")
    floor = None if to_floor else compare(table, metric, "baseline", "floor")
    model, count = alone(table, metric, "model")
    floor_value = alone(table, metric, "floor")[0]
    baseline = None if to_floor or found is None else found.baseline
    margin = margins.get(metric.margin_key) if metric.margin_key and found is not None else None
    interval = None if found is None else found.interval
    verdict = None if margin is None or metric.better is None else noninferiority(interval, margin, metric.better)
    if verdict == "non-inferior" and metric.margin_key in WORD_ERRORS and (baseline or 0.0) > MAX_JUDGED_WER:
        verdict = "inconclusive"
    return {
        "name": metric.name,
        "unit": metric.unit,
        "better": metric.better,
        "backend": metric.backend,
        "margin_key": metric.margin_key,
        "baseline": baseline,
        "model": model if found is None or found.model is None else found.model,
        "floor": floor_value if floor is None or floor.model is None else floor.model,
        "delta": None if found is None else found.delta,
        "interval": None if interval is None else list(interval),
        "floor_delta": None if floor is None else floor.delta,
        "floor_interval": None if floor is None or floor.interval is None else list(floor.interval),
        "n": count if found is None else found.n,
        "num_clusters": len(set(table.clusters)) if found is None else found.num_clusters,
        "num_missing": len(table.rows) - count if found is None else found.num_missing,
        "mde": None if found is None else found.mde,
        "margin": margin,
        "verdict": verdict,
    }


# ---- failures ------------------------------------------------------------------------------------------------------


def failure_rows(table: Table, looked: bool) -> list[dict[str, Any]]:
    """Count failures by kind.

    Args:
        table: The records.
        looked: Whether failures were looked for; errors are always known.

    Returns:
        A row per kind, then "error": nothing could be spoken, and "any" of them.
    """
    kinds: list[tuple[str, Callable[[UtteranceRecord], bool | None]]] = []
    if looked:
        kinds += [(kind, _flag(kind)) for kind in KINDS]
    kinds.append(("error", lambda record: record.error is not None))
    if looked:
        kinds.append(("any", has_failed))
    rows = []
    for kind, told in kinds:
        flags = {arm: [told(row[arm]) for row in table.rows] for arm in table.arms}
        known = {arm: [flag for flag in flags[arm] if flag is not None] for arm in table.arms}
        arms = {}
        for arm, some in known.items():
            interval = binomial_interval(sum(some), len(some))
            arms[arm] = {"count": sum(some), "n": len(some), "interval": interval and list(interval)}
        both = mcnemar_p(flags["baseline"], flags["model"]) if "baseline" in flags else None
        rows.append({"kind": kind, "mcnemar_p": both, "arms": arms})
    return rows


def _flag(kind: str) -> Callable[[UtteranceRecord], bool | None]:
    return lambda record: None if record.failures is None else record.failures[kind]
