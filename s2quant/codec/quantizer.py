"""Latents to codes and back: downsampling, transformers, one semantic and several residual codebooks.

Legend: B batch, D latent width, d codebook width, F frames, N codebooks.

Facts of the reference implementation that decide the codes:
- The nearest entry is that of the L2-normalised codebook to the L2-normalised projection, by
  |a|**2 - 2 a.b + |b|**2 evaluated in that order (the first of equal entries wins); the value is the codebook row
  as it is, not normalised.
- Each stage works in the D-wide space on what the stages before left over, with the semantic stage first, and while
  encoding the row passes through a straight-through estimator, p + (row - p), whose rounding is part of the residual.
- Decoding sums the residual stages before it adds the semantic one.
- Codes past the end of a codebook are clamped when decoding (there in place, here not). Negative ones are not.

The search runs in float32 whatever the weights' dtype.

Source: https://github.com/fishaudio/fish-speech/blob/3dd1f85/fish_speech/models/dac/rvq.py and
descript-audio-codec 1.0.0, dac/nn/quantize.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.codec.blocks import CausalConv, CausalTransposedConv, ConvNeXt, run
from s2quant.codec.config import CodecConfig
from s2quant.codec.memory import Memory
from s2quant.codec.transformer import WindowTransformer


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What quantizing latents gives; the last two are what a codebook and a commitment loss compare.

    Args:
        codes: int64 [B, N, F].
        latent: [B, D, F], sum of all codebooks' values; gradients pass straight through to the input.
        projected: [B, N, d, F], each stage's input in the codebook's space.
        rows: [B, N, d, F], the chosen codebook rows.
    """

    codes: Tensor
    latent: Tensor
    projected: Tensor
    rows: Tensor


class Codebook(nn.Module):
    """One vector quantizer.

    Args:
        latent_dim: Width D.
        size: Entries.
        codebook_dim: Width d of an entry.
    """

    def __init__(self, latent_dim: int, size: int, codebook_dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Conv1d(latent_dim, codebook_dim, 1)
        self.out_proj = nn.Conv1d(codebook_dim, latent_dim, 1)
        self.codebook = nn.Embedding(size, codebook_dim)

    def nearest(self, projected: Tensor) -> Tensor:
        """Find the entry of the smallest angle.

        Args:
            projected: [B, d, F].

        Returns:
            int64 [B, F].
        """
        points = F.normalize(projected.detach().float().transpose(1, 2).flatten(0, 1))  # [B * F, d]
        entries = F.normalize(self.codebook.weight.detach().float())
        distance = points.square().sum(1, keepdim=True) - 2 * points @ entries.t() + entries.square().sum(1)
        return (-distance).argmax(1).unflatten(0, (projected.shape[0], -1))

    def rows(self, codes: Tensor) -> Tensor:
        """Look entries up.

        Args:
            codes: int64 [B, F].

        Returns:
            [B, d, F].
        """
        y: Tensor = self.codebook(codes)
        return y.transpose(1, 2)

    def value(self, rows: Tensor) -> Tensor:
        """Bring rows to the latent space.

        Args:
            rows: [B, d, F].

        Returns:
            [B, D, F].
        """
        y: Tensor = self.out_proj(rows)
        return y


class ResidualQuantizer(nn.Module):
    """Codebooks of one size, each working on what the ones before left.

    Args:
        num_codebooks: How many.
        latent_dim: Width D.
        size: Entries of each.
        codebook_dim: Width d of an entry.
    """

    def __init__(self, num_codebooks: int, latent_dim: int, size: int, codebook_dim: int) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList([Codebook(latent_dim, size, codebook_dim) for _ in range(num_codebooks)])

    def forward(self, residual: Tensor) -> Quantized:
        """Quantize.

        Args:
            residual: [B, D, F].

        Returns:
            Codes and values of these codebooks.
        """
        total: Tensor | None = None
        codes, projections, rows = [], [], []
        for book in self.quantizers:
            assert isinstance(book, Codebook)
            projected = book.in_proj(residual)
            codes.append(book.nearest(projected))
            projections.append(projected)
            rows.append(book.rows(codes[-1]))
            value = book.value(projected + (rows[-1] - projected).detach())
            total = value if total is None else total + value
            residual = residual - value
        assert total is not None
        return Quantized(
            codes=torch.stack(codes, 1), latent=total, projected=torch.stack(projections, 1), rows=torch.stack(rows, 1)
        )

    def dequantize(self, codes: Tensor) -> Tensor:
        """Sum the values of codes, clamped to the last entry.

        Args:
            codes: int64 [B, number of codebooks, F], not negative; not changed.

        Returns:
            [B, D, F].
        """
        total: Tensor | None = None
        for book, column in zip(self.quantizers, codes.unbind(1), strict=True):
            assert isinstance(book, Codebook)
            value = book.value(book.rows(column.clamp(max=book.codebook.num_embeddings - 1)))
            total = value if total is None else total + value
        assert total is not None
        return total


class Quantizer(nn.Module):
    """All that lies between the encoder and the decoder.

    Args:
        config: Sizes.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        dim, factors = config.latent_dim, config.downsample_factors
        self.semantic_quantizer = ResidualQuantizer(1, dim, config.semantic_size, config.codebook_dim)
        self.quantizer = ResidualQuantizer(config.num_residual, dim, config.residual_size, config.codebook_dim)
        self.downsample = nn.ModuleList(
            [nn.ModuleList([CausalConv(dim, dim, factor, stride=factor), ConvNeXt(dim)]) for factor in factors]
        )
        self.upsample = nn.ModuleList(
            [nn.ModuleList([CausalTransposedConv(dim, dim, factor, factor), ConvNeXt(dim)]) for factor in factors[::-1]]
        )
        self.pre_module = WindowTransformer(dim, config.pre, config.head_dim, config.window)
        self.post_module = WindowTransformer(dim, config.post, config.head_dim, config.window)

    def before(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Bring the encoder's output to the frame rate.

        Args:
            x: [B, D, T] at the encoder's rate.
            memory: The streams that x continues, or None.

        Returns:
            [B, D, F].
        """
        for stage in self.downsample:
            assert isinstance(stage, nn.ModuleList)
            x = run(stage, x, memory)
        y: Tensor = self.pre_module(x, memory)
        return y

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize with the semantic codebook, then what is left with the residual ones.

        Args:
            latent: [B, D, F].

        Returns:
            Codes and values of all N codebooks, semantic first.
        """
        semantic = self.semantic_quantizer(latent)
        rest = self.quantizer(latent - semantic.latent)
        return Quantized(
            codes=torch.cat([semantic.codes, rest.codes], 1),
            latent=semantic.latent + rest.latent,
            projected=torch.cat([semantic.projected, rest.projected], 1),
            rows=torch.cat([semantic.rows, rest.rows], 1),
        )

    def dequantize(self, codes: Tensor) -> Tensor:
        """Turn codes into latents.

        Args:
            codes: int64 [B, N, F], not negative; not changed.

        Returns:
            [B, D, F].
        """
        return self.semantic_quantizer.dequantize(codes[:, :1]) + self.quantizer.dequantize(codes[:, 1:])

    def after(self, latent: Tensor, memory: Memory | None = None) -> Tensor:
        """Bring quantized latents to the decoder's rate.

        Args:
            latent: [B, D, F].
            memory: The streams that latent continues, or None.

        Returns:
            [B, D, T].
        """
        x = self.post_module(latent, memory)
        for stage in self.upsample:
            assert isinstance(stage, nn.ModuleList)
            x = run(stage, x, memory)
        return x
