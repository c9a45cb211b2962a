import math
import random
import sys

import numpy as np
import pytest
import scipy.stats

from s2quant.errors import UserError
from s2quant.evaluate.stats import (
    Difference,
    binomial_interval,
    mcnemar_p,
    mean,
    noninferiority,
    paired_bootstrap,
    smallest_detectable,
)


def wer(clusters, words, base, model, **options):
    return paired_bootstrap(clusters, base, model, baseline_weights=words, **options)


def one_each(count):
    return [f"p{i:04d}" for i in range(count)]


# ---- the difference ------------------------------------------------------------------------------------------------


def test_a_corpus_rate_is_all_errors_over_all_words():
    found = wer(["a", "b", "c"], [10, 20, 70], [1, 0, 4], [2, 1, 4])
    assert (found.baseline, found.model) == (0.05, 0.07)
    assert found.delta == pytest.approx(0.02)
    assert found.interval[0] <= found.delta <= found.interval[1]
    assert (found.n, found.num_clusters, found.num_missing) == (3, 3, 0)


def test_without_weights_it_is_a_mean_of_pairs():
    found = paired_bootstrap(["a", "a", "b"], [0.5, 0.7, 0.9], [0.4, 0.7, 0.7])
    assert found.baseline == pytest.approx(0.7) and found.model == pytest.approx(0.6)
    assert (found.n, found.num_clusters) == (3, 2)


