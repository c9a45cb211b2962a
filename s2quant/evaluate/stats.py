"""How sure we are: paired intervals, verdicts, smallest detectable differences, failure rates.

A metric of an arm is a sum of values over a sum of weights: errors over words for a corpus WER, values over 1 for a
mean. Utterances of one voice, and seeds of one utterance, are not independent; they form a cluster, whose values and
weights are added up, and whole clusters are resampled, the same ones in both arms (Liu and Peng, arXiv 1912.09508).
The interval is the percentile bootstrap's of scipy: BCa is not defined for arms that do not differ, and covers no
better here (measured on sparse word errors, nominal 95 %, percentile and BCa: 70 and 68 % at 20 clusters, 88 and 86 %
at 50, 94 and 91 % at 200). So intervals of fewer than about 100 clusters are too narrow where errors are rare.

A verdict is one of non-inferiority against a margin, never "p > 0.05". Of no observations a figure is None, never 0.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from s2quant.errors import UserError

Better = Literal["lower", "higher"]
Verdict = Literal["non-inferior", "inferior", "inconclusive"]
Interval = tuple[float, float]
Array = npt.NDArray[np.float64]
LEVEL = 0.95
POWER = 0.8
NUM_RESAMPLES = 9999
_BATCH_NUMBERS = 1 << 22  # most numbers per array in one batch of resamples: 32 MB


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric in both arms, and how far apart they are.

    Args:
        baseline: The metric of the baseline.
        model: The metric of the other arm.
        delta: model - baseline.
        interval: Confidence interval of delta; None of fewer than two clusters that differ.
        n: Pairs that count.
        num_clusters: Clusters they form.
        num_missing: Pairs left out, in both arms, because one of them has no value.
        sd: Standard deviation of the clusters' differences, in the metric's unit; None of fewer than two.
        mde: Smallest difference found with 80 % power; None when no spread was seen to tell it from.
    """

    baseline: float | None
    model: float | None
    delta: float | None
    interval: Interval | None
    n: int
    num_clusters: int
    num_missing: int
    sd: float | None
    mde: float | None


def _library(name: str) -> Any:
    """Import a module of the eval extra; only here, so that the rest of the package does without."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(
            f"statistics are wanted, and the package {package} is not installed",
            "the packages of s2quant[eval]",
            "pip install 's2quant[eval]'",
        ) from error


def paired_bootstrap(
    clusters: Sequence[str],
    baseline: Sequence[float | None],
    model: Sequence[float | None],
    *,
    baseline_weights: Sequence[float] | None = None,
    model_weights: Sequence[float] | None = None,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Compare two arms that spoke the same things.

    Args:
        clusters: What each pair belongs to: its voice where it has one, else its utterance. Seeds share the cluster.
        baseline: The baseline's values, None where there is none: errors for a corpus WER, values for a mean.
        model: The other arm's, in the same order.
        baseline_weights: What the baseline's sum is divided by: words for a corpus WER; None means 1 each, a mean.
        model_weights: The other arm's; None means the same as the baseline's.
        level: Of the interval.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling. The same input in any order gives the same interval.

    Returns:
        The difference. Arms with equal values differ by exactly 0, with the interval [0, 0].

    Raises:
        UserError: scipy or statsmodels is not installed.
    """
    count = len(clusters)
    weights = [1.0] * count if baseline_weights is None else baseline_weights
    others = weights if model_weights is None else model_weights
    columns = (baseline, weights, model, others)
    assert all(len(column) == count for column in columns), [len(column) for column in columns]
    pairs = [(clusters[i], *(column[i] for column in columns)) for i in range(count)]
    whole = sorted(pair for pair in pairs if all(value is not None for value in pair))  # any order: the same rounding
    names, index = np.unique(np.array([pair[0] for pair in whole], dtype=str), return_inverse=True)
    table = np.array([pair[1:] for pair in whole], dtype=np.float64).reshape(-1, 4)
    assert np.isfinite(table).all(), "a value or weight that is not finite"
    sums: Array = np.zeros((4, len(names)))
    for i in range(4):
        sums[i] = np.bincount(index, table[:, i], len(names)) if whole else 0.0
    values, divisor, other_values, other_divisor = sums.sum(axis=1).tolist()
    missing = count - len(whole)
    if divisor <= 0 or other_divisor <= 0:
        return Difference(
            baseline=None, model=None, delta=None, interval=None, n=len(whole), num_clusters=len(names),
            num_missing=missing, sd=None, mde=None,
        )  # fmt: skip
    sd = _spread(sums)
    return Difference(
        baseline=values / divisor,
        model=other_values / other_divisor,
        delta=other_values / other_divisor - values / divisor,
        interval=_interval(sums, level, num_resamples, seed),
        n=len(whole),
        num_clusters=len(names),
        num_missing=missing,
        sd=sd,
        mde=smallest_detectable(sd, len(names), 1 - level),
    )


