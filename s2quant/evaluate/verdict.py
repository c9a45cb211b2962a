"""Whether a run passes: the suite's margins and gates, each with a reason, and one sentence for the top of the report.

A margin is judged by its metric's verdict of non-inferiority; which verdicts fail is the suite's `fail_on`. A gate on
a number that was not measured fails: what nobody looked at has not passed. So does a run in which an arm made no sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2quant.evaluate.metrics import MAX_JUDGED_WER, WORD_ERRORS
from s2quant.evaluate.plan import EvalPlan
from s2quant.records import Arm

Rows = Sequence[Mapping[str, Any]]
Value = float | None

# By gate: the unit of its number, and whether the number may not be above ("max") or below ("min") the limit.
GATE_UNITS: Mapping[str, str] = {
    "wer_max": "fraction",
    "wer_delta_max": "fraction",
    "similarity_delta_min": "cosine",
    "similarity_to_baseline_min": "cosine",
    "failure_rate_max": "fraction",
    "failure_delta_max": "fraction",
    "error_rate_max": "fraction",
    "kl_semantic_max": "nats",
    "top1_agreement_min": "fraction",
    "rtf_ratio_max": "ratio",
}


def judge(
    plan: EvalPlan,
    silent: Sequence[Arm],
    metrics: Rows,
    failures: Rows,
    tokens: Mapping[str, Any] | None,
    speed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Judge a run.

    Args:
        plan: The plan.
        silent: Arms without any sound.
        metrics: Section of results.json.
        failures: Section of results.json.
        tokens: Section of results.json.
        speed: Section of results.json.

    Returns:
        The object "verdict" of results.json: passed, sentence, reasons (one for everything that failed), gates.
    """
    gates = [_sound_gate(arm) for arm in silent]
    gates += [_margin_gate(row, plan) for row in metrics if row["margin"] is not None]
    numbers = gate_numbers(metrics, failures, tokens, speed)
    gates += [_gate(name, limit, numbers[name]) for name, limit in plan.suite.gates.items()]
    reasons = [f"{gate['name']}: {gate['reason']}" for gate in gates if not gate["passed"]]
    return {
        "passed": not reasons,
        "sentence": _sentence(plan, gates, metrics, failures, silent),
        "reasons": reasons,
        "gates": gates,
    }


def gate_numbers(
    metrics: Rows, failures: Rows, tokens: Mapping[str, Any] | None, speed: Mapping[str, Any] | None
) -> dict[str, Value]:
    """Find the numbers that gates look at.

    Args:
        metrics: Section of results.json.
        failures: Section of results.json.
        tokens: Section of results.json.
        speed: Section of results.json.

    Returns:
        By gate; None for what was not measured.
    """
    by_key = {row["margin_key"] or row["name"]: row for row in metrics}

    def metric(name: str, figure: str) -> Value:
        value: Value = by_key.get(name, {}).get(figure)
        return value

    rates = {arm: _rate(failures, "any", arm) for arm in ("baseline", "model")}
    both = rates["model"] is not None and rates["baseline"] is not None
    book = tokens["codebooks"][0] if tokens and tokens["codebooks"] else {}
    return {
        "wer_max": metric("wer", "model"),
        "wer_delta_max": metric("wer", "delta"),
        "similarity_delta_min": metric("similarity_to_prompt", "delta"),
        "similarity_to_baseline_min": metric("SIM to baseline", "model"),
        "failure_rate_max": rates["model"],
        "failure_delta_max": (rates["model"] or 0.0) - (rates["baseline"] or 0.0) if both else None,
        "error_rate_max": _rate(failures, "error", "model"),
        "kl_semantic_max": book.get("kl_mean"),
        "top1_agreement_min": book.get("top1_agreement"),
        "rtf_ratio_max": _rtf_ratio(speed),
    }


def _rate(failures: Rows, kind: str, arm: str) -> Value:
    row = next((row for row in failures if row["kind"] == kind), None)
    found = row["arms"].get(arm) if row else None
    return found["count"] / found["n"] if found and found["n"] else None


