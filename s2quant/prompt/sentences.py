"""Cutting a long text where a speaker would pause: between paragraphs and sentences, else clauses, else words.

Only positions are chosen; no character is changed, and only blanks at a cut are lost. A [tag] is never cut and never
parted from the words after it. A word is never cut: a stretch with no place to cut (a very long word, or Chinese,
Japanese or Thai without any sign or blank) stays whole even when it is longer than asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

# Signs are written as escapes: full-width and ideographic ones end a sentence or clause without a blank after them;
# the others (Latin, Arabic, Devanagari, Burmese, Khmer, Ethiopic, Armenian, Tibetan) only with one.
_CLOSERS = r"[\"')\]\u00bb\u2019\u201d\u3009\u300b\u300d\u300f\u3011\uff02\uff07\uff09\uff3d\uff63]*"
# No expression may try a run of signs or blanks from each of its places, or long runs would take quadratic time.
_STOPS = r".!?\u2026\u061f\u06d4\u0964\u0965\u104b\u17d4\u1362\u0589\u0f0d"
_PAUSES = r",;:\u060c\u061b\u104a\u1363"
_SENTENCE = re.compile(
    rf"[\u3002\uff01\uff1f\uff61]+{_CLOSERS}\s*|(?<![{_STOPS}])[{_STOPS}]+{_CLOSERS}\s+|\n\s*",
)
_CLAUSE = re.compile(
    rf"[\uff0c\u3001\uff1b\uff1a\uff64\u2026]+{_CLOSERS}\s*|(?<![{_PAUSES}])[{_PAUSES}]+{_CLOSERS}\s+"
    r"|[\u2014\u2013]+\s*|(?<=\s)-+\s+"
)
_WORD = re.compile(r"\s+")
_TAG = re.compile(r"\[[^\[\]\n]*\]")
# A full stop after these does not end a sentence; nor does one after a single letter or before a small letter.
_ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "gen", "col", "capt", "sgt", "lt", "rev", "hon")
    + ("vs", "etc", "e.g", "i.e", "nr", "vol", "fig", "al", "approx", "dept", "est")
)
_BEFORE_STOP = re.compile(r"([^\W\d_](?:[\w.]*\w)?)\.$")


def split_sentences(text: str, max_bytes: int) -> list[str]:
    """Cut a text into pieces of a limited length.

    Args:
        text: The text.
        max_bytes: The most UTF-8 bytes of a piece, unless there is no place to cut.

    Returns:
        Pieces in order, blanks around each removed; the text itself, untouched, if it is short enough.
    """
    ends = [0, *accumulate(len(character.encode("utf-8")) for character in text)]
    if ends[-1] <= max_bytes:
        return [text]
    masked = _TAG.sub(lambda tag: "\ue000" * len(tag.group()), text)  # a private character: no sign, blank or letter
    levels = [
        [cut.end() for cut in _SENTENCE.finditer(masked) if not _is_abbreviation(masked, cut)],
        [cut.end() for cut in _CLAUSE.finditer(masked)],
        [cut.end() for cut in _WORD.finditer(masked)],
    ]
    spans = _cut(masked, 0, len(text), levels, ends, max_bytes)
    return [piece for start, end in spans if (piece := text[start:end].strip())]


def _is_abbreviation(text: str, cut: re.Match[str]) -> bool:
    if "\n" in cut.group() or not cut.group().rstrip().endswith(".") or cut.group().startswith(".."):
        return False
    if text[cut.end() : cut.end() + 1].islower():
        return True
    before = _BEFORE_STOP.search(text[max(0, cut.start() - 40) : cut.start() + 1])
    return before is not None and (len(before[1]) == 1 or before[1].lower() in _ABBREVIATIONS)


def _cut(
    text: str, start: int, end: int, levels: Sequence[Sequence[int]], ends: Sequence[int], max_bytes: int
) -> list[tuple[int, int]]:
    """Cut text[start:end] at the strongest places that do, then join neighbours as far as they fit."""
    if not levels or ends[end] - ends[start] <= max_bytes:
        return [(start, end)]
    places = [start, *(place for place in levels[0] if start < place < end), end]
    segments = _with_words(text, list(pairwise(places)))
    joined: list[tuple[int, int]] = []
    for segment in segments:
        for low, high in _cut(text, *segment, levels[1:], ends, max_bytes):
            length = low + len(text[low:high].rstrip())
            if joined and ends[length] - ends[joined[-1][0]] <= max_bytes:
                joined[-1] = (joined[-1][0], high)
            else:
                joined.append((low, high))
    return joined


def _with_words(text: str, segments: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join segments that hold only tags and signs to the next one, or to the one before at the end of a line."""
    joined: list[tuple[int, int]] = []
    pending: int | None = None
    for start, end in segments:
        first = start if pending is None else pending
        pending = None
        if re.search(r"\w", text[start:end]):
            joined.append((first, end))
        elif joined and (end == segments[-1][1] or "\n" in text[start:end]):
            joined[-1] = (joined[-1][0], end)
        else:
            pending = first
    if pending is not None:
        joined.append((pending, segments[-1][1]))
    return joined
