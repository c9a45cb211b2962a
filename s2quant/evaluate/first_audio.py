"""Time to first audio with a reference voice: everything anew, the voice's codes kept, its keys and values kept too.

The clock starts before the recording's file is read and stops when the first chunk of sound is on the CPU: what
somebody waits who asks for speech in a voice. The model is loaded, and every state is rehearsed once.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from s2quant.runtime.audio import write_wav
from s2quant.runtime.engine import Engine
from s2quant.runtime.speech import Request

REFERENCE_S = 10.0  # seconds of sound in the recording that is encoded
NOISE_TEXT = "What a voice says for ten seconds is about as long as this sentence, which goes on for a while yet."
STATES = ("anew", "voice kept", "voice and prefix kept")
Voice = tuple[Path, str] | Literal["noise"]
"""A recording and its transcript, or noise of ten seconds: the time does not depend on what is in it."""


def noise(sample_rate: int) -> torch.Tensor:
    """Make the recording of noise.

    Args:
        sample_rate: Rate in Hz.

    Returns:
        float32 [S], the same at every call.
    """
    return 0.1 * torch.randn(int(REFERENCE_S * sample_rate), generator=torch.Generator().manual_seed(0))


def wait_for(device: torch.device) -> None:
    """Wait until a device has nothing left to do.

    Args:
        device: The device; a CPU never has.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_audio(engine: Engine, request: Request) -> float:
    """Speak until the first sound is there, on the CPU.

    Args:
        engine: The engine.
        request: What to speak.

    Returns:
        The seconds that it took.
    """
    wait_for(engine.device)
    began = time.perf_counter()
    next(chunk for chunk, _ in engine.stream_request(request) if len(chunk))
    return time.perf_counter() - began


def measure_first_audio(
    engines: Mapping[str, tuple[Engine, Path]],
    request: Request,
    voice: Voice,
    repeats: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Time the first sound of one stream alone, in every state; the arms take turns.

    Args:
        engines: Name of the arm -> its engine and its checkpoint folder. Prefixes that they keep are given up.
        request: What to speak, without voices.
        voice: The voice.
        repeats: Timed rounds.
        progress: Told the phase, the rounds done and their total.

    Returns:
        One row per arm and state: arm, state, first_audio_s, voice_s (the share of reading, encoding or looking up
        the recording), num_voice_frames, samples (first_audio_s of every round). Times are medians.

    Raises:
        UserError: The recording cannot be used, or does not fit with the text.
    """
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {
        (arm, state): [] for arm in engines for state in STATES
    }
    frames: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(1 + repeats):
            for arm, (engine, folder) in engines.items() if turn % 2 else reversed(list(engines.items())):
                progress(f"{arm}, first audio", turn, 1 + repeats)
                recording = _recording(voice, engine, Path(scratch))
                for state in STATES:
                    took = _once(engine, folder, request, recording, state, Path(scratch) / "cache")
                    frames[arm] = took[2]
                    if turn:
                        samples[arm, state].append(took[:2])
    return [
        {
            "arm": arm,
            "state": state,
            "first_audio_s": statistics.median(whole for whole, _ in taken),
            "voice_s": statistics.median(part for _, part in taken),
            "num_voice_frames": frames[arm],
            "samples": [whole for whole, _ in taken],
        }
        for (arm, state), taken in samples.items()
    ]


def _recording(voice: Voice, engine: Engine, scratch: Path) -> tuple[Path, str]:
    if voice != "noise":
        return voice
    assert engine.codec is not None
    path = scratch / f"noise-{engine.codec.sample_rate}.wav"
    if not path.exists():
        write_wav(path, noise(engine.codec.sample_rate), engine.codec.sample_rate)
    return path, NOISE_TEXT


def _once(
    engine: Engine, folder: Path, request: Request, recording: tuple[Path, str], state: str, cache: Path
) -> tuple[float, float, int]:
    """Time one first sound: seconds in all, seconds of the voice alone, frames of the voice."""
    before = engine.voices
    if state != STATES[2]:
        engine.prefixes.clear()
    try:
        engine.keep_voices(None if state == STATES[0] else cache, folder)
        if state != STATES[0]:
            engine.voice(*recording)  # there from now on
        wait_for(engine.device)
        began = time.perf_counter()
        spoken = engine.voice(*recording)
        voice_s = time.perf_counter() - began
        first_s = first_audio(engine, dataclasses.replace(request, voices=(spoken,)))
    finally:
        engine.voices = before
    return voice_s + first_s, voice_s, spoken.codes.shape[1]
