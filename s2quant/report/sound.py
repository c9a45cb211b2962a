"""Audio and spectrograms as data URIs, so that a page needs no other file.

MP3 for the report (small, plays in every browser), FLAC where small differences are to be heard. soundfile writes
both by itself. Spectrograms are indexed PNG files of a few kB, written with zlib.

Shapes: S samples, C channels, X columns (time), Y rows (mel bands, lowest first).
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile

Floats = np.ndarray[Any, np.dtype[np.float32]]
MP3_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
MIME = {"MP3": "audio/mpeg", "FLAC": "audio/flac"}
WINDOW, BANDS, MAX_COLUMNS, FLOOR_DB = 1024, 64, 480, -80.0
# Stops of a dark-to-light map that keeps its order in greyscale.
COLORS = ((13, 8, 45), (52, 28, 110), (110, 36, 124), (168, 52, 112), (222, 84, 82), (247, 144, 58), (253, 231, 140))


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Decoded audio.

    Args:
        samples: float32 [S, C], C at most 2.
        rate_hz: Sampling rate.
    """

    samples: Floats
    rate_hz: int

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.rate_hz


def read_clip(path: Path | None) -> Clip | None:
    """Decode an audio file.

    Args:
        path: The file, or None.

    Returns:
        The clip; None when there is no file, it holds no sample, or it is not audio that soundfile reads.
    """
    if path is None:
        return None
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        return None
    return Clip(samples=samples[:, :2], rate_hz=rate) if len(samples) else None


def audio_uri(clip: Clip, kind: Literal["MP3", "FLAC"] = "MP3") -> str:
    """Encode a clip for a page.

    Args:
        clip: The audio.
        kind: MP3 (FLAC where MP3 has no such sampling rate), or FLAC.

    Returns:
        A data URI.
    """
    used = kind if clip.rate_hz in MP3_RATES_HZ else "FLAC"
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(clip.samples, -1, 1), clip.rate_hz, format=used)
    return data_uri(MIME[used], buffer.getvalue())


def data_uri(mime: str, data: bytes) -> str:
    """Write bytes as a data URI.

    Args:
        mime: Their media type.
        data: The bytes.

    Returns:
        The URI, in base64.
    """
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def spectrogram(clip: Clip) -> Floats:
    """Compute a mel spectrogram to look at, in decibels below full scale.

    Args:
        clip: The audio; its channels are averaged.

    Returns:
        float32 [Y, X] within [-80, 0] dB, lowest band first, at most 480 columns.
    """
    wav = clip.samples.mean(axis=1)  # [S]
    hop = max(WINDOW // 4, -(-len(wav) // MAX_COLUMNS))
    columns = max(1, -(-len(wav) // hop))
    padded = np.pad(wav, (WINDOW // 2, columns * hop + WINDOW - len(wav)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: columns * hop : hop]  # [X, WINDOW]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW), axis=1)) ** 2 / (WINDOW / 4) ** 2  # [X, bins]
    level = 10 * np.log10(power @ _mel_filters(clip.rate_hz).T + 1e-12)
    return np.clip(level, FLOOR_DB, 0).astype(np.float32).T


def _mel_filters(rate_hz: int) -> Floats:
    """Weigh FFT bins into triangles of equal width in mel, each summing to 1: [Y, bins]."""
    top = 1127 * np.log1p(min(10000, rate_hz / 2) / 700)
    edges = 700 * np.expm1(np.linspace(0, top, BANDS + 2) / 1127)
    bins = np.fft.rfftfreq(WINDOW, 1 / rate_hz)
    edges[:-2] = np.minimum(edges[:-2], edges[1:-1] - bins[1])  # a triangle narrower than a bin would hold none
    edges[2:] = np.maximum(edges[2:], edges[1:-1] + bins[1])
    up = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    weights = np.maximum(0, np.minimum(up, down))
    return (weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)).astype(np.float32)


def spectrogram_uri(clip: Clip) -> str:
    """Draw the spectrogram of a clip.

    Args:
        clip: The audio.

    Returns:
        A data URI of a PNG, low frequencies at the bottom.
    """
    level = spectrogram(clip)[::-1]
    index = ((level - FLOOR_DB) / -FLOOR_DB * 63).round().astype(np.uint8)
    return data_uri("image/png", png(index, _palette(64)))


def _palette(size: int) -> bytes:
    stops = np.linspace(0, len(COLORS) - 1, size)
    channels = [np.interp(stops, np.arange(len(COLORS)), [color[c] for color in COLORS]) for c in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8).tobytes()


def png(index: np.ndarray[Any, np.dtype[np.uint8]], palette: bytes) -> bytes:
    """Write an indexed PNG.

    Args:
        index: uint8 [height, width], entries of the palette, top row first.
        palette: Three bytes (red, green, blue) per entry.

    Returns:
        The file's bytes. Source: the PNG specification, https://www.w3.org/TR/png-3/
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = index.shape
    rows = b"".join(b"\0" + row.tobytes() for row in index)  # each row opens with its filter: 0, none
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, colour type 3: palette
    body = chunk(b"IHDR", header) + chunk(b"PLTE", palette) + chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")
