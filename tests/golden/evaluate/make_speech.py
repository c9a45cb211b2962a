"""Write speech-rms.ogg and speech-slt.ogg: two sentences by Debian's flite, so that tests of listeners need no flite.

    python make_speech.py

The voices and what they say stand below; 16 kHz, mono. flite 2.2, whose voices are free to use (CMU's licence).
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import soundfile

TEXTS = {"rms": "the train leaves at noon from the old station", "slt": "please close the door behind you"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for voice, text in TEXTS.items():
            wav = Path(folder) / "speech.wav"
            subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(wav)], check=True)
            samples, rate = soundfile.read(wav)
            soundfile.write(Path(__file__).with_name(f"speech-{voice}.ogg"), samples, rate, "VORBIS", format="OGG")


if __name__ == "__main__":
    main()
