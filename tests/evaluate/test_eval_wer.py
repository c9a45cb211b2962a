import json
import random
from pathlib import Path

import pytest

from s2quant.errors import UserError
from s2quant.evaluate.wer import Score, corpus_rate, mean_rate, score, seed_tts_rate

pytest.importorskip("jiwer")

GOLDEN = json.loads((Path(__file__).parent.parent / "golden/evaluate/seed_tts.json").read_text(encoding="utf-8"))


def distance(a: list[str], b: list[str]) -> int:
    """Levenshtein distance, from its definition."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (left != right))
    return row[-1]


@pytest.mark.parametrize("lang", sorted(GOLDEN["languages"]))
def test_the_figure_of_seed_tts_eval_to_all_printed_digits(lang: str) -> None:
    part = GOLDEN["languages"][lang]
    scores = [score(row["reference"], row["hypothesis"], "seed-tts", lang) for row in part["rows"]]
    assert [one.rate for one in scores] == [row["wer"] for row in part["rows"]]
    assert f"WER: {round(seed_tts_rate(scores) * 100, 3)}%" == part["printed"]
    assert mean_rate(scores) == pytest.approx(seed_tts_rate(scores), abs=5e-6)


def test_counts_and_alignment() -> None:
    found = score("[slow] The cat sat on the mat.", "a cat sat down on mat", "seed-tts", "en")
    assert (found.hits, found.substitutions, found.deletions, found.insertions) == (4, 1, 1, 1)
    assert found.alignment == (
        ("substitute", ("the",), ("a",)),
        ("equal", ("cat", "sat"), ("cat", "sat")),
        ("insert", (), ("down",)),
        ("equal", ("on",), ("on",)),
        ("delete", ("the",), ()),
        ("equal", ("mat",), ("mat",)),
    )
    assert (found.errors, found.num_reference, found.rate, found.unit) == (3, 6, 0.5, "word")
    assert (found.reference_norm, found.hypothesis_norm) == ("the cat sat on the mat", "a cat sat down on mat")


def test_characters_are_the_units_of_chinese() -> None:
    pytest.importorskip("whisper")
    for normalizer in ("seed-tts", "whisper-basic"):
        found = score(
            "[pause] \u6e56\u6c34\u7ed3\u51b0\u4e86\u3002", "\u6e56\u6c34\u7ed3\u4e86\u51b0", normalizer, "zh"
        )
        assert (found.unit, found.num_reference, found.errors) == ("character", 5, 2)


def test_a_silent_clip_counts_with_all_its_words_deleted() -> None:
    silent = score("Nobody answered the door.", "", "seed-tts", "en")
    good = score("Good evening.", "good evening", "seed-tts", "en")
    assert (silent.deletions, silent.rate, silent.alignment[0][0]) == (4, 1.0, "delete")
    assert corpus_rate([silent, good]) == 4 / 6
    assert mean_rate([silent, good]) == 0.5


def test_an_empty_reference() -> None:
    nothing = score("[laughing]", "", "seed-tts", "en")
    heard = score("[laughing]", "ha ha", "seed-tts", "en")
    assert (nothing.rate, nothing.num_reference, nothing.alignment) == (0.0, 0, ())
    assert (heard.rate, heard.insertions) == (2.0, 2)
    assert corpus_rate([nothing]) is None
    assert corpus_rate([heard, score("one two", "one two", "seed-tts", "en")]) == 1.0


def test_nothing_measured_is_none_and_not_zero() -> None:
    assert corpus_rate([]) is None
    assert mean_rate([]) is None
    assert seed_tts_rate([]) is None


def test_errors_are_the_levenshtein_distance() -> None:
    rng = random.Random(3)
    words = ["one", "two", "three", "four", "five"]
    for _ in range(200):
        reference = [rng.choice(words) for _ in range(rng.randrange(9))]
        hypothesis = [rng.choice(words) for _ in range(rng.randrange(9))]
        found = score(" ".join(reference), " ".join(hypothesis), "seed-tts", "en")
        assert found.errors == distance(reference, hypothesis)
        assert found.num_reference == len(reference)
        assert [word for _, left, _ in found.alignment for word in left] == reference
        assert [word for _, _, right in found.alignment for word in right] == hypothesis


def test_the_two_averages_differ() -> None:
    short = score("no", "yes", "seed-tts", "en")
    long = score("a b c d e f g h i", "a b c d e f g h i", "seed-tts", "en")
    assert (corpus_rate([short, long]), mean_rate([short, long])) == (0.1, 0.5)
    assert isinstance(short, Score)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    with pytest.raises(UserError, match=r"jiwer is not installed[\s\S]*s2quant\[eval\]"):
        score("a", "a", "seed-tts", "en")
