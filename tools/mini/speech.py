"""Speech for training: flite's voices as a library, with tags obeyed, phonemes with their times, many processes.

Legend: S samples at 16 kHz, F frames of the codec (2048 samples at 44.1 kHz).

    python -m mini.speech --out DIR --count 48000       (from tools/)

A part is `part-NNN.npz` (audio int16, samples and frames per utterance, phones uint8 [F, 4]) and `part-NNN.json` (one
object per utterance: text, sentence, voice, split). The npz is written last and renamed, so a part that is there is
whole. Random state is each utterance's own: the same arguments give the same speech in any number of processes.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import math
import multiprocessing
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soxr

from mini import grammar

SAMPLE_RATE = 16000
FRAME_S = 2048 / 44100
VOICES = ("rms", "slt", "awb", "kal16")
DEFAULT_VOICE = "rms"  # heard when a prompt names no voice
# The other voices follow flite's own pitch feature; rms does not, and is resampled (its timbre moves too).
RESAMPLED = ("rms",)
_PHONES = """
pau aa ae ah ao aw ax axr ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw
v w y z zh
"""
PHONES = tuple(_PHONES.split())
SUBFRAMES = 4  # phone labels per frame
RATE = {"fast": 0.75, "slow": 1.35}  # durations are multiplied
PITCH = {"high": 1.2, "low": 1 / 1.2}
PAUSE_S = 0.45
LEAD_S, TAIL_S = 0.06, 0.14  # silence kept around the words
LEVEL = 0.09  # root mean square of every utterance, before its own small change
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")


class _Wave(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    ]


class _Voice(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


class Flite:
    """The synthesizer, loaded from a folder of shared libraries (no sound device is opened)."""

    def __init__(self, folder: Path = LIBRARIES) -> None:
        def load(name: str) -> ctypes.CDLL:
            return ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)

        load("libasound.so.2")
        self.lib = load("libflite.so.1")
        self.libc = ctypes.CDLL(None)  # its rand() gives the signs of the vocoder's noise
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float
        for name, result, arguments in (
            ("flite_init", ctypes.c_int, []),
            ("flite_synth_text", pointer, [text, pointer]),
            ("utt_wave", ctypes.POINTER(_Wave), [pointer]),
            ("utt_relation", pointer, [pointer, text]),
            ("relation_head", pointer, [pointer]),
            ("item_next", pointer, [pointer]),
            ("item_feat_string", text, [pointer, text]),
            ("item_feat_float", number, [pointer, text]),
            ("delete_utterance", None, [pointer]),
            ("flite_feat_set_float", None, [pointer, text, number]),
            ("flite_get_param_float", number, [pointer, text, number]),
        ):
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.lib.flite_init()
        load("libflite_usenglish.so.1")
        load("libflite_cmulex.so.1")
        self.voices, self.stretch = {}, {}
        for name in VOICES:
            register = getattr(load(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
            register.restype, register.argtypes = ctypes.POINTER(_Voice), [pointer]
            voice = register(None)
            self.voices[name] = voice
            self.stretch[name] = self.lib.flite_get_param_float(voice.contents.features, b"duration_stretch", 1.0)

    def speak(self, text: str, voice: str, rate: float = 1.0, pitch: float = 1.0) -> tuple[np.ndarray, list]:
        """Speak one piece of text.

        Returns float32 [S] in -1 ... 1, and the phonemes as (name, end in seconds).
        """
        resampled = voice in RESAMPLED
        features = self.voices[voice].contents.features
        stretch = self.stretch[voice] * rate * (pitch if resampled else 1.0)
        self.lib.flite_feat_set_float(features, b"duration_stretch", stretch)
        self.lib.flite_feat_set_float(features, b"f0_shift", 1.0 if resampled else pitch)
        self.libc.srand(1)  # the same speech whatever was said before
        utterance = self.lib.flite_synth_text(text.encode("ascii"), self.voices[voice])
        wave = self.lib.utt_wave(utterance).contents
        assert wave.sample_rate == SAMPLE_RATE and wave.num_channels == 1, (voice, wave.sample_rate)
        audio = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).astype(np.float32) / 32768
        phones = []
        item = self.lib.relation_head(self.lib.utt_relation(utterance, b"Segment"))
        while item:
            name = self.lib.item_feat_string(item, b"name").decode()
            phones.append((name, self.lib.item_feat_float(item, b"end")))
            item = self.lib.item_next(item)
        self.lib.delete_utterance(utterance)
        if resampled and pitch != 1.0:
            audio = soxr.resample(audio, SAMPLE_RATE * pitch, SAMPLE_RATE)
        scale = len(audio) / SAMPLE_RATE / phones[-1][1]  # kal's times are a little off its sound
        return audio, [(name, end * scale) for name, end in phones]


@functools.cache
def flite(folder: Path = LIBRARIES) -> Flite:
    """The process's synthesizer."""
    return Flite(folder)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One utterance to be spoken: `text` with its tags, and the small changes that make utterances differ."""

    text: str
    voice: str
    split: str
    rate: float = 1.0
    pitch: float = 1.0
    gain: float = 1.0


def lines(seed: int, split: grammar.Split, count: int, tagged: float = 0.25, changed: float = 0.3) -> Iterator[Line]:
    """Give utterances of distinct sentences; the default voice comes more often than the others.

    A share of `changed` of them is a little faster, higher or louder than the voice is.
    """
    rng = random.Random(f"lines {seed} {split}")
    for _, sentence in zip(range(count), grammar.sentences(seed, split), strict=False):
        voice = rng.choices(VOICES, [4, 3, 3, 3])[0]
        text = grammar.with_tags(sentence, rng) if rng.random() < tagged else sentence
        size = 1.0 if rng.random() < changed else 0.0
        yield Line(
            text=text,
            voice=voice,
            split=split,
            rate=math.exp(size * max(-0.1, min(0.1, rng.gauss(0, 0.04)))),
            pitch=math.exp(size * max(-0.08, min(0.08, rng.gauss(0, 0.03)))),
            gain=math.exp(size * rng.uniform(-0.15, 0.15)),
        )


def speak(line: Line, folder: Path = LIBRARIES) -> tuple[np.ndarray, list]:
    """Speak a line, obeying its tags: float32 [S], and phonemes with their ends in seconds."""
    tags = re.findall(r"\[(\w+)\]", line.text)
    rate, pitch = line.rate, line.pitch
    for tag in tags:
        rate, pitch = rate * RATE.get(tag, 1.0), pitch * PITCH.get(tag, 1.0)
    audio, phones = np.zeros(0, np.float32), []
    for piece in line.text.split("[pause]"):
        start = len(audio) / SAMPLE_RATE
        if phones:
            start += PAUSE_S
            audio = np.concatenate([audio, np.zeros(round(PAUSE_S * SAMPLE_RATE), np.float32)])
            phones.append(("pau", start))
        sound, times = _trimmed(*flite(folder).speak(grammar.spoken(piece), line.voice, rate, pitch))
        audio = np.concatenate([audio, sound])
        phones += [(name, start + end) for name, end in times]
    audio *= LEVEL * line.gain / np.sqrt(np.mean(audio**2))
    return np.clip(audio, -0.98, 0.98), phones


def _trimmed(audio: np.ndarray, phones: list) -> tuple[np.ndarray, list]:
    """Cut the silence at both ends short."""
    lead = max(0.0, phones[0][1] - LEAD_S) if phones[0][0] == "pau" else 0.0
    tail = phones[-2][1] + TAIL_S if phones[-1][0] == "pau" else phones[-1][1]
    end = min(len(audio), round(tail * SAMPLE_RATE))
    cut = audio[round(lead * SAMPLE_RATE) : end]
    return cut, [(name, max(0.0, min(time, end / SAMPLE_RATE) - lead)) for name, time in phones]


def phone_labels(phones: list, num_frames: int) -> np.ndarray:
    """Label every quarter of every frame: uint8 [F, 4], indices of PHONES."""
    middle = (np.arange(num_frames * SUBFRAMES) + 0.5) * FRAME_S / SUBFRAMES
    ends = np.array([end for _, end in phones])
    names = np.array([PHONES.index(name) for name, _ in phones] + [0], np.uint8)
    return names[np.searchsorted(ends, middle, side="right")].reshape(num_frames, SUBFRAMES)


def num_frames(num_samples: int) -> int:
    """Frames of the codec that so many samples at 16 kHz fill."""
    return math.ceil(num_samples * 44100 / SAMPLE_RATE / 2048 - 1e-9)


def write_part(job: tuple[Path, int, list[Line], Path]) -> int:
    """Speak the lines of one part and write its files; gives the number of frames."""
    out, number, part, folder = job
    audio, phones, samples, frames = [], [], [], []
    for line in part:
        sound, times = speak(line, folder)
        audio.append(np.round(sound * 32767).astype(np.int16))
        samples.append(len(sound))
        frames.append(num_frames(len(sound)))
        phones.append(phone_labels(times, frames[-1]))
    rows = [asdict(line) | {"sentence": grammar.spoken(line.text)} for line in part]
    (out / f"part-{number:03d}.json").write_text(json.dumps(rows))
    partial = out / f"part-{number:03d}.tmp.npz"
    np.savez(
        partial,
        audio=np.concatenate(audio),
        phones=np.concatenate(phones),
        samples=np.array(samples, np.int32),
        frames=np.array(frames, np.int32),
    )
    partial.rename(out / f"part-{number:03d}.npz")
    return sum(frames)


def generate(out: Path, count: int, held_out: int, seed: int, folder: Path, processes: int, part_size: int) -> int:
    """Speak everything: part 0 is the validation split, the others are for training."""
    out.mkdir(parents=True, exist_ok=True)
    train = list(lines(seed, "train", count))
    parts = [list(lines(seed, "validation", held_out))]
    parts += [train[start : start + part_size] for start in range(0, count, part_size)]
    (out / "num_parts").write_text(str(len(parts)))
    jobs = [(out, number, part, folder) for number, part in enumerate(parts)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return sum(pool.imap_unordered(write_part, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=48000)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flite", type=Path, default=LIBRARIES)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--part-size", type=int, default=500)
    args = parser.parse_args()
    frames = generate(args.out, args.count, args.held_out, args.seed, args.flite, args.processes, args.part_size)
    print(f"{frames} frames, {frames * FRAME_S / 3600:.2f} hours")


if __name__ == "__main__":
    main()
