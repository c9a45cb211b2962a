"""Listen to s2-mini: word errors by two recognizers, ends, voices told apart, tags obeyed; raw speech beside it.

    python tools/mini/judge.py --model models/s2-mini --asr-model models/whisper-mini/whisper-mini.pt --out DIR
        [--split test] [--limit 200] [--seeds 0,1,2] [--slots 8] [--pocketsphinx] [--resemblyzer] [--device cpu]

Every clip is a held-out sentence spoken in the voice of a reference (another held-out sentence by the same voice). The
same sentence spoken by flite itself, and that after the codec, are judged beside it: what they miss is not the
model's fault. whisper-mini knows only the words of the grammar and guesses legal sentences from damaged sound;
pocketsphinx has its own general acoustic model, and here an n-gram model over the grammar's words.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tools")]

import soundfile
import soxr
import torch

from mini import grammar, recognizer, speech
from mini.common import CODEC_RATE, word_errors
from mini.speech import SAMPLE_RATE, VOICES, Line
from s2quant import load_engine
from s2quant.prompt import Voice
from s2quant.runtime.speech import Request

TAG_SENTENCES = 6
BATCH = 64  # clips read at a time


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to judge, and how."""

    model: Path
    asr_model: Path
    out: Path
    flite: Path = speech.LIBRARIES
    device: str = "cpu"
    dtype: str = "bfloat16"
    split: grammar.Split = "test"
    limit: int = 200
    seeds: tuple[int, ...] = (0,)
    max_frames: int = 400
    num_slots: int = 8
    keep: int = 20
    pocketsphinx: bool = False
    resemblyzer: bool = False


@dataclass(kw_only=True)
class Clip:
    """One thing that was said."""

    kind: str  # "raw", "codec", "model", "tag:NAME", "tag:none"
    text: str
    voice: str
    audio: np.ndarray  # float32 at 16 kHz
    seed: int | None = None
    ended: bool | None = None
    heard: str = ""
    heard_pocketsphinx: str = ""
    similarity: dict[str, float] | None = None

    def row(self) -> dict[str, Any]:
        """For records.jsonl."""
        words = grammar.words_of(self.text)
        return {
            "kind": self.kind, "text": self.text, "voice": self.voice, "seed": self.seed, "ended": self.ended,
            "seconds": round(len(self.audio) / SAMPLE_RATE, 3), "heard": self.heard, "num_words": len(words),
            "errors": word_errors(words, grammar.words_of(self.heard)),
            "heard_pocketsphinx": self.heard_pocketsphinx,
            "errors_pocketsphinx": word_errors(words, grammar.words_of(self.heard_pocketsphinx)),
            "similarity": self.similarity,
        }  # fmt: skip


