"""Sizes of the codec.

A `codec.pth` carries no configuration: every size is read off its tensors (`s2quant.codec.layout`), except three
numbers that leave no trace in them. Those are the head width and the two attention windows; they have the released
codec's values unless somebody says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from s2quant.errors import UserError, shorten_list


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Depth and feed-forward width of one windowed transformer; its width is that of the data.

    Args:
        num_layers: Number of blocks, 1 or more.
        intermediate_size: Width inside the feed-forward.
    """

    num_layers: int
    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Every size of the codec.

    Args:
        encoder_dim: Channels after the encoder's first convolution; each block doubles them.
        encoder_rates: Stride of each encoder block.
        encoder_transformers: The transformer at the end of each encoder block, or None.
        decoder_dim: Channels after the decoder's first convolution; each block halves them.
        decoder_rates: Stride of each decoder block.
        latent_dim: Width of the latents between encoder, quantizer and decoder.
        downsample_factors: Further strides between the encoder and the quantizer.
        pre: The transformer before the quantizer.
        post: The transformer after the quantizer.
        codebook_dim: Width of a codebook row.
        semantic_size: Entries of the first codebook.
        num_residual: Number of residual codebooks.
        residual_size: Entries of each residual codebook.
        head_dim: Attention head width. Not in the tensors.
        encoder_window: Positions that a query of the encoder's transformers sees, itself included. Not in the tensors.
        window: The same for `pre` and `post`, in frames. Not in the tensors.
        sample_rate: Samples per second. Not in the tensors.
    """

    encoder_dim: int
    encoder_rates: tuple[int, ...]
    encoder_transformers: tuple[TransformerSize | None, ...]
    decoder_dim: int
    decoder_rates: tuple[int, ...]
    latent_dim: int
    downsample_factors: tuple[int, ...]
    pre: TransformerSize
    post: TransformerSize
    codebook_dim: int
    semantic_size: int
    num_residual: int
    residual_size: int
    head_dim: int = 64
    encoder_window: int = 512
    window: int = 128
    sample_rate: int = 44100

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise UserError(
                "codec sizes that do not fit together:\n" + shorten_list(faults),
                "the sizes of one codec",
                "correct the sizes; if they were read from a codec.pth, fetch that file again",
            )

    def _faults(self) -> list[str]:
        rates = (*self.encoder_rates, *self.decoder_rates, *self.downsample_factors)
        sizes = [t for t in (*self.encoder_transformers, self.pre, self.post) if t is not None]
        positive = {
            "encoder_dim": self.encoder_dim,
            "latent_dim": self.latent_dim,
            "codebook_dim": self.codebook_dim,
            "semantic_size": self.semantic_size,
            "num_residual": self.num_residual,
            "residual_size": self.residual_size,
            "encoder_window": self.encoder_window,
            "window": self.window,
            "sample_rate": self.sample_rate,
            "the smallest rate": min(rates, default=0),
            "the smallest transformer size": min(min(t.num_layers, t.intermediate_size) for t in sizes),
            "the channels of the last decoder block": self.decoder_dim >> len(self.decoder_rates),
        }
        faults = [f"{name} is {value}, not positive" for name, value in positive.items() if value < 1]
        if len(self.encoder_rates) != len(self.encoder_transformers):
            faults.append(f"{len(self.encoder_rates)} encoder rates, {len(self.encoder_transformers)} transformers")
        if math.prod(self.encoder_rates) != math.prod(self.decoder_rates):
            faults.append(
                f"encoder rates {self.encoder_rates} and decoder rates {self.decoder_rates} differ in product"
            )
        if self.decoder_dim % (1 << len(self.decoder_rates)):
            faults.append(f"decoder_dim {self.decoder_dim} cannot be halved {len(self.decoder_rates)} times")
        if self.head_dim < 2 or self.head_dim % 2:
            return [*faults, f"head_dim {self.head_dim} is not even and positive"]
        widths = [self.encoder_dim << i + 1 for i, t in enumerate(self.encoder_transformers) if t is not None]
        odd = [width for width in (*widths, self.latent_dim) if width % self.head_dim]
        return faults + [f"width {width} is no multiple of head_dim {self.head_dim}" for width in odd]

    @property
    def num_codebooks(self) -> int:
        """Codebooks N: the semantic one and the residual ones."""
        return 1 + self.num_residual

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Entries of each codebook, semantic first."""
        return (self.semantic_size, *[self.residual_size] * self.num_residual)

    @property
    def frame_size(self) -> int:
        """Samples per frame."""
        return math.prod(self.encoder_rates) * math.prod(self.downsample_factors)

    @classmethod
    def s2_pro(cls) -> CodecConfig:
        """Give the sizes of the released codec (391,398,385 parameters).

        Source: https://github.com/fishaudio/fish-speech/blob/3dd1f85/fish_speech/configs/modded_dac_vq.yaml
        """
        return cls(
            encoder_dim=64,
            encoder_rates=(2, 4, 8, 8),
            encoder_transformers=(None, None, None, TransformerSize(num_layers=4, intermediate_size=3072)),
            decoder_dim=1536,
            decoder_rates=(8, 8, 4, 2),
            latent_dim=1024,
            downsample_factors=(2, 2),
            pre=TransformerSize(num_layers=8, intermediate_size=3072),
            post=TransformerSize(num_layers=8, intermediate_size=3072),
            codebook_dim=8,
            semantic_size=4096,
            num_residual=9,
            residual_size=1024,
        )

    @classmethod
    def tiny(cls) -> CodecConfig:
        """Give the same topology, codebooks and frame rate at a width for tests (under 3 MB)."""
        layers = TransformerSize(num_layers=2, intermediate_size=96)
        encoder_layers = TransformerSize(num_layers=1, intermediate_size=192)  # the reference fixes 3 x width here
        return cls(
            encoder_dim=4,
            encoder_rates=(2, 4, 8, 8),
            encoder_transformers=(None, None, None, encoder_layers),
            decoder_dim=64,
            decoder_rates=(8, 8, 4, 2),
            latent_dim=64,
            downsample_factors=(2, 2),
            pre=layers,
            post=layers,
            codebook_dim=8,
            semantic_size=4096,
            num_residual=9,
            residual_size=1024,
        )
