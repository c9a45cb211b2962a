"""What went wrong with a clip, kind by kind: an axis of its own, apart from every average.

A handful of clips that break off or never end moves a mean as much as a thousand slightly worse ones, so they are
counted. Each kind is told from what the clip itself shows: its codes, its samples, its transcript, and the duration
of the baseline's clip of the same text and seed. A kind that cannot be told, for want of a transcript or of sound,
is None. Clips of the baseline have no duration to be compared with, so `truncated` and `run_on` of another arm catch
a little more: their noise floor is the baseline with other seeds, which is compared the same way.

Legend: N codebooks, F frames, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

KINDS = (
    "no_end",
    "empty",
    "truncated",
    "run_on",
    "repeated_words",
    "repeated_codes",
    "long_silence",
    "clipping",
    "not_finite",
)
Unit = Literal["word", "character"]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where something unusual becomes a failure.

    "Field" marks values in use elsewhere, "measured" those from the spread of 1088 English clips (99 % of them at
    0.22 to 0.63 s per word), "ours" a choice of this project, on the lenient side.

    Args:
        min_duration_ratio: Shorter than this times the baseline is truncated (ours; 1 / 1.5).
        max_duration_ratio: Longer than this times the baseline is run on (ours).
        min_unit_ratio: Fewer units heard than this times those of the text is truncated (ours).
        max_unit_ratio: More than this is run on (ours; 1 / 0.6).
        min_word_s: Less than this many seconds per word is truncated (measured).
        max_word_s: More than this is run on (measured).
        min_units: Texts with fewer units are not judged by ratios: a word more or less is too much of them (ours).
        inserted_words: As many words in a row that are not in the text are a repetition (ours).
        inserted_characters: The same, where the unit is a character (ours).
        ngram_words: A sequence of as many words, heard more often than it is in the text, is one too (ours).
        ngram_characters: The same, where the unit is a character (ours).
        equal_codes: As many equal semantic codes in a row (ours; 0.56 s).
        ngram_codes: As many semantic codes, not all equal, that come again later, without overlap (ours; 0.37 s).
        silence_dbfs: A window at or below this level is silent (field: sglang-omni's audio checks).
        silence_window_ms: Length of a window (field: the same).
        max_silence_s: A longer silence within a clip is a failure (ours).
        clipped_level: A sample at or above this magnitude is clipped (ours).
        clipped_fraction: More than this fraction of clipped samples is a failure (ours).
    """

    min_duration_ratio: float = 0.67
    max_duration_ratio: float = 1.5
    min_unit_ratio: float = 0.6
    max_unit_ratio: float = 1.67
    min_word_s: float = 0.2
    max_word_s: float = 0.9
    min_units: int = 4
    inserted_words: int = 4
    inserted_characters: int = 8
    ngram_words: int = 4
    ngram_characters: int = 8
    equal_codes: int = 12
    ngram_codes: int = 8
    silence_dbfs: float = -60.0
    silence_window_ms: float = 20.0
    max_silence_s: float = 2.0
    clipped_level: float = 0.999
    clipped_fraction: float = 0.001


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What the recognizer heard, as it was compared with the text.

    Args:
        unit: Whether a unit is a word or a character.
        reference: Units of the text.
        hypothesis: Units that were heard.
        alignment: Runs of (kind, units of the text, units heard), kinds as jiwer calls them.
    """

    unit: Unit
    reference: Sequence[str]
    hypothesis: Sequence[str]
    alignment: Sequence[tuple[str, Sequence[str], Sequence[str]]]

    @classmethod
    def of(cls, asr: Mapping[str, Any]) -> Heard:
        """Read the object `asr` of a record.

        Args:
            asr: With unit and alignment.

        Returns:
            What was heard.
        """
        alignment = [(kind, tuple(said), tuple(heard)) for kind, said, heard in asr["alignment"]]
        return cls(
            unit=asr["unit"],
            reference=[unit for _, said, _ in alignment for unit in said],
            hypothesis=[unit for _, _, heard in alignment for unit in heard],
            alignment=alignment,
        )


@dataclass(frozen=True, kw_only=True)
class ClipFailures:
    """What is wrong with one clip.

    Args:
        flags: For each of `KINDS` whether it is so; None where that cannot be told.
        duration_ratio: Frames over those of the baseline's clip; None without one, or when that one is empty.
    """

    flags: Mapping[str, bool | None]
    duration_ratio: float | None


def find_failures(
    *,
    stop_reason: str,
    codes: Tensor,
    audio: Tensor | None = None,
    sample_rate: int = 44100,
    audio_s: float | None = None,
    heard: Heard | None = None,
    has_tags: bool = False,
    baseline_frames: int | None = None,
    thresholds: Thresholds | None = None,
) -> ClipFailures:
    """Look a clip over.

    Args:
        stop_reason: Why it ended: "end" when the model said so itself.
        codes: int64 [N, F].
        audio: float32 [S] as the codec made it (a 16-bit file can hold neither NaN nor overshoot), or None.
        sample_rate: Rate of the sound in Hz.
        audio_s: Duration; None means that of audio.
        heard: The transcript's comparison, or None.
        has_tags: Whether the text has inline tags: laughter takes time that no word accounts for.
        baseline_frames: F of the baseline's clip; None for the baseline itself.
        thresholds: Where the lines are drawn.

    Returns:
        All flags, and the duration against the baseline.
    """
    limits = thresholds or Thresholds()
    assert codes.ndim == 2, codes.shape
    num_frames = codes.shape[1]
    if audio_s is None and audio is not None:
        audio_s = audio.shape[0] / sample_rate
    ratio = num_frames / baseline_frames if baseline_frames else None
    words_s = None if has_tags else audio_s
    short, long = _wrong_length(heard, words_s, ratio, limits)
    finite = None if audio is None else bool(torch.isfinite(audio).all())
    sound = audio.detach().cpu().float().numpy() if audio is not None and finite else None
    flags: dict[str, bool | None] = {
        "no_end": stop_reason != "end",
        "empty": num_frames == 0,
        "truncated": short,
        "run_on": long,
        "repeated_words": None if heard is None else repeated_words(heard, limits),
        "repeated_codes": repeated_codes(codes[0].tolist() if num_frames else [], limits),
        "long_silence": None if sound is None else longest_silence_s(sound, sample_rate, limits) > limits.max_silence_s,
        "clipping": None if sound is None else clipped_fraction(sound, limits) > limits.clipped_fraction,
        "not_finite": None if finite is None else not finite,
    }
    assert tuple(flags) == KINDS
    return ClipFailures(flags=flags, duration_ratio=ratio)


def _wrong_length(
    heard: Heard | None, audio_s: float | None, duration_ratio: float | None, limits: Thresholds
) -> tuple[bool | None, bool | None]:
    """Tell whether a clip is too short or too long, by every sign there is; None when there is none."""
    signs: list[tuple[bool, bool]] = []
    if duration_ratio is not None:
        signs.append((duration_ratio < limits.min_duration_ratio, duration_ratio > limits.max_duration_ratio))
    if heard is not None and len(heard.reference) >= limits.min_units:
        units = len(heard.hypothesis) / len(heard.reference)
        signs.append((units < limits.min_unit_ratio, units > limits.max_unit_ratio))
        if heard.unit == "word" and audio_s is not None:
            pace = audio_s / len(heard.reference)
            signs.append((pace < limits.min_word_s, pace > limits.max_word_s))
    if not signs:
        return None, None
    return any(short for short, _ in signs), any(long for _, long in signs)


def repeated_words(heard: Heard, limits: Thresholds) -> bool:
    """Tell whether words were said that are not in the text, many in a row, or a part of it twice.

    Args:
        heard: The transcript's comparison.
        limits: Thresholds.

    Returns:
        Whether so.
    """
    words = heard.unit == "word"
    run = limits.inserted_words if words else limits.inserted_characters
    size = limits.ngram_words if words else limits.ngram_characters
    if any(kind == "insert" and len(added) >= run for kind, _, added in heard.alignment):
        return True
    said = _count_ngrams(heard.reference, size)
    return any(count > max(1, said.get(gram, 0)) for gram, count in _count_ngrams(heard.hypothesis, size).items())


def _count_ngrams(units: Sequence[Any], size: int) -> dict[tuple[Any, ...], int]:
    """Count n-grams without counting one that overlaps its own last occurrence."""
    counts: dict[tuple[Any, ...], int] = {}
    last: dict[tuple[Any, ...], int] = {}
    for start in range(len(units) - size + 1):
        gram = tuple(units[start : start + size])
        if start >= last.get(gram, -size) + size:
            counts[gram], last[gram] = counts.get(gram, 0) + 1, start
    return counts


def repeated_codes(semantic: Sequence[int], limits: Thresholds) -> bool:
    """Tell whether the semantic codes hang or go round in a circle.

    Args:
        semantic: The first codebook's codes.
        limits: Thresholds.

    Returns:
        Whether so.
    """
    run = 0
    for index, code in enumerate(semantic):
        run = run + 1 if index and code == semantic[index - 1] else 1
        if run >= limits.equal_codes:
            return True
    grams = _count_ngrams(semantic, limits.ngram_codes)  # equal ones, two short pauses say, are left to the run
    return any(count > 1 and len(set(gram)) > 1 for gram, count in grams.items())


def longest_silence_s(audio: npt.NDArray[np.float32], sample_rate: int, limits: Thresholds) -> float:
    """Measure the longest run of silent windows; a rest shorter than a window does not count.

    Args:
        audio: Finite float32 [S].
        sample_rate: Rate in Hz.
        limits: Thresholds.

    Returns:
        Its length in seconds.
    """
    window = round(limits.silence_window_ms / 1000 * sample_rate)
    count = len(audio) // window
    power = np.square(audio[: count * window].reshape(count, window), dtype=np.float64).mean(axis=1)
    silent = power <= 10 ** (limits.silence_dbfs / 10)
    edges = np.diff(np.concatenate([[0], silent.astype(np.int8), [0]]))
    runs = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
    return float(runs.max(initial=0)) * window / sample_rate


def clipped_fraction(audio: npt.NDArray[np.float32], limits: Thresholds) -> float:
    """Measure how much of the sound is at full scale.

    Args:
        audio: Finite float32 [S].
        limits: Thresholds.

    Returns:
        Fraction of the samples; 0 of no samples.
    """
    return float((np.abs(audio) >= limits.clipped_level).mean()) if len(audio) else 0.0
