"""Token metrics of one utterance, and of all of them pooled: the numbers for records.jsonl and results.json.

Means, medians and percentiles of a pool are over positions, not over utterances. A mean of nothing is None, and so
is one that holds a value that is not finite; how many positions those are is said beside it. Nothing is left out.

Legend: P scored positions, F frames, N codebooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from s2quant.evaluate.layer_groups import LayerGroup
from s2quant.evaluate.tokens import METRIC_VERSION, TokenDamage

CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
FRAMES_BEFORE_END = 3
Values = npt.NDArray[np.floating[Any]]


def mean_or_none(values: Values) -> float | None:
    """Average values.

    Args:
        values: Any number of them.

    Returns:
        The mean, or None of no values or when one is not finite.
    """
    return float(values.mean(dtype=np.float64)) if values.size and np.isfinite(values).all() else None


def _percentile(values: Values, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values.size and np.isfinite(values).all() else None


def utterance_summary(damage: TokenDamage) -> dict[str, Any]:
    """Sum up one utterance.

    Args:
        damage: From `token_damage`.

    Returns:
        The object `tokens` of a record: means over the utterance's positions; lists have one entry per codebook, the
        semantic one first; `end_*` are probabilities of im_end at its true place and in the frames before it, the
        nearest first, None where speech did not end by itself.
    """
    kl = mean_or_none(damage.kl)
    return {
        "metric_version": METRIC_VERSION,
        "num_frames": damage.num_frames,
        "kl_semantic": kl,
        "top1_agreement": mean_or_none(damage.agree),
        "delta_nll_semantic": mean_or_none(damage.delta_nll),
        "kl": [kl, *_columns(damage.residual_kl)],
        "agreement": [mean_or_none(damage.agree), *_columns(damage.residual_agree)],
        "delta_nll": [mean_or_none(damage.delta_nll), *_columns(damage.residual_delta_nll)],
        "kl_baseline_hidden": [None, *_columns(damage.shared_kl)],
        "end_baseline": _end(damage, damage.end_baseline),
        "end_model": _end(damage, damage.end_model),
        "end_before_baseline": _before(damage, damage.end_baseline),
        "end_before_model": _before(damage, damage.end_model),
        "num_not_finite": _num_not_finite(damage),
    }


def _columns(values: Values) -> list[float | None]:
    return [mean_or_none(column) for column in values.T]


def _end(damage: TokenDamage, probs: Values) -> float | None:
    return mean_or_none(probs[-1:]) if damage.ended else None


def _before(damage: TokenDamage, probs: Values) -> list[float | None] | None:
    """Give the probabilities of im_end 1, 2, ... positions before its true place; None beyond the first frame."""
    if not damage.ended:
        return None
    frames = probs[-2::-1][:FRAMES_BEFORE_END]
    return [mean_or_none(frames[number : number + 1]) for number in range(FRAMES_BEFORE_END)]


def _num_not_finite(damage: TokenDamage) -> int:
    bad = ~np.isfinite(damage.kl[: damage.num_frames]) | ~np.isfinite(damage.residual_kl).all(axis=1)
    return int(bad.sum()) + int((~np.isfinite(damage.kl[damage.num_frames :])).sum())


def summarise_tokens(model: Sequence[TokenDamage], floor: Sequence[TokenDamage] = ()) -> dict[str, Any] | None:
    """Pool all utterances.

    Args:
        model: The arm's damages.
        floor: Damages of the baseline in another precision: what rounding alone does.

    Returns:
        The section `tokens` of results.json, or None without damages.
    """
    if not model:
        return None
    floor_books = _codebooks(floor) if floor else []
    books = _codebooks(model)
    for number, book in enumerate(books):
        floored = floor_books[number] if floor_books else {}
        book |= {f"floor_{key}": floored.get(key) for key in ("kl_mean", "kl_median", "kl_p90", "top1_agreement")}
    return {
        "metric_version": METRIC_VERSION,
        "codebooks": books,
        "im_end": _im_end(model),
        "confidence": _by_confidence(model),
        "num_utterances": len(model),
        "num_frames": sum(one.num_frames for one in model),
        "num_positions": sum(len(one.kl) for one in model),
        "num_not_finite": sum(_num_not_finite(one) for one in model),
    }


def _codebooks(damages: Sequence[TokenDamage]) -> list[dict[str, Any]]:
    """Make one row per codebook; the Fast AR does not score the semantic one, so both its hidden columns are None."""
    kl = np.concatenate([one.kl for one in damages])
    agree = np.concatenate([one.agree for one in damages])
    nll = np.concatenate([one.delta_nll for one in damages])
    rows = [_row(0, kl, agree, nll) | {"kl_own_hidden": None, "kl_baseline_hidden": None}]
    own, shared, agrees, nlls = (
        np.concatenate([getattr(one, name) for one in damages])
        for name in ("residual_kl", "shared_kl", "residual_agree", "residual_delta_nll")
    )
    for column in range(own.shape[1]):
        row = _row(column + 1, own[:, column], agrees[:, column], nlls[:, column])
        rows.append(row | {"kl_own_hidden": row["kl_mean"], "kl_baseline_hidden": mean_or_none(shared[:, column])})
    return rows


def _row(codebook: int, kl: Values, agree: Values, nll: Values) -> dict[str, Any]:
    return {
        "codebook": codebook,
        "n": int(kl.size),
        "kl_mean": mean_or_none(kl),
        "kl_median": _percentile(kl, 50),
        "kl_p90": _percentile(kl, 90),
        "top1_agreement": mean_or_none(agree),
        "delta_nll": mean_or_none(nll),
    }


def _im_end(damages: Sequence[TokenDamage]) -> dict[str, Any]:
    """Average the probability of im_end where speech ended, and in each of the frames before."""
    ended = [one for one in damages if one.ended]
    found: dict[str, Any] = {"n": len(ended)}
    for arm in ("baseline", "model"):
        probs = [getattr(one, f"end_{arm}") for one in ended]
        before = [
            np.array([one[-2 - number] for one in probs if len(one) > number + 1])
            for number in range(FRAMES_BEFORE_END)
        ]
        found[f"{arm}_at_end"] = mean_or_none(np.array([one[-1] for one in probs]))
        found[f"{arm}_before"] = mean_or_none(np.concatenate(before))
        found[f"{arm}_before_frames"] = [mean_or_none(values) for values in before]  # the nearest first
    return found


def _by_confidence(damages: Sequence[TokenDamage]) -> list[dict[str, Any]]:
    """Sort the semantic positions by the baseline's highest probability; the last bucket holds its upper edge."""
    confidence = np.concatenate([one.confidence for one in damages])
    kl = np.concatenate([one.kl for one in damages])
    agree = np.concatenate([one.agree for one in damages])
    edges = np.array(CONFIDENCE_EDGES, dtype=np.float32)
    bucket = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, len(edges) - 2)
    return [
        {
            "low": CONFIDENCE_EDGES[number],
            "high": CONFIDENCE_EDGES[number + 1],
            "n": int((bucket == number).sum()),
            "kl_mean": mean_or_none(kl[bucket == number]),
            "top1_agreement": mean_or_none(agree[bucket == number]),
        }
        for number in range(len(CONFIDENCE_EDGES) - 1)
    ]


def summarise_groups(
    groups: Sequence[LayerGroup], num_quantized: Sequence[int], damages: Sequence[Sequence[TokenDamage]]
) -> list[dict[str, Any]]:
    """Pool the damages of groups of layers.

    Args:
        groups: The groups.
        num_quantized: For each, how many of its modules are quantized.
        damages: For each, a damage per utterance, one at least.

    Returns:
        The rows `layer_groups` of the section `tokens`; `kl_residual` has one entry per residual codebook.
    """
    rows = []
    for group, count, some in zip(groups, num_quantized, damages, strict=True):
        semantic, *residual = _codebooks(some)
        rows.append(
            {
                "name": group.name,
                "part": group.part,
                "layers": list(group.layers),
                "num_quantized": count,
                "n": semantic["n"],
                "kl_semantic": semantic["kl_mean"],
                "kl_semantic_p90": semantic["kl_p90"],
                "top1_agreement": semantic["top1_agreement"],
                "kl_residual": [row["kl_mean"] for row in residual],
                "kl_residual_mean": mean_or_none(np.concatenate([one.residual_kl.ravel() for one in some])),
                "im_end": _im_end(some),
            }
        )
    return rows
