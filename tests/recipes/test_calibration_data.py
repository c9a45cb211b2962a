"""The calibration texts that come with s2quant: what they must hold, counted."""

import difflib
import re
import unicodedata
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from s2quant.calibrate.lines import CalibrationLine, check_disjoint, normalize_text, read_lines
from s2quant.prompt import check_text

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "calibration"
LANGUAGES = {
    **{"en": 44, "zh": 36, "ja": 36},
    **{"ko": 22, "es": 22, "fr": 22, "de": 22, "pt": 20, "ru": 20, "ar": 18},
    **{"it": 10, "nl": 8, "pl": 8, "tr": 8, "hi": 8, "vi": 8, "sv": 8},
}
# Characters that take about as long to say as a word of the others.
CHARACTERS_PER_WORD = {"zh": 1.7, "ja": 2.0, "ko": 2.0}
SCRIPTS = {
    **{"zh": ("CJK",), "ja": ("HIRAGANA", "KATAKANA", "CJK"), "ko": ("HANGUL",)},
    **{"ar": ("ARABIC",), "ru": ("CYRILLIC",), "hi": ("DEVANAGARI",)},
}
SPEAKER = re.compile(r"<\|speaker:(\d+)\|>")
TAG = re.compile(r"\[([^\[\]]*)\]")


def spoken(line: CalibrationLine) -> str:
    return TAG.sub(" ", SPEAKER.sub(" ", line.text))


def num_words(line: CalibrationLine) -> float:
    text = spoken(line)
    if line.lang in CHARACTERS_PER_WORD:
        return sum(character.isalnum() for character in text) / CHARACTERS_PER_WORD[line.lang]
    return sum(any(character.isalnum() for character in word) for word in text.split())


@pytest.fixture(scope="module")
def lines() -> list[CalibrationLine]:
    return read_lines(FOLDER / "s2-pro.jsonl")


@pytest.fixture(scope="module")
def tiny() -> list[CalibrationLine]:
    return read_lines(FOLDER / "tiny-en.jsonl")


def test_languages(lines):
    assert Counter(line.lang for line in lines) == LANGUAGES and len(lines) == 320


def test_ids_name_the_language_and_count_up(lines):
    for lang, count in LANGUAGES.items():
        assert [line.id for line in lines if line.lang == lang] == [f"{lang}-{n:03d}" for n in range(1, count + 1)]


def test_scripts(lines):
    for line in lines:
        if line.lang in SCRIPTS:
            letters = [unicodedata.name(c) for c in spoken(line) if c.isalpha()]
            assert sum(name.startswith(SCRIPTS[line.lang]) for name in letters) >= 0.9 * len(letters), line


def test_lengths(lines):
    words = [num_words(line) for line in lines]
    assert all(1.5 <= count <= 60 for count in words)
    bins = Counter(min(int(count // 10), 4) for count in words)
    assert all(50 <= bins[index] <= 90 for index in range(5)), bins


def test_tags(lines):
    tagged = [line for line in lines if TAG.search(line.text)]
    tags = Counter(tag for line in lines for tag in TAG.findall(line.text))
    assert len(tagged) >= len(lines) / 3
    assert len(tags) >= 60 and all(re.fullmatch(r"[a-z]+( [a-z]+)*", tag) for tag in tags)
    assert sum(len(TAG.findall(line.text)) > 1 for line in tagged) >= 24
    inside = [
        line for line in tagged if any(normalize_text(line.text[: tag.start()]) for tag in TAG.finditer(line.text))
    ]
    assert len(inside) >= 24


def test_multi_speaker_lines(lines):
    dialogues = [line for line in lines if SPEAKER.search(line.text)]
    assert len(dialogues) >= 24 and len({line.lang for line in dialogues}) >= 14
    for line in dialogues:
        turns = line.text.split("\n")
        speakers = [SPEAKER.findall(turn) for turn in turns]
        assert 2 <= len(turns) <= 4 and all(len(found) == 1 for found in speakers), line
        assert all(SPEAKER.match(turn) and normalize_text(turn) for turn in turns), line
        names = list(dict.fromkeys(found[0] for found in speakers))
        assert names == [str(n) for n in range(len(names))] and 2 <= len(names) <= 3, line


def test_only_dialogues_have_newlines(lines, tiny):
    for line in [*lines, *tiny]:
        assert ("\n" in line.text) == bool(SPEAKER.search(line.text)), line


def test_texts_are_clean(lines, tiny):
    for line in [*lines, *tiny]:
        assert check_text(line.text) == line.text
        assert line.text == unicodedata.normalize("NFC", line.text).strip() and "  " not in line.text, line
        assert "<|" not in SPEAKER.sub("", line.text), line
        assert not set("[]") & set(TAG.sub("", line.text)), line
        bad = [c for c in line.text if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp") and c != "\n"]
        assert not bad, (line, bad)


def test_no_duplicates_nor_near_duplicates(lines, tiny):
    texts = [normalize_text(line.text) for line in [*lines, *tiny]]
    assert len(set(texts)) == len(texts)
    for first, second in combinations(texts, 2):
        # Same words but a few: cheap bound first, on lengths.
        if 2 * min(len(first), len(second)) > 1.4 * max(len(first), len(second)):
            matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
            if matcher.real_quick_ratio() > 0.8 and matcher.quick_ratio() > 0.8:
                assert matcher.ratio() < 0.8, (first, second)


@pytest.mark.parametrize("num", [64, 128, 256])
def test_prefixes_are_balanced(lines, num):
    prefix = lines[:num]
    expected = {lang: count * num / len(lines) for lang, count in LANGUAGES.items()}
    found = Counter(line.lang for line in prefix)
    assert all(abs(found[lang] - expected[lang]) <= 2.5 for lang in LANGUAGES), found
    tagged = sum(bool(TAG.search(line.text)) for line in lines) / len(lines)
    assert abs(sum(bool(TAG.search(line.text)) for line in prefix) / num - tagged) < 0.08
    assert sum(bool(SPEAKER.search(line.text)) for line in prefix) >= num // 12


def test_tiny_set(tiny):
    assert len(tiny) == 32 and {line.lang for line in tiny} == {"en"}
    assert all(2 <= num_words(line) <= 10 for line in tiny)
    assert all(line.text.isascii() for line in tiny)
    assert sum(bool(TAG.search(line.text)) for line in tiny) >= 11
    assert sum(bool(SPEAKER.search(line.text)) for line in tiny) == 3


def test_disjoint_from_the_evaluation(lines, tiny):
    check_disjoint([*lines, *tiny], ROOT / "eval")


def test_readme_names_the_counts(lines, tiny):
    readme = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert f"holds {len(lines)} lines in {len(LANGUAGES)} languages" in readme
    assert f"`calibration/tiny-en.jsonl` {len(tiny)} short" in readme
