"""Figures of recipes side by side, from what `s2quant eval` wrote of each: against bf16 and against one of them.

    recipes.json = {table_version, suite, reference, statistics, baseline, recipes [row, ...], provenance}
    row.own      by figure {value, se, interval, n}: of the recipe itself; `wer`, `sim` and `failures` have {baseline,
                 delta, delta_interval, ...} against bf16 too
    row.against  by figure {delta, interval, n}: less the reference's, paired by text and seed; None in its own row

Intervals are 95 % percentile bootstraps over texts (`s2quant.evaluate.stats`), standard errors the linearised ratio's
over texts. Each stands alone: no correction is made for looking at several.

Figures: `kl_semantic` nats per frame, `kl_residual` nats per frame, the sum over the residual codes, as `s2quant
search` counts; `top1` share of frames with the same most likely semantic code; `end_delta` probability of im_end at its
true place, less bf16's; `wer` corpus error rate; `sim` cosine to the prompt; `failures` share of clips that failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2quant.evaluate.metrics import has_failed, num_errors, num_units, to_prompt
from s2quant.evaluate.stats import LEVEL, NUM_RESAMPLES, Difference, paired_bootstrap
from s2quant.quantize.plan import DENSE_BYTES, Plan
from s2quant.records import UtteranceRecord

TABLE_VERSION = 1
Pair = tuple[float | None, float]
"""A clip's part of a figure: a sum, None where there is none, and what the sums are divided by."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A recipe and what came of it.

    Args:
        plan: The recipe applied to the model.
        results: Its results.json.
        records: Its records.jsonl.
    """

    plan: Plan
    results: Mapping[str, Any]
    records: Sequence[UtteranceRecord]

    @property
    def clips(self) -> list[UtteranceRecord]:
        """The recipe's own clips, in the order of the plan."""
        return [record for record in self.records if record.arm == "model"]


# ---- a clip's part of a figure -------------------------------------------------------------------------------------


def _positions(record: UtteranceRecord) -> tuple[Mapping[str, Any], int, int] | None:
    """Give the token metrics, the frames and the scored positions."""
    tokens = record.tokens
    if tokens is None:
        return None
    return tokens, tokens["num_frames"], tokens["num_frames"] + (tokens["end_baseline"] is not None)


def _per_position(key: str) -> Callable[[UtteranceRecord], Pair]:
    def part(record: UtteranceRecord) -> Pair:
        found = _positions(record)
        if found is None or found[0][key] is None:
            return None, 0.0
        return found[0][key] * found[2], float(found[2])

    return part


def _residual(record: UtteranceRecord) -> Pair:
    found = _positions(record)
    if found is None or None in found[0]["kl"][1:]:
        return None, 0.0
    return sum(found[0]["kl"][1:]) * found[1], float(found[1])


def _end_delta(record: UtteranceRecord) -> Pair:
    tokens = record.tokens
    if tokens is None or tokens["end_baseline"] is None or tokens["end_model"] is None:
        return None, 0.0
    return tokens["end_model"] - tokens["end_baseline"], 1.0


def _failed(record: UtteranceRecord) -> Pair:
    failed = has_failed(record)
    return (None, 0.0) if failed is None else (float(failed), 1.0)


PARTS: Mapping[str, Callable[[UtteranceRecord], Pair]] = {
    "kl_semantic": _per_position("kl_semantic"),
    "kl_residual": _residual,
    "top1": _per_position("top1_agreement"),
    "end_delta": _end_delta,
    "wer": lambda record: (num_errors(record), num_units(record)),
    "sim": lambda record: (to_prompt(record), 1.0),
    "failures": _failed,
}


# ---- rows ----------------------------------------------------------------------------------------------------------


def _own(clips: Sequence[UtteranceRecord], part: Callable[[UtteranceRecord], Pair]) -> dict[str, Any]:
    """Give a figure of one recipe: the ratio of sums, with its spread over texts."""
    pairs = [(clip.utt, *part(clip)) for clip in clips]
    some = [(utt, value, weight) for utt, value, weight in pairs if value is not None]
    zeros, values, weights = [0.0] * len(some), [row[1] for row in some], [row[2] for row in some]
    found = paired_bootstrap([row[0] for row in some], zeros, values, baseline_weights=weights)
    return {"value": found.model, "se": _standard_error(found), "interval": _list(found.interval), "n": found.n}


def _standard_error(found: Difference) -> float | None:
    return None if found.sd is None else found.sd / math.sqrt(found.num_clusters)


def _list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _against(
    clips: Sequence[UtteranceRecord], others: Sequence[UtteranceRecord], part: Callable[[UtteranceRecord], Pair]
) -> dict[str, Any]:
    """Give how far a recipe's figure is from the reference's, on the same texts and seeds."""
    names = [[(clip.utt, clip.seed) for clip in some] for some in (clips, others)]
    assert names[0] == names[1], "the runs are not of the same clips"
    mine, theirs = [part(clip) for clip in clips], [part(clip) for clip in others]
    found = paired_bootstrap(
        [clip.utt for clip in clips],
        [value for value, _ in theirs],
        [value for value, _ in mine],
        baseline_weights=[weight for _, weight in theirs],
        model_weights=[weight for _, weight in mine],
    )
    return {"delta": found.delta, "interval": _list(found.interval), "n": found.n, "mde": found.mde}


