"""The codec's convolutional layers: every one causal, every one able to run whole or chunk by chunk.

Legend: B batch, C channels, S positions (samples, or columns at some stage's rate), s stride, k kernel.

A layer called with a `Memory` continues the stream that the memory holds and gives the same columns as one call on
the whole signal would. Facts of the reference implementation that decide the bits:
- A convolution is padded with (k - 1) * dilation + 1 - s zeros on the left, and on the right with whatever completes
  the last stride; its output has ceil(S / s) columns.
- A transposed convolution has no padding of its own; k - s columns are cropped on the right and none on the left, so
  S columns become exactly S * s and no output depends on a later input.
- Snake divides by alpha + 1e-9, and alpha is not exponentiated.

Source: https://github.com/fishaudio/fish-speech/blob/3dd1f85/fish_speech/models/dac/modded_dac.py and rvq.py;
Snake is descript-audio-codec's dac/nn/layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.codec.config import CodecConfig
from s2quant.codec.memory import Memory
from s2quant.codec.transformer import WindowTransformer

DILATIONS = (1, 3, 9)
CONVNEXT_RATIO = 4


def run(layers: Iterable[nn.Module], x: Tensor, memory: Memory | None) -> Tensor:
    """Apply layers one after the other.

    Args:
        layers: Layers called as layer(x, memory).
        x: [B, C, S].
        memory: The streams that x continues, or None for a whole signal.

    Returns:
        [B, C', S'].
    """
    for layer in layers:
        x = layer(x, memory)
    return x


class Snake(nn.Module):
    """x + sin(alpha x)**2 / alpha with one learned alpha per channel.

    Args:
        dim: Channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Apply the activation.

        Args:
            x: [B, C, S].
            memory: Not used: each column stands alone.

        Returns:
            [B, C, S].
        """
        share = (self.alpha + 1e-9).reciprocal()
        if torch.is_grad_enabled():
            return x + share * torch.sin(self.alpha * x).square()
        # The same bits in one new tensor instead of five: on a CPU the pages of the others took most of the time.
        return (self.alpha * x).sin_().square_().mul_(share).add_(x)


class CausalConv(nn.Module):
    """A convolution that sees the present and the past.

    Args:
        in_dim: Input channels.
        out_dim: Output channels.
        kernel: Kernel k, at least the stride.
        stride: Stride s.
        dilation: Dilation.
        groups: Channel groups.
    """

    def __init__(
        self, in_dim: int, out_dim: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel, stride=stride, dilation=dilation, groups=groups)
        self.stride = stride
        self.context = (kernel - 1) * dilation + 1 - stride  # past columns that one output needs

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Convolve.

        Args:
            x: [B, in_dim, S]; with a memory S is a multiple of the stride.
            memory: The streams that x continues, or None.

        Returns:
            [B, out_dim, ceil(S / s)].
        """
        y: Tensor = self.conv(self.padded(x, memory))
        return y

    def padded(self, x: Tensor, memory: Memory | None) -> Tensor:
        """Put the past before a signal, and complete the last stride of a whole one.

        Args:
            x: [B, in_dim, S]; with a memory S is a multiple of the stride.
            memory: The streams that x continues, or None.

        Returns:
            [B, in_dim, context + S and what completes it].
        """
        if memory is None:
            return F.pad(x, (self.context, -x.shape[-1] % self.stride))
        if not self.context:
            return x
        assert x.shape[-1] % self.stride == 0, (x.shape, self.stride)
        past = memory.buffer(self, "past", (x.shape[1], self.context), x)
        x = torch.cat([past, x], dim=-1)
        past.copy_(x[..., -self.context :])
        return x


class CausalTransposedConv(nn.Module):
    """An upsampling convolution without look-ahead.

    Args:
        in_dim: Input channels.
        out_dim: Output channels.
        kernel: Kernel k, at least the stride.
        stride: Stride s.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(in_dim, out_dim, kernel, stride=stride)
        self.stride = stride
        self.overhang = kernel - stride  # columns that the next input still adds to
        self._arranged: tuple[Tensor, tuple[int, int], Tensor] | None = None  # the weight, its state, `two_taps` of it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalTransposedConv:
        moved: CausalTransposedConv = super()._apply(fn, recurse)
        if self._arranged is not None and self._arranged[1] != self._state():
            self._arranged = None  # the weight has moved
        return moved

    def _state(self) -> tuple[int, int]:
        weight = self.conv.weight
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version

    def two_taps(self) -> Tensor:
        """Give the weight as that of a convolution over the input with a zero put on both sides; kernel k = 2s.

        Position t * s + j of the output sees input t through tap j and input t - 1 through tap j + s. Behind the last
        input stands what that one leaves for the next s positions.

        Returns:
            [out_dim * s, in_dim, 2], row c * s + j; made once for a weight, and again when that has moved or was
            written to in a way that torch counts (not through `data`, nor in inference mode).
        """
        weight = self.conv.weight
        assert weight.shape[2] == 2 * self.stride, (weight.shape, self.stride)
        known, state = self._arranged, self._state()
        if known is None or known[0] is not weight or known[1] != state:
            parts = weight.detach().unflatten(2, (2, self.stride)).flip(2)  # [in_dim, out_dim, input t - 1 or t, j]
            self._arranged = known = weight, state, parts.permute(1, 3, 0, 2).flatten(0, 1).contiguous()
        return known[2]

    @property
    def arranged(self) -> Tensor | None:
        """What `two_taps` has made, if it has."""
        return None if self._arranged is None else self._arranged[2]

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Upsample.

        Args:
            x: [B, in_dim, S].
            memory: The streams that x continues, or None.

        Returns:
            [B, out_dim, S * s].
        """
        length = x.shape[-1] * self.stride
        if memory is None or not self.overhang:
            whole: Tensor = self.conv(x)
            return whole[..., :length]
        y = F.conv_transpose1d(x, self.conv.weight, None, self.stride)
        unfinished = memory.buffer(self, "unfinished", (y.shape[1], self.overhang), y)
        y[..., : self.overhang] += unfinished
        unfinished.copy_(y[..., length:])
        assert self.conv.bias is not None
        return y[..., :length] + self.conv.bias[:, None]


