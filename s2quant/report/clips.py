"""Clips to listen to: the worst regressions, and a sample that nobody chose."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from s2quant.files import sha256_text
from s2quant.report.format import adaptive, failure_name, finite, fixed, get
from s2quant.report.load import Record, Run
from s2quant.report.sound import Clip, audio_uri, read_clip, spectrogram_uri
from s2quant.report.tables import Cell, Table

MAX_WORST = 20
NUM_SAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class Word:
    """A stretch of an alignment.

    Args:
        kind: equal, substitute, delete or insert.
        reference: What should be said.
        heard: What the recognizer heard.
    """

    kind: str
    reference: str
    heard: str


@dataclass(frozen=True, kw_only=True)
class Side:
    """One clip of a card.

    Args:
        label: Whose it is.
        absent: Why there is no audio; empty when there is.
        uri: The audio as a data URI, when embedded.
        link: The audio's path relative to the page.
        seconds: Its length, as text.
        picture: A spectrogram as a data URI.
        share: Its length in percent of the longest clip of the card.
        words: The alignment of what was heard.
        heard: What was heard, when there is no alignment.
        notes: Failures, an error, a stop at the limit.
        figures: (name, figure) of the clip.
    """

    label: str
    absent: str = ""
    uri: str | None = None
    link: str | None = None
    seconds: str | None = None
    picture: str | None = None
    share: float = 100.0
    words: Sequence[Word] = ()
    heard: str | None = None
    notes: Sequence[str] = ()
    figures: Sequence[tuple[str, str | None]] = ()


@dataclass(frozen=True, kw_only=True)
class Card:
    """One utterance and seed, heard in both arms.

    Args:
        utt: The utterance's id.
        seed: The seed.
        lang: Its language, or None.
        text: What was to be said.
        sides: Prompt (where there is one), baseline, model.
    """

    utt: str
    seed: int
    lang: str | None
    text: str
    sides: Sequence[Side]


def worst_cards(run: Run) -> list[Card]:
    """Compose the worst regressions, with embedded audio.

    Args:
        run: The evaluation.

    Returns:
        At most 20, the worst first.
    """
    pairs = [tuple(pair) for pair in run.results.get("worst") or []]
    return [_card(run, utt, seed, embed=True) for utt, seed in pairs[:MAX_WORST]]


def sample_cards(run: Run) -> list[Card]:
    """Compose a sample drawn by a seed that the suite fixes, with audio beside the page.

    Args:
        run: The evaluation.

    Returns:
        At most 10, in order of their ids.
    """
    pairs = run.pairs()
    draw = random.Random(sample_seed(run))
    return [_card(run, *pair, embed=False) for pair in sorted(draw.sample(pairs, min(NUM_SAMPLES, len(pairs))))]


def sample_seed(run: Run) -> int:
    """Derive the seed of the sample from the suite, so that nobody chooses it.

    Args:
        run: The evaluation.

    Returns:
        A number below 2 ** 32.
    """
    return int(sha256_text(f"listen {run.suite('name')} {run.suite('sha256')}")[:8], 16)


def _card(run: Run, utt: str, seed: int, embed: bool) -> Card:
    arms = {arm: run.index.get((arm, utt, seed)) for arm in ("baseline", "model")}
    one: Record = arms["model"] or arms["baseline"] or {}
    clips = {arm: read_clip(run.audio(get(record, "audio"))) for arm, record in arms.items()}
    prompt = read_clip(run.audio(one.get("prompt_audio")))
    longest = max([clip.seconds for clip in clips.values() if clip], default=1.0)
    sides = []
    if one.get("prompt_audio") or one.get("prompt_id"):
        sides.append(_side("Prompt", prompt, one.get("prompt_audio"), embed, prompt.seconds if prompt else 1.0))
    for arm, record in arms.items():
        side = _side(run.arm_label(arm), clips[arm], get(record, "audio"), embed, longest)
        known = record or {}
        figures, notes = _figures(known, arm), _notes(known)
        sides.append(replace(side, words=_words(known), heard=_heard(known), notes=notes, figures=figures))
    return Card(utt=utt, seed=seed, lang=one.get("lang"), text=str(one.get("text") or ""), sides=sides)


def _side(label: str, clip: Clip | None, path: Any, embed: bool, longest: float) -> Side:
    if clip is None:
        return Side(label=label, absent="audio not found in this folder" if path else "no audio")
    return Side(
        label=label,
        uri=audio_uri(clip) if embed else None,
        link=quote(str(path)),
        seconds=f"{clip.seconds:.2f} s",
        picture=spectrogram_uri(clip) if embed else None,
        share=round(max(4.0, 100 * clip.seconds / longest), 1),
    )


def _words(record: Record) -> list[Word]:
    glue = "" if get(record, "asr", "unit") == "character" else " "
    chunks = get(record, "asr", "alignment") or []
    return [Word(kind=kind, reference=glue.join(said), heard=glue.join(heard)) for kind, said, heard in chunks]


def _heard(record: Record) -> str | None:
    heard = get(record, "asr", "hypothesis")
    return None if heard is None else str(heard)


def _notes(record: Record) -> list[str]:
    notes = [failure_name(kind) for kind, found in (record.get("failures") or {}).items() if found]
    if record.get("stop_reason") == "limit":
        notes.append("Stopped at the frame limit")
    if record.get("error"):
        notes.append(f"Error: {record['error']}")
    return notes or ([] if record else ["No record"])


def num_errors(record: Record | None) -> int | None:
    """Count the errors of a transcript.

    Args:
        record: A record, or None.

    Returns:
        Substitutions, deletions and insertions; None when it was not transcribed.
    """
    asr = get(record, "asr")
    counts = [finite(get(asr, key)) for key in ("substitutions", "deletions", "insertions")]
    return None if None in counts else int(sum(count or 0 for count in counts))


def _figures(record: Record, arm: str) -> list[tuple[str, str | None]]:
    """Name the figures of a clip; those that its run never measures are left to the tables."""
    unit = "character" if get(record, "asr", "unit") == "character" else "word"
    figures = [
        (f"{unit} errors", fixed(num_errors(record), 0)),
        ("SIM to prompt", fixed(get(record, "sim", "to_prompt"), 3)),
    ]
    if arm == "model":
        figures.append(("SIM to baseline", fixed(get(record, "sim", "to_baseline"), 3)))
        figures.append(("KL of codebook 0, nats", adaptive(get(record, "tokens", "kl_semantic"))))
    return [figures[0], *(pair for pair in figures[1:] if pair[1] is not None)]


def worst_table(run: Run) -> Table:
    """List the worst regressions in a few words.

    Args:
        run: The evaluation.

    Returns:
        A row per utterance and seed.
    """
    rows: list[tuple[Cell, ...]] = []
    for utt, seed in (run.results.get("worst") or [])[:MAX_WORST]:
        both = [run.index.get((arm, utt, seed)) for arm in ("baseline", "model")]
        errors = [fixed(num_errors(record), 0) for record in both]
        voices = [fixed(get(record, "sim", "to_prompt"), 3) for record in both]
        rows.append((str(utt), str(get(both[1], "text") or get(both[0], "text") or ""), str(seed), *errors, *voices))
    head = ("Utterance", "Text", "Seed", "Errors, baseline", "Errors, model", "SIM, baseline", "SIM, model")
    return Table(caption="Worst regressions", head=head, rows=rows, words=2)
