"""A model is not called as good as a baseline that nobody understands."""

from __future__ import annotations

import pytest

from s2quant.evaluate.metrics import MAX_JUDGED_WER, Metric, Table, metric_row, num_errors, num_units
from s2quant.evaluate.verdict import _margin_sentence
from s2quant.records import Arm, UtteranceRecord

WORDS = 20


def spoken(arm: Arm, utt: int, errors: int) -> UtteranceRecord:
    asr = {"unit": "word", "hits": WORDS - errors, "substitutions": errors, "deletions": 0, "insertions": 0}
    return UtteranceRecord(
        suite="s", suite_version=1, arm=arm, utt=str(utt), seed=0, lang="en", text="t", reference="t", has_tags=False,
        asr=asr,
    )  # fmt: skip


def table(errors: int) -> Table:
    rows = [{arm: spoken(arm, utt, errors) for arm in ("baseline", "model")} for utt in range(8)]
    return Table(
        rows=rows, clusters=[str(i) for i in range(8)], cluster_by="utterance", arms=("baseline", "model"), silent=()
    )


@pytest.mark.parametrize(("errors", "verdict"), [(0, "non-inferior"), (10, "non-inferior"), (11, "inconclusive")])
def test_equal_arms_are_as_good_only_where_words_are_heard(errors, verdict):
    assert 10 / WORDS <= MAX_JUDGED_WER < 11 / WORDS
    corpus = Metric(
        name="WER (corpus)", unit="fraction", better="lower", backend="b", margin_key="wer", measure=num_errors,
        weight=num_units,
    )  # fmt: skip
    row = metric_row(table(errors), corpus, {"wer": 0.01})
    assert (row["delta"], row["interval"], row["verdict"]) == (0.0, [0.0, 0.0], verdict)
    said = "the baseline itself is not understood (55.00 points of WER (corpus))"
    assert (said in _margin_sentence(row)) == (verdict == "inconclusive")
