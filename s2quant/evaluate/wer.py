"""Errors of a transcript against the text that was to be spoken, and their averages.

Counts and alignments are those of jiwer. An utterance whose transcript is empty counts with all its words deleted;
none is ever left out. Two averages are in use and differ: `corpus_rate`, all errors over all words, and `mean_rate`,
the mean over utterances, which seed-tts-eval publishes and in which short texts weigh more.

Source: https://github.com/BytedanceSpeech/seed-tts-eval/blob/752f4297f090c46bb1a55a1f7439e5944ddefe8d/average_wer.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from s2quant.errors import UserError
from s2quant.evaluate.text import Unit, normalize, strip_marks, unit_of

Step = tuple[Literal["equal", "substitute", "delete", "insert"], tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The errors of one transcript.

    Args:
        hits: Units of the reference that were heard.
        substitutions: Units heard as another.
        deletions: Units not heard.
        insertions: Units heard that are not in the reference.
        unit: What a unit is: a word or a character.
        reference_norm: The reference as it was compared.
        hypothesis_norm: The transcript as it was compared.
        alignment: Runs of (kind, units of the reference, units of the transcript), in order.
    """

    hits: int
    substitutions: int
    deletions: int
    insertions: int
    unit: Unit
    reference_norm: str
    hypothesis_norm: str
    alignment: tuple[Step, ...]

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def num_reference(self) -> int:
        """Units of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per unit of the reference, above 1 when much was inserted; of an empty reference the insertions."""
        return self.errors / max(1, self.num_reference)


def score(reference: str, hypothesis: str, normalizer: str, lang: str) -> Score:
    """Compare a transcript with the text that was to be spoken.

    Args:
        reference: The text as the model took it; tags and speaker marks are stripped here.
        hypothesis: The transcript as the recognizer gave it.
        normalizer: One of `s2quant.suite.NORMALIZERS`.
        lang: ISO 639 code.

    Returns:
        Counts and alignment.

    Raises:
        UserError: The normalizer does not fit, or jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise UserError(
            "a word error rate is wanted, and the package jiwer is not installed",
            "the packages of s2quant[eval]",
            "pip install 's2quant[eval]'",
        ) from error
    reference_norm = normalize(strip_marks(reference), normalizer, lang)
    hypothesis_norm = normalize(hypothesis, normalizer, lang)
    # Characters stand with spaces between them, so words are the units in either case.
    found = jiwer.process_words(reference_norm, hypothesis_norm)
    words, heard = found.references[0], found.hypotheses[0]
    alignment = tuple(
        (
            chunk.type,
            tuple(words[chunk.ref_start_idx : chunk.ref_end_idx]),
            tuple(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in found.alignments[0]
    )
    return Score(
        hits=found.hits,
        substitutions=found.substitutions,
        deletions=found.deletions,
        insertions=found.insertions,
        unit=unit_of(lang),
        reference_norm=reference_norm,
        hypothesis_norm=hypothesis_norm,
        alignment=alignment,
    )


def corpus_rate(scores: Sequence[Score]) -> float | None:
    """Divide all errors by all units of the references.

    Args:
        scores: One score an utterance.

    Returns:
        A fraction, or None when the references hold nothing.
    """
    units = sum(one.num_reference for one in scores)
    return sum(one.errors for one in scores) / units if units else None


def mean_rate(scores: Sequence[Score]) -> float | None:
    """Average the rates of the utterances, each with the same weight.

    Args:
        scores: One score an utterance.

    Returns:
        A fraction, or None without scores.
    """
    return float(np.mean([one.rate for one in scores])) if scores else None


def seed_tts_rate(scores: Sequence[Score]) -> float | None:
    """Give the figure that seed-tts-eval prints, as a fraction.

    Args:
        scores: One score an utterance, made with the normalizer `seed-tts`; a missing clip counts here with an empty
            transcript, while its scripts leave it out.

    Returns:
        The mean rate, rounded to the three digits after the point of the percentage that average_wer.py prints; None
        without scores.
    """
    mean = mean_rate(scores)
    return None if mean is None else round(round(mean * 100, 3) / 100, 5)