def _difference(values: Array, weights: Array, others: Array, other_weights: Array, axis: int = -1) -> Array:
    """Give model minus baseline of sums along an axis."""
    found: Array = others.sum(axis) / other_weights.sum(axis) - values.sum(axis) / weights.sum(axis)
    return found


def _interval(sums: Array, level: float, num_resamples: int, seed: int) -> Interval | None:
    """Bootstrap the difference of clusters' sums [4, clusters]."""
    if np.array_equal(sums[:2], sums[2:]):
        return 0.0, 0.0
    num_clusters = sums.shape[1]
    if num_clusters < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample of clusters without one word
        found = _library("scipy.stats").bootstrap(
            tuple(sums),
            _difference,
            paired=True,
            vectorized=True,
            method="percentile",
            confidence_level=level,
            n_resamples=num_resamples,
            batch=max(1, _BATCH_NUMBERS // num_clusters),
            rng=np.random.default_rng(seed),
        )
    low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _spread(sums: Array) -> float | None:
    """Give the standard deviation of the clusters' contributions to the difference.

    Each cluster contributes (values - metric * weights) / mean weight, in one arm minus the other (the linearised
    ratio); with equal weights that is its plain difference, less the mean one.
    """
    if sums.shape[1] < 2:
        return None
    parts = [(v - v.sum() / w.sum() * w) / w.mean() for v, w in ((sums[0], sums[1]), (sums[2], sums[3]))]
    return float((parts[1] - parts[0]).std(ddof=1))


def smallest_detectable(
    sd: float | None, num_clusters: int, alpha: float = 1 - LEVEL, power: float = POWER
) -> float | None:
    """Give the smallest true difference that a paired, two-sided test of this size would find.

    Args:
        sd: Standard deviation of the paired differences.
        num_clusters: Independent pairs.
        alpha: Level of the test.
        power: Chance to find it.

    Returns:
        The difference in the unit of sd; None of fewer than two pairs or when no spread was seen.

    Raises:
        UserError: statsmodels is not installed.
    """
    if sd is None or sd <= 0 or num_clusters < 2:
        return None
    test = _library("statsmodels.stats.power").TTestPower()
    effect = test.solve_power(nobs=num_clusters, alpha=alpha, power=power, alternative="two-sided")
    return sd * float(effect)


def noninferiority(interval: Interval | None, margin: float, better: Better) -> Verdict:
    """Judge an interval of model - baseline against the largest loss that still is called none.

    Args:
        interval: Two-sided confidence interval of the difference, or None.
        margin: The loss allowed, positive, in the metric's unit.
        better: Whether the metric is better lower or higher.

    Returns:
        "non-inferior" when the whole interval loses less than the margin, "inferior" when all of it loses more,
        else "inconclusive".
    """
    assert margin > 0, margin
    if interval is None:
        return "inconclusive"
    low, high = interval if better == "lower" else (-interval[1], -interval[0])  # of the loss
    if high < margin:
        return "non-inferior"
    return "inferior" if low > margin else "inconclusive"


def mean(values: Sequence[float | None]) -> float | None:
    """Average what is there, every value with the same weight.

    Args:
        values: Values, None where there is none.

    Returns:
        The mean, or None when there is no value.
    """
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def binomial_interval(count: int, n: int, level: float = LEVEL) -> Interval | None:
    """Give the exact (Clopper-Pearson) interval of a rate.

    Args:
        count: How many of them.
        n: Of how many.
        level: Of the interval.

    Returns:
        Its ends as fractions, or None when n is 0.

    Raises:
        UserError: scipy is not installed.
    """
    assert 0 <= count <= n, (count, n)
    if n == 0:
        return None
    found = _library("scipy.stats").binomtest(count, n).proportion_ci(confidence_level=level, method="exact")
    return float(found.low), float(found.high)


def mcnemar_p(baseline: Sequence[bool | None], model: Sequence[bool | None]) -> float | None:
    """Test whether clips fail more often in one arm than in the other (exact McNemar, two-sided).

    Args:
        baseline: Whether each clip failed; None where that is not known.
        model: The same clips in the other arm.

    Returns:
        The p-value, 1 when the arms do not differ; None when no pair is known.

    Raises:
        UserError: statsmodels is not installed.
    """
    pairs = [(a, b) for a, b in zip(baseline, model, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    table = [[sum(pair == (a, b) for pair in pairs) for b in (False, True)] for a in (False, True)]
    return float(_library("statsmodels.stats.contingency_tables").mcnemar(table, exact=True).pvalue)
