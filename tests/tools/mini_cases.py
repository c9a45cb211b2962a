"""Made-up speech in the form in which the training code keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from mini import grammar, speech


def write_parts(folder: Path, count: int = 24, seed: int = 0) -> None:
    """Two parts of tones, one utterance after the other in all voices; validation first."""
    rng = np.random.default_rng(seed)
    for number, split in enumerate(("validation", "train")):
        audio, phones, samples, frames, rows = [], [], [], [], []
        for i, (sentence, _) in enumerate(zip(grammar.sentences(0, split), range(count), strict=False)):
            size = int(rng.integers(3000, 9000))
            tone = 0.2 * np.sin(np.arange(size) * 2 * np.pi * float(rng.uniform(90, 900)) / speech.SAMPLE_RATE)
            audio.append((tone * 32767).astype(np.int16))
            samples.append(size)
            frames.append(speech.num_frames(size))
            phones.append(rng.integers(0, len(speech.PHONES), (frames[-1], speech.SUBFRAMES)).astype(np.uint8))
            voice = speech.VOICES[i % len(speech.VOICES)]
            rows.append({"text": sentence, "sentence": sentence, "voice": voice, "split": split})
        (folder / f"part-{number:03d}.json").write_text(json.dumps(rows))
        np.savez(
            folder / f"part-{number:03d}.npz",
            audio=np.concatenate(audio),
            phones=np.concatenate(phones),
            samples=np.array(samples, np.int32),
            frames=np.array(frames, np.int32),
        )
    (folder / "num_parts").write_text("2")