def test_the_interval_is_scipys_of_the_clusters_sums():
    """Three seeds of forty voices, cluster by cluster against scipy on sums made by a plain loop."""
    rng = random.Random(1)
    rows = [(f"v{v:02d}", rng.randint(5, 20)) for v in range(40) for _ in range(3)]
    base = [rng.randint(0, 2) for _ in rows]
    model = [rng.randint(0, 3) for _ in rows]
    sums: dict[str, list[float]] = {}
    for (voice, words), a, b in zip(rows, base, model, strict=True):
        into = sums.setdefault(voice, [0, 0, 0])
        for place, value in enumerate((a, words, b)):
            into[place] += value
    data = np.array([sums[voice] for voice in sorted(sums)], dtype=float).T
    expected = scipy.stats.bootstrap(
        tuple(data), lambda a, w, b, axis=-1: b.sum(axis) / w.sum(axis) - a.sum(axis) / w.sum(axis),
        paired=True, vectorized=True, method="percentile", n_resamples=2000, rng=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    found = wer([v for v, _ in rows], [w for _, w in rows], base, model, num_resamples=2000, seed=7)
    assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (found.n, found.num_clusters) == (120, 40)


def test_identical_arms_differ_by_exactly_nothing():
    rng = random.Random(0)
    for size in (1, 2, 50):
        values = [rng.random() for _ in range(size)]
        words = [rng.randint(1, 20) for _ in range(size)]
        for found in (wer(one_each(size), words, values, values), paired_bootstrap(one_each(size), values, values)):
            assert found.delta == 0 and found.interval == (0, 0)
            assert found.baseline == found.model
            assert found.mde is None  # no spread was seen
    assert wer(one_each(3), [5, 5, 5], [0, 0, 0], [0, 0, 0]).interval == (0, 0)


def test_nothing_is_none_and_never_0():
    empty = Difference(
        baseline=None, model=None, delta=None, interval=None, n=0, num_clusters=0, num_missing=0, sd=None, mde=None
    )
    assert paired_bootstrap([], [], []) == empty
    assert paired_bootstrap(["a", "b"], [None, 1.0], [1.0, None]).delta is None
    assert paired_bootstrap(["a", "b"], [None, 1.0], [1.0, None]).num_missing == 2
    assert wer(["a"], [0], [3], [4]).baseline is None  # no words to be wrong
    assert mean([]) is None and mean([None]) is None
    assert binomial_interval(0, 0) is None
    assert mcnemar_p([], []) is None and mcnemar_p([None], [True]) is None


def test_pairs_without_a_value_are_left_out_of_both_arms_and_counted():
    found = paired_bootstrap(["a", "b", "c"], [0.5, 0.1, 0.7], [0.6, None, 0.7])
    assert (found.n, found.num_missing) == (2, 1)
    assert found.baseline == pytest.approx(0.6) and found.model == pytest.approx(0.65)


def test_one_cluster_that_differs_has_no_interval():
    found = paired_bootstrap(["a", "a"], [0.5, 0.6], [0.6, 0.8])
    assert found.delta == pytest.approx(0.15)
    assert found.interval is None and found.sd is None and found.mde is None
    assert noninferiority(found.interval, 1.0, "lower") == "inconclusive"


def test_the_order_of_the_records_does_not_matter():
    rng = random.Random(3)
    rows = [(f"v{i % 7}", rng.random(), rng.random()) for i in range(60)]
    found = paired_bootstrap(*zip(*rows, strict=True))
    rng.shuffle(rows)
    assert paired_bootstrap(*zip(*rows, strict=True)) == found
    assert paired_bootstrap(*zip(*rows, strict=True), seed=1).interval != found.interval


def test_repeats_within_a_cluster_do_not_narrow_the_interval():
    """The same clips five times over tell no more than once; taken for independent they would seem to."""
    rng = random.Random(5)
    rows = [(f"v{i:02d}", rng.random(), rng.random()) for i in range(60)]
    once = paired_bootstrap(*zip(*rows, strict=True))
    five = [row for row in rows for _ in range(5)]
    assert paired_bootstrap(*zip(*five, strict=True)).interval == pytest.approx(once.interval, abs=1e-9)
    names, base, model = zip(*five, strict=True)
    naive = paired_bootstrap([f"{name}-{i}" for i, name in enumerate(names)], base, model)
    assert naive.interval[1] - naive.interval[0] < 0.6 * (once.interval[1] - once.interval[0])


def coverage(draw, truth, num_trials):
    """Share of intervals that hold the truth; its own standard error is 1.1 points at 95 % and 400 trials."""
    hits = 0
    for trial in range(num_trials):
        clusters, words, base, model = draw(np.random.default_rng(trial))
        low, high = wer(clusters, words, base, model, num_resamples=599, seed=trial).interval
        hits += low <= truth <= high
    return hits / num_trials


def test_the_interval_of_a_corpus_rate_holds_the_truth_about_95_times_in_100():
    """150 voices, 2 seeds each: a fifth of the voices is hard, in both seeds and both arms; tolerance 4 points."""
    voices, seeds = 150, 2
    clusters = [f"v{i}" for i in range(voices) for _ in range(seeds)]

    def draw(rng):
        hard = np.repeat(np.where(rng.random(voices) < 0.2, 0.1, 0.01), seeds)
        words = rng.integers(6, 20, voices * seeds)
        return clusters, words.tolist(), rng.binomial(words, hard).tolist(), rng.binomial(words, 1.5 * hard).tolist()

    truth = 0.5 * (0.2 * 0.1 + 0.8 * 0.01)
    assert abs(coverage(draw, truth, 400) - 0.95) < 0.04


def test_taking_seeds_for_independent_would_hold_the_truth_too_rarely():
    """What the clusters are for: a bias per voice, shared by its 8 seeds, ruins the naive interval."""
    voices, seeds = 60, 8

    def draw(rng, naive):
        shift = np.repeat(rng.normal(0.1, 0.2, voices), seeds)
        base = rng.normal(0.5, 0.1, voices * seeds)
        model = base + shift + rng.normal(0, 0.1, voices * seeds)
        clusters = [f"v{i}-{k if naive else 0}" for i in range(voices) for k in range(seeds)]
        return clusters, [1.0] * len(clusters), base.tolist(), model.tolist()

    assert abs(coverage(lambda rng: draw(rng, False), 0.1, 200) - 0.95) < 0.05
    assert coverage(lambda rng: draw(rng, True), 0.1, 200) < 0.7


# ---- the verdict ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "lower", "higher"),
    [
        ((-0.002, 0.004), "non-inferior", "non-inferior"),
        ((0.001, 0.004), "non-inferior", "non-inferior"),  # worse, but by less than the margin
        ((0.0, 0.0), "non-inferior", "non-inferior"),
        ((-0.002, 0.006), "inconclusive", "non-inferior"),
        ((0.0, 0.005), "inconclusive", "non-inferior"),  # the margin itself is too much
        ((0.006, 0.009), "inferior", "non-inferior"),
        ((-0.006, 0.002), "non-inferior", "inconclusive"),
        ((-0.009, -0.006), "non-inferior", "inferior"),
        ((-0.1, 0.1), "inconclusive", "inconclusive"),
        (None, "inconclusive", "inconclusive"),
    ],
)
def test_verdicts_against_a_margin_of_half_a_point(interval, lower, higher):
    assert noninferiority(interval, 0.005, "lower") == lower
    assert noninferiority(interval, 0.005, "higher") == higher


