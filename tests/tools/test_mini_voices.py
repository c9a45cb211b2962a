"""The recordings in eval/voices are what the script makes, and a file whose samples are right is not written again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from mini import speech, voices

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (speech.LIBRARIES / "libflite.so.1").exists(), reason="needs Debian's flite")
def test_the_recordings_are_those_of_the_script() -> None:
    suite = yaml.safe_load((ROOT / "eval/suites/demo-en.yaml").read_text("utf-8"))
    found = voices.choose(speech.LIBRARIES, voices.suite_texts(ROOT / "eval/texts"))
    assert {name: text for name, (text, _) in found.items()} == {
        name: row["text"] for name, row in suite["voices"].items()
    }
    for name, (_, sound) in found.items():
        there, rate = soundfile.read(ROOT / "eval/voices" / f"{name}.flac", dtype="int16")
        assert rate == speech.SAMPLE_RATE and np.array_equal(there, sound), name


def test_sentences_are_new_long_enough_and_different(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def speak(line: speech.Line, folder: Path) -> tuple[np.ndarray, list]:
        return np.full(speech.SAMPLE_RATE * len(line.text) // 16, 0.1, np.float32), []

    monkeypatch.setattr(voices.speech, "speak", speak)
    first = voices.choose(tmp_path, set())
    assert list(first) == list(speech.VOICES) and len({text for text, _ in first.values()}) == 4
    assert all(3 <= len(sound) / speech.SAMPLE_RATE <= 5 for _, sound in first.values())
    taken = {text for text, _ in first.values()}
    assert not taken & {text for text, _ in voices.choose(tmp_path, taken).values()}
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "text": "[slow] One  two."}) + "\n")
    assert voices.suite_texts(tmp_path) == {"One two."}
    section = voices.write(tmp_path / "out", first)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(times) == 4 and voices.write(tmp_path / "out", first) == section
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    loud = first | {"rms": (first["rms"][0], first["rms"][1] * 2)}
    assert voices.write(tmp_path / "out", loud)["rms"]["sha256"] != section["rms"]["sha256"]