class ResidualUnit(nn.Module):
    """x plus Snake, dilated convolution k7, Snake, convolution k1.

    Args:
        dim: Channels C.
        dilation: Dilation of the first convolution.
    """

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [Snake(dim), CausalConv(dim, dim, 7, dilation=dilation), Snake(dim), CausalConv(dim, dim, 1)]
        )

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Apply the unit.

        Args:
            x: [B, C, S].
            memory: The streams that x continues, or None.

        Returns:
            [B, C, S].
        """
        return x + run(self.block, x, memory)


class ConvNeXt(nn.Module):
    """Depthwise convolution k7, then a two-layer perceptron on each column; x plus gamma times that.

    Args:
        dim: Channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = CausalConv(dim, dim, 7, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, CONVNEXT_RATIO * dim)
        self.pwconv2 = nn.Linear(CONVNEXT_RATIO * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: [B, C, S].
            memory: The streams that x continues, or None.

        Returns:
            [B, C, S].
        """
        y = self.norm(self.dwconv(x, memory).transpose(1, 2))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.transpose(1, 2)


class EncoderBlock(nn.Module):
    """Three residual units, Snake, a strided convolution that doubles the channels, and perhaps a transformer.

    Args:
        config: Sizes.
        index: Which encoder block, from 0.
    """

    def __init__(self, config: CodecConfig, index: int) -> None:
        super().__init__()
        dim, rate, size = config.encoder_dim << index, config.encoder_rates[index], config.encoder_transformers[index]
        self.block = nn.ModuleList([ResidualUnit(dim, dilation) for dilation in DILATIONS])
        self.block.extend([Snake(dim), CausalConv(dim, 2 * dim, 2 * rate, stride=rate)])
        if size is not None:
            self.block.append(WindowTransformer(2 * dim, size, config.head_dim, config.encoder_window))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: [B, C, S].
            memory: The streams that x continues, or None.

        Returns:
            [B, 2C, ceil(S / s)].
        """
        return run(self.block, x, memory)


class DecoderBlock(nn.Module):
    """Snake, a transposed convolution that halves the channels, and three residual units.

    Args:
        config: Sizes.
        index: Which decoder block, from 0.
    """

    def __init__(self, config: CodecConfig, index: int) -> None:
        super().__init__()
        dim, rate = config.decoder_dim >> index, config.decoder_rates[index]
        self.block = nn.ModuleList([Snake(dim), CausalTransposedConv(dim, dim // 2, 2 * rate, rate)])
        self.block.extend([ResidualUnit(dim // 2, dilation) for dilation in DILATIONS])

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: [B, C, S].
            memory: The streams that x continues, or None.

        Returns:
            [B, C / 2, S * s].
        """
        return run(self.block, x, memory)


class Encoder(nn.Module):
    """Samples to latents at the encoder's rate.

    Args:
        config: Sizes.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        blocks = [EncoderBlock(config, index) for index in range(len(config.encoder_rates))]
        dim = config.encoder_dim << len(blocks)
        first, last = CausalConv(1, config.encoder_dim, 7), CausalConv(dim, config.latent_dim, 3)
        self.block = nn.ModuleList([first, *blocks, Snake(dim), last])

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Encode.

        Args:
            x: Samples [B, 1, S].
            memory: The streams that x continues, or None.

        Returns:
            [B, latent_dim, S / product of the encoder rates].
        """
        return run(self.block, x, memory)


class Decoder(nn.Module):
    """Latents at the encoder's rate to samples.

    The reference's configuration asks for four transformer layers here, but its Decoder never attaches them.

    Args:
        config: Sizes.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        blocks = [DecoderBlock(config, index) for index in range(len(config.decoder_rates))]
        dim = config.decoder_dim >> len(blocks)
        first, last = CausalConv(config.latent_dim, config.decoder_dim, 7), CausalConv(dim, 1, 7)
        self.model = nn.ModuleList([first, *blocks, Snake(dim), last])

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Decode.

        Args:
            x: [B, latent_dim, T].
            memory: The streams that x continues, or None.

        Returns:
            Samples [B, 1, T * product of the decoder rates], in (-1, 1).
        """
        return torch.tanh(run(self.model, x, memory))
