"""The codec: 44.1 kHz mono audio to ten codes per frame of 2048 samples, and back.

Legend: B batch, S samples, D latent width, F frames, N codebooks.

    encode: samples -> encoder -> downsample -> pre_module -> codebooks -> codes
    decode: codes -> rows -> post_module -> upsample -> decoder -> samples

Everything is causal and frame-synchronous, so long signals are processed in chunks that carry exact left context:
peak memory is that of one chunk, and the result is that of one pass up to float rounding. `encode_latent`,
`quantize` and `decode_latent` are the same steps one by one, with gradients. Nothing is resampled, normalised or
trimmed: encoding pads the end with zeros to a whole frame. On CUDA, torch lets cuDNN round convolutions to TF32
unless `torch.backends.cudnn.allow_tf32` is off; the equalities promised here are those of float32.
There, a float32 codec does what stands between two convolutions in one kernel (`Codec.fused`), to the same numbers up
to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.codec import fused
from s2quant.codec.blocks import Decoder, Encoder
from s2quant.codec.config import CodecConfig
from s2quant.codec.memory import Memory
from s2quant.codec.quantizer import Quantized, Quantizer
from s2quant.errors import UserError

CHUNK_FRAMES = 128  # six seconds: the released codec then needs some 100 MB for its widest activations


class Codec(nn.Module):
    """The audio codec with weight norm folded; parameters are named as in codec.pth.

    Args:
        config: Sizes.

    Attributes:
        fused: Whether encoder and decoder use the kernels of `s2quant.codec.kernels` where no gradients are wanted;
            None, the default: on a CUDA device that can (`s2quant.gpu.kernel_obstacle`).
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.fused: bool | None = None
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = Decoder(config)
        self._rest: torch.device | None = None  # where what only encoding needs is kept between two uses

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        return self.config.sample_rate

    @property
    def frame_size(self) -> int:
        """Samples per frame."""
        return self.config.frame_size

    @property
    def num_codebooks(self) -> int:
        """Codes per frame N."""
        return self.config.num_codebooks

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.decoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the codec works: where the weights are, but for those that rest elsewhere."""
        return next(self.decoder.parameters()).device

    def rest_encoder(self, device: torch.device | str) -> None:
        """Keep what only encoding needs elsewhere from now on: half of the weights. `encode` fetches them for its time.

        Args:
            device: Where they rest, usually the host; the codec's own device ends it.
        """
        target = torch.device(device)
        self._rest = None if target == self.device else target
        self._move_encoder(target)

    def _move_encoder(self, device: torch.device) -> None:
        for part in (self.encoder, self.quantizer.downsample, self.quantizer.pre_module):
            part.to(device)

    def encode_latent(self, wav: Tensor, memory: Memory | None = None) -> Tensor:
        """Bring samples to latents, not yet quantized.

        Args:
            wav: [B, 1, S] in the weights' dtype, S a multiple of the frame size.
            memory: The streams that wav continues, or None.

        Returns:
            [B, D, F].
        """
        assert wav.ndim == 3 and wav.shape[1] == 1 and wav.shape[-1] % self.frame_size == 0, wav.shape
        if fused.is_fused(self.fused, wav):
            return self.quantizer.before(fused.encode(self.encoder, wav, memory), memory)
        return self.quantizer.before(self.encoder(wav, memory), memory)

    def quantize(self, latent: Tensor) -> Quantized:
        """Choose the codes of latents.

        Args:
            latent: [B, D, F], from `encode_latent`.

        Returns:
            Codes, the latents they stand for (straight-through gradients), and what losses need.
        """
        y: Quantized = self.quantizer(latent)
        return y

    def dequantize(self, codes: Tensor) -> Tensor:
        """Turn codes into the latents they stand for.

        Args:
            codes: int64 [B, N, F], not negative; each is clamped to its codebook's last entry. Not changed.

        Returns:
            [B, D, F].
        """
        return self.quantizer.dequantize(codes)

    def decode_latent(self, latent: Tensor, memory: Memory | None = None) -> Tensor:
        """Bring quantized latents to samples.

        Args:
            latent: [B, D, F].
            memory: The streams that latent continues, or None.

        Returns:
            [B, 1, F * frame_size] in (-1, 1), in the weights' dtype.
        """
        x = self.quantizer.after(latent, memory)
        y: Tensor = fused.decode(self.decoder, x, memory) if fused.is_fused(self.fused, x) else self.decoder(x, memory)
        return y

    @torch.no_grad()
    def encode(self, wav: Tensor, chunk_frames: int | None = CHUNK_FRAMES) -> Tensor:
        """Encode audio.

        Args:
            wav: float [B, 1, S] at the codec's sample rate, nominally in -1 ... 1; S is 1 or more.
            chunk_frames: Frames per pass; None for one pass.

        Returns:
            int64 [B, N, ceil(S / frame_size)] on the codec's device.

        Raises:
            UserError: The audio has another shape, is empty, is not floating or is not finite.
        """
        check_audio(wav)
        if self._rest is None:
            return self._encode(wav, chunk_frames)
        self._move_encoder(self.device)
        try:
            return self._encode(wav, chunk_frames)
        finally:
            self._move_encoder(self._rest)

    def _encode(self, wav: Tensor, chunk_frames: int | None) -> Tensor:
        wav = F.pad(wav.to(self.device, self.dtype), (0, -wav.shape[-1] % self.frame_size))
        memory = Memory(wav.shape[0])
        chunks = wav.split((chunk_frames or wav.shape[-1]) * self.frame_size, dim=-1)
        if len(chunks) == 1:
            return self.quantize(self.encode_latent(wav)).codes
        return torch.cat([self.quantize(self.encode_latent(chunk, memory)).codes for chunk in chunks], dim=-1)

    @torch.no_grad()
    def decode(self, codes: Tensor, chunk_frames: int | None = CHUNK_FRAMES) -> Tensor:
        """Decode codes.

        Args:
            codes: int64 [B, N, F]; not changed. A code past its codebook's end counts as the last entry.
            chunk_frames: Frames per pass; None for one pass.

        Returns:
            float32 [B, 1, F * frame_size] in (-1, 1), on the codec's device.

        Raises:
            UserError: The codes have another shape, are not integers, or are negative.
        """
        codes = check_codes(codes, self.num_codebooks).to(self.device)
        if codes.shape[-1] == 0:
            return torch.zeros(codes.shape[0], 1, 0, device=self.device)
        memory = Memory(codes.shape[0])
        chunks = codes.split(chunk_frames or codes.shape[-1], dim=-1)
        if len(chunks) == 1:
            return self.decode_latent(self.dequantize(codes)).float()
        return torch.cat([self.decode_latent(self.dequantize(chunk), memory).float() for chunk in chunks], dim=-1)


def check_audio(wav: Tensor) -> None:
    """Refuse what cannot be encoded.

    Args:
        wav: Audio to be encoded.

    Raises:
        UserError: It is not finite floating [B, 1, S] with B and S of 1 or more.
    """
    if wav.ndim != 3 or wav.shape[1] != 1 or wav.shape[0] == 0 or wav.shape[2] == 0:
        raise UserError(
            f"audio of shape {list(wav.shape)}",
            "mono audio [batch, 1, samples] with one sample or more",
            "mix it down to one channel, reshape it, or leave empty recordings out",
        )
    if not wav.is_floating_point():
        raise UserError(f"audio of dtype {wav.dtype}", "floating samples, nominally -1 ... 1", "scale it to float")
    if not bool(torch.isfinite(wav).all()):
        raise UserError("audio with NaN or infinite samples", "finite samples", "decode the recording again")


def check_codes(codes: Tensor, num_codebooks: int) -> Tensor:
    """Refuse what cannot be decoded.

    Args:
        codes: Codes to be decoded.
        num_codebooks: Codebooks N of the codec.

    Returns:
        The codes as int64.

    Raises:
        UserError: They are not integers [B, N, F] with B of 1 or more, or some are negative.
    """
    if codes.ndim != 3 or codes.shape[1] != num_codebooks or codes.shape[0] == 0:
        raise UserError(
            f"codes of shape {list(codes.shape)}",
            f"[batch, {num_codebooks}, frames]",
            "pass the codes of all codebooks, semantic first, with a batch axis",
        )
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise UserError(f"codes of dtype {codes.dtype}", "integers", "convert them with .long()")
    if codes.numel() and int(codes.min()) < 0:
        batch, book, frame = (codes < 0).nonzero()[0].tolist()
        raise UserError(
            f"{int((codes < 0).sum())} negative codes, the first {int(codes[batch, book, frame])} at "
            f"batch {batch}, codebook {book}, frame {frame}",
            "codes of 0 or more",
            "drop the padding or end-of-speech columns before decoding",
        )
    return codes.long()
