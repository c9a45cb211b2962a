"""The sentences of s2-mini: the same on every run, splits that never mix, tags that are heard."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from mini import calibration, grammar

ROOT = Path(__file__).resolve().parents[2]


def take(seed: int, split: grammar.Split, count: int) -> list[str]:
    return list(itertools.islice(grammar.sentences(seed, split), count))


def test_sentences_are_the_same_on_every_run() -> None:
    assert take(0, "train", 3) == [
        "Martin and Susan carried some cotton near the restaurant.",
        "The driver ordered the small hammer across the bridge.",
        "Why did the brave pilot laugh inside the river?",
    ]
    assert take(0, "train", 50) != take(1, "train", 50)


def test_splits_are_disjoint_and_sentences_distinct() -> None:
    splits = {split: take(5, split, 1500) for split in ("train", "validation", "test")}
    keys = {split: {tuple(grammar.words_of(text)) for text in texts} for split, texts in splits.items()}
    assert all(len(k) == 1500 for k in keys.values())
    for a, b in itertools.combinations(keys.values(), 2):
        assert not a & b
    for split, texts in splits.items():
        assert {grammar.split_of(text) for text in texts} == {split}
        assert {grammar.split_of(f"[slow] {text.upper()}") for text in texts} == {split}


def test_sizes() -> None:
    words = grammar.vocabulary()
    assert 300 <= len(words) <= 600
    lengths = [len(grammar.words_of(text)) for text in take(2, "train", 2000)]
    assert min(lengths) >= 3
    assert max(lengths) <= 12
    assert {word for text in take(2, "train", 8000) for word in grammar.words_of(text)} == set(words)


def test_tags_are_not_words() -> None:
    rng = random.Random(0)
    seen = set()
    for sentence in take(3, "test", 200):
        tagged = grammar.with_tags(sentence, rng)
        assert tagged != sentence
        assert grammar.spoken(tagged) == sentence
        assert grammar.words_of(tagged) == grammar.words_of(sentence)
        seen.update(tag for tag in grammar.TAGS if f"[{tag}]" in tagged)
    assert seen == set(grammar.TAGS)
    assert grammar.spoken("<|speaker:3|>[low] We [pause] went.") == "We went."


def test_the_calibration_file_is_what_the_script_writes() -> None:
    rows = [json.loads(line) for line in (ROOT / "recipes/calibration/s2-mini.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == calibration.texts()
    assert len({row["id"] for row in rows}) == len(rows) == calibration.COUNT
    turns = [turn for row in rows for turn in row["text"].split("\n")]
    assert {grammar.split_of(turn) for turn in turns} == {"train"}


@pytest.mark.parametrize("text", ["", "[pause]"])
def test_nothing_is_heard_of_nothing(text: str) -> None:
    assert grammar.words_of(text) == []
