"""Audio files in and out: soundfile reads, soxr resamples, the standard library writes.

Legend: S samples. Audio inside s2quant is mono float32 at the codec's rate.
"""

from __future__ import annotations

import wave
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from torch import Tensor

from s2quant.errors import UserError
from s2quant.files import atomic_file

SILENCE_DBFS = -60.0
MIN_SECONDS = 0.5
MAX_SECONDS = 120.0


def read_reference(path: Path, sample_rate: int) -> Tensor:
    """Read a reference recording: any format of libsndfile, any rate, mixed down to mono.

    Args:
        path: The file.
        sample_rate: Wanted rate in Hz.

    Returns:
        float32 [S] at that rate; no loudness step.

    Raises:
        UserError: The file is unreadable, too short or long, silent, or holds NaN.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate, longest = file.samplerate, int(MAX_SECONDS * file.samplerate)
            samples = file.read(longest + 1, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path}: {error}", "an audio file (wav, flac, ogg, mp3)", "check the reference") from error
    todo = "use 10 to 30 s of clean speech"
    wanted = f"{MIN_SECONDS:g} to {MAX_SECONDS:g} s"
    if len(samples) > longest:
        raise UserError(f"{path}: more than {MAX_SECONDS:g} s of audio", wanted, todo)
    if len(samples) < MIN_SECONDS * rate:
        raise UserError(f"{path}: {len(samples) / rate:.2f} s of audio", wanted, todo)
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: samples that are NaN or infinite", "finite samples", todo)
    mono: npt.NDArray[np.float32] = samples.mean(axis=1)
    level = 20 * np.log10(max(float(np.sqrt(np.mean(np.square(mono, dtype=np.float64)))), 1e-12))
    if level < SILENCE_DBFS:
        raise UserError(f"{path}: silence ({level:.0f} dBFS)", f"speech above {SILENCE_DBFS:g} dBFS", todo)
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(mono))


def write_wav(path: Path, audio: Tensor, sample_rate: int, overwrite: bool = False) -> None:
    """Write mono 16-bit PCM; the file appears when it is complete.

    Args:
        path: The file.
        audio: float32 [S], clipped to [-1, 1].
        sample_rate: Rate in Hz.
        overwrite: Whether to replace an existing file.

    Raises:
        UserError: The file exists, or the disk refuses.
    """
    with atomic_file(path, overwrite) as partial:
        write_chunks(partial, [audio], sample_rate)


def write_chunks(path: Path, chunks: Iterable[Tensor], sample_rate: int) -> None:
    """Write mono 16-bit PCM chunk by chunk; the header is right after every chunk.

    Args:
        path: The file, overwritten; a caller who wants all or nothing names a temporary one.
        chunks: float32 [S] each, clipped to [-1, 1].
        sample_rate: Rate in Hz.

    Raises:
        OSError: The disk refuses.
    """
    with path.open("wb") as file, wave.open(file, "wb") as sound:  # wave closes no file that it has not opened
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(sample_rate)
        for chunk in chunks:
            sound.writeframes(pcm_bytes(chunk))
            file.flush()


def pcm16(audio: Tensor) -> npt.NDArray[np.int16]:
    """Round to 16-bit samples.

    Args:
        audio: float32 [S], clipped to [-1, 1].

    Returns:
        int16 [S].
    """
    return (audio.clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy()


def pcm_bytes(audio: Tensor) -> bytes:
    """Write samples as raw PCM: 16-bit, little-endian.

    Args:
        audio: float32 [S], clipped to [-1, 1].

    Returns:
        2 S bytes.
    """
    return pcm16(audio).astype("<i2").tobytes()