def test_the_smallest_detectable_difference_is_the_textbooks():
    """Large n: (z(0.975) + z(0.8)) * sd / sqrt(n); 5 % at 1088 clusters gives 0.42 points."""
    z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)
    assert smallest_detectable(0.05, 1088) == pytest.approx(z * 0.05 / math.sqrt(1088), rel=2e-3)
    assert smallest_detectable(0.05, 1088) == pytest.approx(0.0043, abs=1e-4)
    assert smallest_detectable(0.05, 20) > z * 0.05 / math.sqrt(20)
    assert smallest_detectable(0.05, 1) is None
    assert smallest_detectable(0.0, 100) is None and smallest_detectable(None, 100) is None


def test_the_spread_is_that_of_the_differences_and_power_is_as_promised():
    rng = np.random.default_rng(0)
    base, step = rng.normal(0, 1, 400), rng.normal(0, 0.1, 400)
    found = paired_bootstrap(one_each(400), base.tolist(), (base + step).tolist())
    assert found.sd == pytest.approx(step.std(ddof=1))
    assert found.mde == pytest.approx(smallest_detectable(found.sd, 400))
    shifts = rng.normal(found.mde, 0.1, (2000, 400))
    detected = scipy.stats.ttest_1samp(shifts, 0, axis=1).pvalue < 0.05
    assert detected.mean() == pytest.approx(0.8, abs=0.06)


def test_the_spread_of_a_rate_gives_the_width_of_its_interval():
    rng = np.random.default_rng(2)
    words = rng.integers(5, 30, 500)
    base, model = rng.binomial(words, 0.05), rng.binomial(words, 0.06)
    found = wer(one_each(500), words.tolist(), base.tolist(), model.tolist())
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.96 * found.sd / math.sqrt(500), rel=0.05)


# ---- failures ------------------------------------------------------------------------------------------------------


def test_exact_intervals_of_rates():
    assert binomial_interval(0, 20) == (0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert binomial_interval(20, 20) == (pytest.approx(0.025 ** (1 / 20)), 1)
    low, high = binomial_interval(3, 50)
    assert scipy.stats.binom.sf(2, 50, low) == pytest.approx(0.025)
    assert scipy.stats.binom.cdf(3, 50, high) == pytest.approx(0.025)
    assert binomial_interval(3, 50, level=0.5)[0] > low


def test_mcnemar_counts_only_clips_that_differ():
    base = [True] * 3 + [False] * 20
    assert mcnemar_p(base, base) == 1
    worse = [True] * 9 + [False] * 14  # six clips fail now that did not
    assert mcnemar_p(base, worse) == pytest.approx(2 * 0.5**6)
    assert mcnemar_p(worse, base) == pytest.approx(2 * 0.5**6)
    assert mcnemar_p([*base, None, False], [*worse, True, None]) == pytest.approx(2 * 0.5**6)


def test_means_leave_out_what_is_not_there():
    assert mean([1.0, None, 2.0]) == 1.5


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match=r"package scipy is not installed(.|\n)*s2quant\[eval\]"):
        binomial_interval(1, 2)
