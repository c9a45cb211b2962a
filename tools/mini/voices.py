"""The reference voices of the suites demo-en and mini-en: one recording of each flite voice, and what is said in it.

    python -m mini.voices [--out ../eval/voices] [--flite DIR]       (from tools/)

Each voice says the first sentence of the test split (seed `SEED`) that takes it 3 to 5 s, that no other voice says
and that stands in none of the suites' texts. Written are `<voice>.flac`, mono, 16 kHz, 16 bit, and on the screen the
suite's section `voices`. The same flite gives the same samples; the bytes of a FLAC file depend on libsndfile's version
as well, so a file whose samples are there already is left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Set
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tools")]

import numpy as np
import soundfile
import yaml

from mini import grammar, speech
from mini.speech import SAMPLE_RATE, VOICES, Line
from s2quant.files import atomic_file, sha256_file

ROOT = Path(__file__).resolve().parents[2]
SEED = 3003
LEAST_S, MOST_S = 3.0, 5.0


def choose(folder: Path, taken: Set[str]) -> dict[str, tuple[str, np.ndarray]]:
    """Give for each voice its sentence and the sound of it: int16 [S]."""
    found: dict[str, tuple[str, np.ndarray]] = {}
    for voice in VOICES:
        for text in grammar.sentences(SEED, "test"):
            if text in taken or any(text == said for said, _ in found.values()):
                continue
            sound, _ = speech.speak(Line(text=text, voice=voice, split="test"), folder)
            if LEAST_S <= len(sound) / SAMPLE_RATE <= MOST_S:
                found[voice] = text, np.round(sound * 32767).astype(np.int16)
                break
    return found


def suite_texts(folder: Path) -> set[str]:
    """Read all texts of the suites, without their tags."""
    rows = (json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text("utf-8").splitlines())
    return {grammar.spoken(row["text"]) for row in rows}


def write(out: Path, voices: dict[str, tuple[str, np.ndarray]]) -> dict[str, dict[str, str]]:
    """Write the recordings; gives the suite's section `voices`."""
    out.mkdir(parents=True, exist_ok=True)
    section = {}
    for voice, (text, sound) in voices.items():
        path = out / f"{voice}.flac"
        if not path.is_file() or not np.array_equal(soundfile.read(path, dtype="int16")[0], sound):
            with atomic_file(path, overwrite=True) as partial:
                soundfile.write(partial, sound, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
        section[voice] = {"audio": f"../voices/{path.name}", "text": text, "sha256": sha256_file(path)}
    return section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "voices")
    parser.add_argument("--flite", type=Path, default=speech.LIBRARIES)
    args = parser.parse_args()
    section = write(args.out, choose(args.flite, suite_texts(ROOT / "eval" / "texts")))
    print(yaml.safe_dump({"voices": section}, sort_keys=False, width=1000))


if __name__ == "__main__":
    main()