def _size(plan: Plan) -> dict[str, Any]:
    linears = [module for module in plan.modules if module.kind == "linear"]
    count = sum(module.dense_bytes for module in linears) // DENSE_BYTES
    return {
        "tensor_bytes": plan.num_bytes,
        "bits_per_weight": 8 * plan.num_bytes * DENSE_BYTES / plan.dense_bytes,
        "bits_per_linear_weight": 8 * sum(module.num_bytes for module in linears) / count,
        "num_quantized": len(plan.quantized),
        "num_linears": len(linears),
    }


def _metric(results: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return next(row for row in results["metrics"] if row["margin_key"] == key)


def _with_baseline(own: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Add what results.json says of a figure against bf16."""
    keys = ("baseline", "delta", "floor_delta", "floor_interval", "mde")
    return own | {key: row[key] for key in keys} | {"delta_interval": row["interval"]}


def _failures(own: dict[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    row = next(row for row in results["failures"] if row["kind"] == "any")
    arms = {arm: {key: row["arms"][arm][key] for key in ("count", "n", "interval")} for arm in ("model", "baseline")}
    kinds = {one["kind"]: one["arms"]["model"]["count"] for one in results["failures"] if one["kind"] != "any"}
    return own | {"arms": arms, "mcnemar_p": row["mcnemar_p"], "kinds": {k: n for k, n in kinds.items() if n}}


def _speed(results: Mapping[str, Any]) -> dict[str, Any]:
    """Take the timings of one utterance at a time; ratios of a pair of measurements each, bf16's in the same turn."""
    rows = {row["arm"]: row for row in results["speed"]["rows"] if row["concurrency"] == 1}
    own, base = rows["model"], rows["baseline"]
    ratios = [a / b for a, b in zip(own["samples"]["ar_s"], base["samples"]["ar_s"], strict=True)]
    return {
        "rtf": own["rtf"],
        "rtf_baseline": base["rtf"],
        "ms_per_frame": own["ms_per_frame"],
        "ms_per_frame_baseline": base["ms_per_frame"],
        "ar_ratio": own["ratio"],
        "ar_ratio_range": [min(ratios), max(ratios)],
        "repeats": len(ratios),
    }


def _row(one: Measured) -> dict[str, Any]:
    clips = one.clips
    own = {name: _own(clips, part) for name, part in PARTS.items()}
    own["wer"] = _with_baseline(own["wer"], _metric(one.results, "wer"))
    if any(clip.prompt_id for clip in clips):
        own["sim"] = _with_baseline(own["sim"], _metric(one.results, "similarity_to_prompt"))
    own["failures"] = _failures(own["failures"], one.results)
    tokens = one.results["tokens"]
    recipe = one.plan.recipe
    return {
        "name": recipe.name,
        "description": " ".join(recipe.description.split()),
        "sha256": recipe.sha256,
        **_size(one.plan),
        "own": own,
        "im_end": None if tokens is None else tokens["im_end"],
        "speed": _speed(one.results),
        "against": None,
        "verdict": one.results["verdict"]["sentence"],
    }


def compose(measured: Sequence[Measured], reference: str) -> dict[str, Any]:
    """Put together recipes.json.

    Args:
        measured: The recipes, of the same suite, clips and baseline.
        reference: Name of the one that the others are compared with.

    Returns:
        The object described above, the smallest recipe first.
    """
    first = measured[0].results
    other = next(one for one in measured if one.plan.recipe.name == reference)
    rows = []
    for one in measured:
        assert one.results["suite"] == first["suite"], "runs of different suites"
        assert one.results["arms"]["model"]["tensor_bytes"] == one.plan.num_bytes, one.plan.recipe.name
        row = _row(one)
        if one is not other:
            row["against"] = {name: _against(one.clips, other.clips, part) for name, part in PARTS.items()}
        rows.append(row)
    wer, plan = _metric(first, "wer"), measured[0].plan
    count = {"num_linears": sum(module.kind == "linear" for module in plan.modules)}
    return {
        "table_version": TABLE_VERSION,
        "suite": first["suite"],
        "reference": reference,
        "statistics": {"level": LEVEL, "num_resamples": NUM_RESAMPLES, "clusters": wer["num_clusters"]},
        "baseline": {"tensor_bytes": plan.dense_bytes, "bits_per_weight": 8.0 * DENSE_BYTES, **count}
        | {key: first["arms"]["baseline"][key] for key in ("num_clips", "num_errors")},
        "recipes": sorted(rows, key=lambda row: (row["tensor_bytes"], row["name"])),
        "provenance": first["provenance"],
    }
