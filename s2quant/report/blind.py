"""A blind listening test: pairs in shuffled order, half of them with the model first, the key in a file of its own.

The audio is embedded without loss, so that neither names nor order nor an encoder tell the arms apart. The order is
drawn from the records themselves: rebuilding a report keeps it, and the page holds nothing to derive it from.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from s2quant.files import sha256_file, sha256_text
from s2quant.report.load import Run
from s2quant.report.sound import audio_uri, read_clip

MAX_PAIRS = 20
BLIND_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two clips of the same text.

    Args:
        name: What answers call it: "01", "02", ...
        text: What is said.
        lang: Its language, or None.
        clips: Data URIs of A and B.
    """

    name: str
    text: str
    lang: str | None
    clips: tuple[str, str]


def blind_test(run: Run) -> tuple[str, list[Pair], dict[str, Any]]:
    """Draw the pairs of a blind test.

    Args:
        run: The evaluation.

    Returns:
        The test's id, its pairs in the order of the page, and the key to be kept apart.
    """
    draw = random.Random(f"blind {sha256_file(run.folder / 'records.jsonl')}")
    found = run.pairs()
    drawn = draw.sample(found, min(MAX_PAIRS, len(found)))
    model_first = [place % 2 == 0 for place in range(len(drawn))]
    draw.shuffle(model_first)
    pairs, key = [], []
    for place, ((utt, seed), first) in enumerate(zip(drawn, model_first, strict=True), start=1):
        arms = ("model", "baseline") if first else ("baseline", "model")
        clips = [read_clip(run.audio(run.index[arm, utt, seed].get("audio"))) for arm in arms]
        if clips[0] is None or clips[1] is None:
            continue
        record = run.index["model", utt, seed]
        name = f"{place:02d}"
        sound = (audio_uri(clips[0], "FLAC"), audio_uri(clips[1], "FLAC"))
        pairs.append(Pair(name=name, text=str(record.get("text") or ""), lang=record.get("lang"), clips=sound))
        key.append({"pair": name, "utt": utt, "seed": seed, "a": arms[0], "b": arms[1]})
    test = sha256_text(repr(key))[:12]
    return test, pairs, {"blind_version": BLIND_VERSION, "test": test, "pairs": key}
