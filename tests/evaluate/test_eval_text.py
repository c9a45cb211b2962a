import json
from pathlib import Path

import pytest

from s2quant.errors import UserError
from s2quant.evaluate.text import CHARACTER_LANGUAGES, HANZI_PUNCTUATION, has_tags, normalize, strip_marks, unit_of
from s2quant.suite import NORMALIZERS

GOLDEN = json.loads((Path(__file__).parent.parent / "golden/evaluate/seed_tts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Plain words, no marks.", "Plain words, no marks."),
        ("[whisper] Don't turn around.", "Don't turn around."),
        ("Hello [laughing], you two!", "Hello, you two!"),
        ("<|speaker:0|>Is it?\n<|speaker:12|>[pause] It is.", "Is it? It is."),
        ("a [very long description of a mood] b", "a b"),
        ("[pause]", ""),
        ("\u4f60\u597d[pause]\uff0c\u4e16\u754c", "\u4f60\u597d\uff0c\u4e16\u754c"),
        ("An open [ bracket stays", "An open [ bracket stays"),
        ("<|im_end|> is no speaker mark", "<|im_end|> is no speaker mark"),
    ],
)
def test_marks_are_taken_out(text: str, plain: str) -> None:
    assert strip_marks(text) == plain
    assert has_tags(text) == ("]" in text)


@pytest.mark.parametrize("lang", sorted(GOLDEN["languages"]))
def test_seed_tts_is_process_one_character_for_character(lang: str) -> None:
    rows = GOLDEN["languages"][lang]["rows"]
    assert len(rows) >= 7
    for row in rows:
        assert normalize(row["reference"], "seed-tts", lang) == row["reference_norm"]
        assert normalize(row["hypothesis"], "seed-tts", lang) == row["hypothesis_norm"]


def test_the_punctuation_is_that_of_zhon() -> None:
    assert GOLDEN["punctuation"] == HANZI_PUNCTUATION
    assert "\u2019" in HANZI_PUNCTUATION  # a curly apostrophe is deleted, a straight one stays
    assert normalize("doesn\u2019t doesn't", "seed-tts", "en") == "doesnt doesn't"


def test_the_two_normalizers_of_whisper() -> None:
    pytest.importorskip("whisper")
    text = "Doesn't Mr. Brown owe me twenty-one dollars [noise] (sigh)?"
    assert normalize(text, "whisper-english", "en") == "does not mister brown owe me $21"
    assert normalize(text, "whisper-basic", "en") == "doesn t mr brown owe me twenty one dollars"
    assert (
        normalize("\u00bfD\u00f3nde est\u00e1s, Jos\u00e9?", "whisper-basic", "es") == "d\u00f3nde est\u00e1s jos\u00e9"
    )
    assert normalize("\u4f60\u597d\uff0c \u4e16\u754c\u3002", "whisper-basic", "zh") == "\u4f60 \u597d \u4e16 \u754c"
    assert normalize("", "whisper-basic", "zh") == normalize("?!", "whisper-english", "en") == ""


def test_units() -> None:
    assert {lang for lang in ("en", "de", "ar", "zh", "ja", "ko", "th", "ru") if unit_of(lang) == "character"} == {
        "zh", "ja", "ko", "th",
    }  # fmt: skip
    assert "en" not in CHARACTER_LANGUAGES


def test_a_normalizer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"normalizer 'whisper'[\s\S]*one of whisper-english, whisper-basic, seed-tts"):
        normalize("a", "whisper", "en")
    for normalizer, lang in (("whisper-english", "de"), ("seed-tts", "ja")):
        with pytest.raises(UserError, match=rf"normalizer {normalizer} for the language '{lang}'[\s\S]*whisper-basic"):
            normalize("a", normalizer, lang)
    assert len(NORMALIZERS) == 3


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2quant.evaluate import text

    text._whisper.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "whisper", None)
    with pytest.raises(UserError, match=r"openai-whisper is not installed[\s\S]*s2quant\[eval\]"):
        normalize("a", "whisper-basic", "en")