def _rtf_ratio(speed: Mapping[str, Any] | None) -> Value:
    """Give model over baseline at the lowest concurrency that both have."""
    found: dict[int, dict[str, float]] = {}
    for row in (speed or {}).get("rows", ()):
        if row.get("rtf"):
            found.setdefault(row["concurrency"], {})[row["arm"]] = row["rtf"]
    both = [arms for _, arms in sorted(found.items()) if {"baseline", "model"} <= set(arms)]
    return both[0]["model"] / both[0]["baseline"] if both else None


def _gate(name: str, limit: float, value: Value) -> dict[str, Any]:
    most = name.endswith("_max")
    passed = value is not None and (value <= limit if most else value >= limit)
    reason = None
    if value is None:
        reason = "not measured, and a gate on what was not measured fails"
    elif not passed:
        reason = f"{value:.4g} is {'above' if most else 'below'} {limit:g}"
    return {"name": name, "unit": GATE_UNITS[name], "value": value, "limit": limit, "passed": passed, "reason": reason}


def _sound_gate(arm: Arm) -> dict[str, Any]:
    reason = f"not one clip of the {arm} has sound; its figures are not measured"
    return {"name": f"sound.{arm}", "unit": None, "value": None, "limit": None, "passed": False, "reason": reason}


def _margin_gate(row: Mapping[str, Any], plan: EvalPlan) -> dict[str, Any]:
    bad = ("inferior",) if plan.suite.fail_on == "inferior" else ("inferior", "inconclusive")
    passed = row["verdict"] not in bad
    return {
        "name": f"margin.{row['margin_key']}",
        "unit": row["unit"],
        "value": row["delta"],
        "limit": row["margin"] if row["better"] == "lower" else -row["margin"],
        "passed": passed,
        "reason": None if passed else _margin_sentence(row),
    }


# ---- words ---------------------------------------------------------------------------------------------------------


def _sentence(plan: EvalPlan, gates: Rows, metrics: Rows, failures: Rows, silent: Sequence[Arm]) -> str:
    broken = [str(gate["name"]) for gate in gates if not gate["passed"]]
    parts = [f"broken: {', '.join(broken)}"] if broken else []
    judged = [row for row in metrics if row["verdict"] is not None]
    if "baseline" not in plan.arms:
        parts.append("no baseline, so nothing to compare with")
    elif not silent and _no_difference(metrics, failures):
        parts.append(f"no difference: both arms are equal in all {_most_pairs(metrics)} pairs")
    elif judged:
        parts += [_margin_sentence(row) for row in judged]
    else:
        parts.append("no verdict: no margin of the suite is on a metric that was measured")
    return "; ".join(parts)


def _no_difference(metrics: Rows, failures: Rows) -> bool:
    """Tell whether nothing that was compared differs; a mean of zero with a spread around it does."""
    compared = [row for row in metrics if row["delta"] is not None and row["name"] != "SIM to baseline"]
    equal = all(row["delta"] == 0 and row["interval"] == [0.0, 0.0] for row in compared)
    counts = [row["arms"]["baseline"]["count"] == row["arms"]["model"]["count"] for row in failures]
    to_baseline = [row["model"] == 1.0 for row in metrics if row["name"] == "SIM to baseline" and row["n"]]
    return bool(compared) and equal and all(counts) and all(to_baseline)


def _most_pairs(metrics: Rows) -> int:
    return max(int(row["n"]) for row in metrics)


def _margin_sentence(row: Mapping[str, Any]) -> str:
    """Say a verdict with its difference, interval, n and what could have been found."""
    points = row["unit"] == "fraction"

    def number(value: Value, sign: str = "+") -> str:
        return (
            "not measured"
            if value is None
            else format(100 * value if points else value, f"{sign}.{2 if points else 3}f")
        )

    name = f"points of {row['name']}" if points else str(row["name"])
    text = f"{row['verdict']} at {number(row['margin'], '')} {name}: delta {number(row['delta'])}"
    if row["interval"] is not None:
        text += f" [{number(row['interval'][0])}, {number(row['interval'][1])}]"
    text += f", n = {row['n']}"
    if row["margin_key"] in WORD_ERRORS and (row["baseline"] or 0.0) > MAX_JUDGED_WER:
        text += f"; the baseline itself is not understood ({number(row['baseline'], '')} {name})"
    return text if row["mde"] is None else f"{text}, smallest detectable difference {number(row['mde'], '')}"
