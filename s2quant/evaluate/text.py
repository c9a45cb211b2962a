"""What is compared of a text: its marks taken out, its writing made one.

A word error rate is worth as much as its normalizer: on the same 1,088 transcripts two of those here differ by 0.66
points. So every one has a name, and the name stands beside every number:

- `whisper-english`: `EnglishTextNormalizer` of openai-whisper (number words, contractions, British spellings).
- `whisper-basic`: `BasicTextNormalizer` of openai-whisper, for any language (lower case, no punctuation or brackets).
  It drops combining marks, so Thai and Hindi are compared by what is left.
- `seed-tts`: what run_wer.py of seed-tts-eval does: ASCII and full-width punctuation deleted, not spaced, except the
  ASCII apostrophe; lower case for English, every character a unit for Chinese. No number words, no contractions.

Inline [tags] and speaker marks are no speech: `strip_marks` takes them from a reference before any of these.

Source: https://github.com/BytedanceSpeech/seed-tts-eval/blob/752f4297f090c46bb1a55a1f7439e5944ddefe8d/run_wer.py
(process_one); the list of full-width punctuation is that of zhon 2.1 (hanzi.punctuation).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

from s2quant.errors import UserError
from s2quant.suite import NORMALIZER_LANGUAGES, NORMALIZERS

Unit = Literal["word", "character"]

# Written without spaces between words, or (Korean) with spaces that writers do not agree on.
CHARACTER_LANGUAGES = frozenset({"zh", "yue", "wuu", "ja", "ko", "th", "lo", "my", "km", "bo"})

# zhon.hanzi.punctuation of zhon 2.1, character for character; pinned here so that no version of it moves a number.
HANZI_PUNCTUATION = (
    "\uff02\uff03\uff04\uff05\uff06\uff07\uff08\uff09\uff0a\uff0b\uff0c\uff0d\uff0f\uff1a\uff1b\uff1c\uff1d\uff1e"
    "\uff20\uff3b\uff3c\uff3d\uff3e\uff3f\uff40\uff5b\uff5c\uff5d\uff5e\uff5f\uff60\uff62\uff63\uff64\u3000\u3001"
    "\u3003\u3008\u3009\u300a\u300b\u300c\u300d\u300e\u300f\u3010\u3011\u3014\u3015\u3016\u3017\u3018\u3019\u301a"
    "\u301b\u301c\u301d\u301e\u301f\u3030\u303e\u303f\u2013\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026"
    "\u2027\ufe4f\ufe51\ufe54\u00b7\uff0e\uff01\uff1f\uff61\u3002"
)
_SEED_TTS_DELETED = str.maketrans("", "", (HANZI_PUNCTUATION + string.punctuation).replace("'", ""))

_SPEAKER = re.compile(r"<\|speaker:\d+\|>")
_TAG = re.compile(r"\[[^\[\]]*\]")
_SPACE_BEFORE_POINT = re.compile(r" +(?=[.,;:!?\u3002\uff0c\uff01\uff1f\u3001])")


def has_tags(text: str) -> bool:
    """Tell whether a text holds inline tags.

    Args:
        text: A text as the model takes it.

    Returns:
        True when there is a `[tag]`.
    """
    return _TAG.search(text) is not None


def strip_marks(text: str) -> str:
    """Take out of a text what is not spoken: inline tags and speaker marks.

    Args:
        text: A text as the model takes it, such as `<|speaker:0|>Well [laughing], no.`.

    Returns:
        The words and punctuation, with single spaces: `Well, no.`.
    """
    plain = " ".join(_TAG.sub(" ", _SPEAKER.sub(" ", text)).split())
    return _SPACE_BEFORE_POINT.sub("", plain)


def unit_of(lang: str) -> Unit:
    """Tell what errors are counted in.

    Args:
        lang: ISO 639 code.

    Returns:
        "character" for languages such as Chinese, Japanese, Korean and Thai, else "word".
    """
    return "character" if lang in CHARACTER_LANGUAGES else "word"


def normalize(text: str, normalizer: str, lang: str) -> str:
    """Bring a reference or a transcript to the writing that is compared.

    Args:
        text: The text, without marks (`strip_marks`).
        normalizer: One of `s2quant.suite.NORMALIZERS`.
        lang: ISO 639 code.

    Returns:
        Units with spaces between them: words, or single characters where `unit_of(lang)` says so. With `seed-tts`
        there may be spaces too many, as its script leaves them.

    Raises:
        UserError: The normalizer is unknown or not made for the language, or openai-whisper is not installed.
    """
    if normalizer not in NORMALIZERS:
        raise UserError(f"normalizer {normalizer!r}", f"one of {', '.join(NORMALIZERS)}", "mend the suite")
    languages = NORMALIZER_LANGUAGES[normalizer]
    if languages is not None and lang not in languages:
        raise UserError(
            f"normalizer {normalizer} for the language {lang!r}",
            f"one of {', '.join(languages)}",
            "use whisper-basic, which is for any language",
        )
    if normalizer == "seed-tts":
        return _seed_tts(text, lang)
    plain = _whisper(normalizer)(text)
    return " ".join("".join(plain.split()) if unit_of(lang) == "character" else plain.split())


def _seed_tts(text: str, lang: str) -> str:
    plain = text.translate(_SEED_TTS_DELETED).replace("  ", " ")  # once, as its script does
    return " ".join(plain) if lang == "zh" else plain.lower()


@lru_cache(maxsize=2)
def _whisper(normalizer: str) -> Callable[[str], str]:
    try:
        from whisper import normalizers
    except ImportError as error:
        raise UserError(
            f"normalizer {normalizer}, and the package openai-whisper is not installed",
            "the packages of s2quant[eval]",
            "pip install 's2quant[eval]'",
        ) from error
    if normalizer == "whisper-english":
        return normalizers.EnglishTextNormalizer()
    return normalizers.BasicTextNormalizer()
