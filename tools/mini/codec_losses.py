"""What the small codec's training compares: mel bands, harmonics, and what can be read off its latents.

Legend: B rows, F frames of 2048 samples at 44.1 kHz, S samples, D latent width, d codebook width, P phonemes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mini.common import CODEC_RATE, FRAME_SIZE
from mini.speech import PHONES

SCALES = ((2048, 160), (1024, 80), (512, 40), (256, 20), (128, 10))  # window, mel bands
FLOOR = 1e-4  # -80 dB of full scale: below it the mel loss sees silence
LOW_HZ, LOW_WINDOWS = 2500, (4096, 2048)
PITCH_HZ, PITCH_BINS = (60.0, 350.0), 48


def mel_bands(window: int, bands: int) -> Tensor:
    """Triangular bands on the mel scale up to half the rate; each gives a mean: [bands, window / 2 + 1]."""

    def mel(hz: float) -> float:
        return 2595 * math.log10(1 + hz / 700)

    points = torch.linspace(0, mel(CODEC_RATE / 2), bands + 2, dtype=torch.float64)
    hz = 700 * (10 ** (points / 2595) - 1)
    bins = torch.linspace(0, CODEC_RATE / 2, window // 2 + 1, dtype=torch.float64)[None]
    width = CODEC_RATE / window  # at least one bin wide on each side
    low = torch.minimum(hz[:-2], hz[1:-1] - width)[:, None]
    high = torch.maximum(hz[2:], hz[1:-1] + width)[:, None]
    peak = hz[1:-1, None]
    triangles = torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp(min=0)
    return (triangles / triangles.sum(1, keepdim=True)).float()


class MelLoss(nn.Module):
    """Mean absolute difference of log10 mel amplitudes over several window lengths."""

    def __init__(self) -> None:
        super().__init__()
        for window, bands in SCALES:
            self.register_buffer(f"bands{window}", mel_bands(window, bands), persistent=False)
            hann = torch.hann_window(window)
            self.register_buffer(f"window{window}", 2 * hann / hann.sum(), persistent=False)

    def mel(self, wav: Tensor, window: int) -> Tensor:
        """[B, S] -> log10 amplitude [B, bands, T]."""
        hann = getattr(self, f"window{window}")
        spectrum = torch.stft(wav, window, window // 4, window=hann, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        return (getattr(self, f"bands{window}") @ (power + 1e-12).sqrt() + FLOOR).log10()

    def forward(self, heard: Tensor, target: Tensor) -> Tensor:
        """Both [B, S]."""
        losses = [(self.mel(heard, w) - self.mel(target, w)).abs().mean() for w, _ in SCALES]
        return torch.stack(losses).mean()


class LowBands(nn.Module):
    """Mean absolute difference of log10 amplitudes of the bins in which harmonics lie apart.

    Mel bands leave harmonics to few of their bands; by these alone, every voice was given one pitch.
    """

    def __init__(self) -> None:
        super().__init__()
        for window in LOW_WINDOWS:
            hann = torch.hann_window(window)
            self.register_buffer(f"window{window}", 2 * hann / hann.sum(), persistent=False)

    def forward(self, heard: Tensor, target: Tensor) -> Tensor:
        """Both [B, S]."""
        losses = []
        for window in LOW_WINDOWS:
            hann, bins = getattr(self, f"window{window}"), int(LOW_HZ * window / CODEC_RATE)
            logs = []
            for wav in (heard, target):
                spectrum = torch.stft(wav, window, window // 4, window=hann, return_complex=True)[:, :bins]
                power = spectrum.real.square() + spectrum.imag.square()
                logs.append(((power + 1e-12).sqrt() + FLOOR).log10())
            losses.append((logs[0] - logs[1]).abs().mean())
        return torch.stack(losses).mean()


@torch.no_grad()
def pitch_labels(wav: Tensor) -> tuple[Tensor, Tensor]:
    """Pitch of each frame by autocorrelation: wav [B, 1, F * 2048] -> bins int64 [B, F], voiced bool [B, F].

    Windows of 70 ms at a quarter of the rate; a short lag wins over its multiples.
    """
    rate, frame, window = CODEC_RATE // 4, FRAME_SIZE // 4, 768
    low = functional.avg_pool1d(wav, 4)[:, 0]
    side = (window - frame) // 2
    frames = functional.pad(low, (side, side)).unfold(1, window, frame)  # [B, F, window]
    frames = frames - frames.mean(-1, keepdim=True)
    spectrum = torch.fft.rfft(frames, 2048)
    products = torch.fft.irfft(spectrum.real.square() + spectrum.imag.square(), 2048)[..., :window]
    lags = torch.arange(int(rate / PITCH_HZ[1]), int(rate / PITCH_HZ[0]), device=wav.device)
    energy = products[..., :1]
    likeness = products[..., lags] / (energy + 1e-9) * (window / (window - lags))
    best, index = (likeness * (1 - 0.001 * lags)).max(-1)
    place = (lags[index].float() / lags[0]).log2() / math.log2(PITCH_HZ[1] / PITCH_HZ[0])
    bins = (place * PITCH_BINS).long().clamp(0, PITCH_BINS - 1)
    return bins, (best > 0.5) & (energy[..., 0] / window > 0.01**2)


class PitchClassifier(nn.Module):
    """Guess the pitch of a frame from its latent."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(latent_dim, 256), nn.GELU(), nn.Linear(256, PITCH_BINS))

    def forward(self, latent: Tensor, wav: Tensor) -> Tensor:
        """latent [B, D, F], wav [B, 1, S] -> cross-entropy over the voiced frames."""
        bins, voiced = pitch_labels(wav)
        loss = functional.cross_entropy(
            self.layers(latent.transpose(1, 2)).flatten(0, 1), bins.flatten(), reduction="none"
        )
        return (loss * voiced.flatten()).sum() / voiced.sum().clamp(min=1)


class PhoneClassifier(nn.Module):
    """Guess the phonemes of a frame from its point in the first codebook's space."""

    def __init__(self, codebook_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(codebook_dim, 256), nn.GELU(), nn.Linear(256, len(PHONES)))

    def forward(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """points [B, d, F], labels int64 [B, F, 4] -> cross-entropy against all four, accuracy of the third."""
        points = functional.normalize(points.transpose(1, 2), dim=2) * points.shape[1] ** 0.5
        scores = self.layers(points)  # [B, F, P]
        spread = scores[:, :, None].expand(-1, -1, labels.shape[2], -1)
        loss = functional.cross_entropy(spread.flatten(0, 2), labels.flatten())
        return loss, (scores.argmax(-1, keepdim=True) == labels).float().amax(-1).mean()