class Judge:
    """The model, what it is to say, and the references."""

    def __init__(self, options: Options) -> None:
        self.options = options
        dtype = getattr(torch, options.dtype)
        self.engine = load_engine(options.model, options.device, dtype, num_slots=options.num_slots)
        assert self.engine.codec is not None
        self.codec = self.engine.codec
        texts = grammar.sentences(1001, options.split)
        self.lines = [(text, VOICES[i % len(VOICES)]) for i, text in enumerate(itertools.islice(texts, options.limit))]
        others = list(itertools.islice(grammar.sentences(2002, options.split), 8 * len(VOICES)))
        self.references: dict[str, list[tuple[str, np.ndarray]]] = defaultdict(list)
        for i, text in enumerate(others):
            voice = VOICES[i % len(VOICES)]
            self.references[voice].append(
                (text, speech.speak(Line(text=text, voice=voice, split=""), options.flite)[0])
            )
        self.codes = {
            voice: [Voice(text=text, codes=self.encode(audio)) for text, audio in pairs[:4]]
            for voice, pairs in self.references.items()
        }

    def encode(self, audio: np.ndarray) -> torch.Tensor:
        """16 kHz sound -> codes int64 [N, F]."""
        wav = torch.from_numpy(soxr.resample(audio, SAMPLE_RATE, CODEC_RATE)).float()
        return self.codec.encode(wav[None, None].to(self.codec.device))[0].cpu()

    def decode(self, codes: torch.Tensor) -> np.ndarray:
        """Codes [N, F] -> sound at 16 kHz, with the time it takes left to the caller."""
        return soxr.resample(self.engine.decode(codes).numpy(), CODEC_RATE, SAMPLE_RATE).astype(np.float32)

    def baselines(self) -> list[Clip]:
        """The same sentences by flite itself, and those through the codec."""
        clips = []
        for text, voice in self.lines:
            audio = speech.speak(Line(text=text, voice=voice, split=""), self.options.flite)[0]
            clips.append(Clip(kind="raw", text=text, voice=voice, audio=audio))
            clips.append(Clip(kind="codec", text=text, voice=voice, audio=self.decode(self.encode(audio))))
        return clips

    def say(self, items: Sequence[tuple[str, str, str]], seed: int) -> tuple[list[Clip], float]:
        """Speak (kind, text, voice) with references; gives the clips and the seconds that it took."""
        started = time.perf_counter()
        requests = [
            Request(
                text=text,
                voices=(self.codes[voice][i % len(self.codes[voice])],) if voice != "default" else (),
                seed=seed * 100003 + i,
                max_frames=self.options.max_frames,
            )
            for i, (_, text, voice) in enumerate(items)
        ]
        clips: dict[int, Clip] = {}
        for spoken in self.engine.generate(requests):
            kind, text, voice = items[spoken.index]
            audio = self.decode(spoken.codes) if spoken.codes.shape[1] else np.zeros(160, np.float32)
            ended = spoken.stop_reason == "end"
            clips[spoken.index] = Clip(kind=kind, text=text, voice=voice, audio=audio, seed=seed, ended=ended)
        return [clips[i] for i in range(len(items))], time.perf_counter() - started

    def tag_items(self) -> list[tuple[str, str, str]]:
        """The same sentences without a tag and with each of them, in every voice."""
        sentences = list(itertools.islice(grammar.sentences(3003, self.options.split), TAG_SENTENCES))
        items = []
        for sentence, voice in itertools.product(sentences, VOICES):
            items.append(("tag:none", sentence, voice))
            for tag in grammar.TAGS:
                words = sentence.split()
                words.insert(len(words) // 2 if tag == "pause" else 0, f"[{tag}]")
                items.append((f"tag:{tag}", " ".join(words), voice))
        return items


def transcribe(clips: list[Clip], path: Path, device: str) -> None:
    """Read all clips by whisper-mini."""
    import whisper

    model = whisper.load_model(str(path), device=device)
    size = recognizer.MAX_SECONDS * SAMPLE_RATE
    for first in range(0, len(clips), BATCH):
        batch = clips[first : first + BATCH]
        wav = torch.zeros(len(batch), size)
        for row, clip in zip(wav, batch, strict=True):
            row[: len(clip.audio)] = torch.from_numpy(clip.audio[:size])
        for clip, text in zip(batch, recognizer.transcribe(model, wav.to(device)), strict=True):
            clip.heard = text.strip()


def write_language_model(path: Path) -> None:
    """Write an n-gram model of the grammar's sentences, in ARPA format."""
    from pocketsphinx.lm import ArpaBoLM

    texts = itertools.islice(grammar.sentences(7, "train"), 20000)
    corpus = "\n".join(" ".join(grammar.words_of(text)) for text in texts)
    model = ArpaBoLM(sentfile=io.StringIO(corpus), add_start=True)
    model.compute()
    model.write_file(str(path))


def transcribe_pocketsphinx(clips: list[Clip], out: Path) -> None:
    """Read all clips by pocketsphinx, a fresh decoder for every kind and voice (it carries state along)."""
    from pocketsphinx import Decoder

    path = out / "grammar.arpa"
    write_language_model(path)
    order = sorted(clips, key=lambda clip: (clip.kind, clip.voice))
    silence = np.zeros(SAMPLE_RATE // 5, np.int16)
    for _, group in itertools.groupby(order, key=lambda clip: (clip.kind, clip.voice)):
        decoder = Decoder(lm=str(path), loglevel="FATAL")
        for clip in group:
            sound = np.concatenate([silence, (clip.audio.clip(-1, 1) * 32767).astype(np.int16), silence])
            decoder.start_utt()
            decoder.process_raw(sound.tobytes(), full_utt=True)
            decoder.end_utt()
            hypothesis = decoder.hyp()
            clip.heard_pocketsphinx = hypothesis.hypstr if hypothesis else ""


def compare_voices(clips: list[Clip], references: dict[str, list[tuple[str, np.ndarray]]]) -> None:
    """Cosine between each clip and the mean of four recordings of each voice that were not its references."""
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder("cpu", verbose=False)

    def embed(audio: np.ndarray) -> np.ndarray:
        wav = preprocess_wav(audio, source_sr=SAMPLE_RATE)
        return encoder.embed_utterance(wav if len(wav) > 1600 else audio)

    centres = {voice: np.mean([embed(audio) for _, audio in pairs[4:]], axis=0) for voice, pairs in references.items()}
    for clip in clips:
        found = embed(clip.audio)
        clip.similarity = {
            voice: float(found @ centre / np.linalg.norm(found) / np.linalg.norm(centre))
            for voice, centre in centres.items()
        }


def pitch_hz(audio: np.ndarray) -> float:
    """Median of the voiced frames' pitch, by autocorrelation."""
    size, found = int(0.05 * SAMPLE_RATE), []
    for start in range(0, len(audio) - size, size // 2):
        frame = audio[start : start + size] - audio[start : start + size].mean()
        energy = float(frame @ frame)
        if energy / size < 0.02**2:
            continue
        lags = np.correlate(frame, frame, "full")[size - 1 :] / energy
        low, high = SAMPLE_RATE // 350, SAMPLE_RATE // 60
        lag = low + int(lags[low:high].argmax())
        if lags[lag] > 0.5:
            found.append(SAMPLE_RATE / lag)
    return float(np.median(found)) if found else float("nan")


def longest_silence_s(audio: np.ndarray) -> float:
    """Longest stretch between the first and the last sound in which nothing is heard."""
    size = SAMPLE_RATE // 100
    level = np.sqrt(np.mean(audio[: len(audio) // size * size].reshape(-1, size) ** 2, axis=1)) > 0.01
    loud = np.nonzero(level)[0]
    return float(np.diff(loud).max() - 1) / 100 if len(loud) > 1 else 0.0


def tag_effects(clips: list[Clip]) -> dict[str, float]:
    """What a tag does to the same sentence in the same voice, as the median over sentences."""
    plain = {(grammar.spoken(c.text), c.voice): c for c in clips if c.kind == "tag:none"}
    found: dict[str, list[float]] = defaultdict(list)
    for clip in clips:
        base = plain.get((grammar.spoken(clip.text), clip.voice))
        if base is None or clip is base:
            continue
        tag = clip.kind.removeprefix("tag:")
        found[f"{tag}_duration_ratio"].append(len(clip.audio) / len(base.audio))
        if tag in ("high", "low"):
            found[f"{tag}_pitch_ratio"].append(pitch_hz(clip.audio) / pitch_hz(base.audio))
        if tag == "pause":
            found["pause_longest_silence_s"].append(longest_silence_s(clip.audio))
            found["none_longest_silence_s"].append(longest_silence_s(base.audio))
    return {name: round(float(np.nanmedian(values)), 3) for name, values in sorted(found.items())}


def summary(clips: list[Clip]) -> dict[str, Any]:
    """WER by kind and voice, ends, and voices told apart."""
    rows = [clip.row() for clip in clips]
    result: dict[str, Any] = {}
    for kind in ("raw", "codec", "model"):
        chosen = [row for row in rows if row["kind"] == kind]
        words = max(1, sum(row["num_words"] for row in chosen))
        result[f"{kind}_wer"] = round(sum(row["errors"] for row in chosen) / words, 4)
        if any(row["heard_pocketsphinx"] for row in chosen):
            result[f"{kind}_wer_pocketsphinx"] = round(sum(row["errors_pocketsphinx"] for row in chosen) / words, 4)
        for voice in VOICES:
            of_voice = [row for row in chosen if row["voice"] == voice]
            number = max(1, sum(row["num_words"] for row in of_voice))
            result[f"{kind}_wer_{voice}"] = round(sum(row["errors"] for row in of_voice) / number, 4)
        scored = [row for row in chosen if row["similarity"]]
        if scored:
            own = [max(row["similarity"], key=row["similarity"].get) == row["voice"] for row in scored]
            result[f"{kind}_own_voice_first"] = round(float(np.mean(own)), 4)
            result[f"{kind}_own_similarity"] = round(
                float(np.mean([row["similarity"][row["voice"]] for row in scored])), 4
            )
    spoken = [row for row in rows if row["kind"] == "model"]
    result["clips"] = len(spoken)
    result["ended"] = round(sum(bool(row["ended"]) for row in spoken) / max(1, len(spoken)), 4)
    return result


def run(options: Options) -> dict[str, Any]:
    """Speak and judge; writes records.jsonl, results.json and some clips drawn at random."""
    options.out.mkdir(parents=True, exist_ok=True)
    judge = Judge(options)
    clips, seconds, audio_s = judge.baselines(), 0.0, 0.0
    for seed in options.seeds:
        spoken, took = judge.say([("model", text, voice) for text, voice in judge.lines], seed)
        clips += spoken
        seconds, audio_s = seconds + took, audio_s + sum(len(c.audio) for c in spoken) / SAMPLE_RATE
    tagged, _ = judge.say(judge.tag_items(), options.seeds[0])
    plain, _ = judge.say([("default", text, "default") for text, _ in judge.lines[:12]], options.seeds[0])
    clips += tagged + plain
    transcribe(clips, options.asr_model, options.device)
    if options.pocketsphinx:
        transcribe_pocketsphinx(clips, options.out)
    if options.resemblyzer:
        compare_voices(clips, judge.references)
    result = summary(clips) | {"tags": tag_effects(tagged), "rtf": round(seconds / max(audio_s, 1e-9), 3)}
    result["default_errors"] = sum(c.row()["errors"] for c in plain)
    if options.resemblyzer:
        assert all(c.similarity for c in plain)
        first = [max(c.similarity, key=c.similarity.get) for c in plain if c.similarity]
        result["default_voice_heard"] = first.count(speech.DEFAULT_VOICE) / max(1, len(first))
    with (options.out / "records.jsonl").open("w") as file:
        file.writelines(json.dumps(clip.row()) + "\n" for clip in clips)
    (options.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    listened = [c for c in clips if c.kind in ("model", "default") or c.kind.startswith("tag")]
    for number, clip in enumerate(random.Random(0).sample(listened, min(options.keep, len(listened)))):
        name = re.sub(r"[^a-z0-9]+", "-", f"{clip.kind} {clip.voice} {clip.text}".lower()).strip("-")[:70]
        soundfile.write(options.out / f"{number:02d}-{name}.flac", clip.audio, SAMPLE_RATE)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--asr-model", type=Path, required=True, help="the recognizer")
    parser.add_argument("--flite", type=Path, default=speech.LIBRARIES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--limit", type=int, default=200, help="the first N sentences, each spoken with every seed")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--max-frames", type=int, default=400)
    parser.add_argument("--slots", dest="num_slots", type=int, default=8, help="clips in progress at a time")
    parser.add_argument("--keep", type=int, default=20)
    parser.add_argument("--pocketsphinx", action="store_true")
    parser.add_argument("--resemblyzer", action="store_true")
    values = vars(parser.parse_args())
    values["seeds"] = tuple(int(seed) for seed in values["seeds"].split(","))
    print(json.dumps(run(Options(**values)), indent=2))


if __name__ == "__main__":
    main()
