"""Encoder and decoder with one kernel between two convolutions, on a CUDA device.

Legend: B batch, C channels, S positions, s stride, k kernel.

The same layers, memory and sums as in `s2quant.codec.blocks`, in another grouping: a convolution leaves its bias and
the residual branch to what follows it (`Product`), and a kernel of `s2quant.codec.kernels` does that, Snake and the
past columns of the next convolution in one pass. cuDNN does the convolutions, in the precision it is allowed.
A transposed convolution with k = 2s and s of 4 or more is a convolution of two taps to s outputs per channel, which the
next kernel brings into order: cuDNN's own takes up to eight times as long. Both ways read and write the same memory, so
a stream may change between them. It is for inference in float32; Triton is imported when it is first used. The
arranged weights of the released codec take 97 MB beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.codec.blocks import (
    DILATIONS,
    CausalConv,
    CausalTransposedConv,
    Decoder,
    DecoderBlock,
    Encoder,
    EncoderBlock,
    ResidualUnit,
    Snake,
)
from s2quant.codec.memory import Memory
from s2quant.errors import UserError
from s2quant.gpu import kernel_obstacle

LEAST_STRIDE = 4  # of a transposed convolution of two taps; of stride 2 cuDNN's own is faster (1.3 ms, not 2.1)


def is_fused(wanted: bool | None, x: Tensor) -> bool:
    """Decide whether a signal goes through the kernels.

    Args:
        wanted: Whether they are to be used; None: on a CUDA device that can.
        x: The signal.

    Returns:
        Whether it does: with gradients, with autocast and in other dtypes than float32 it never does.

    Raises:
        UserError: They are wanted and cannot run.
    """
    if wanted is False or torch.is_grad_enabled() or x.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    if wanted is None and x.device.type != "cuda":
        return False
    obstacle = kernel_obstacle(x.device)
    if wanted and obstacle is not None:
        raise UserError(
            f"the codec's kernels wanted, but: {obstacle}",
            "a CUDA device with Triton",
            "leave `Codec.fused` at None: they are then used where they can be",
        )
    return obstacle is None


@dataclass(kw_only=True)
class Product:
    """What a convolution gave, to be finished once; its tensors are then given up.

    Args:
        y: Without bias, [B, C, S]; of a transposed convolution [B, C * s, S / s + 1] (`CausalTransposedConv.two_taps`).
        bias: [C], or None where there is none left to add.
        residual: To be added, [B, C, S], or None.
        stride: s of a transposed convolution, or 1.
        overhang: What the chunk before left of a transposed convolution, [B, C, s], or None.
    """

    y: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    stride: int = 1
    overhang: Tensor | None = None


def upsampled(conv: CausalTransposedConv, x: Tensor, memory: Memory | None) -> Product:
    """Apply a transposed convolution.

    Args:
        conv: The layer, k = 2s.
        x: [B, C_in, S / s].
        memory: The streams that x continues, or None.

    Returns:
        Its product.
    """
    assert conv.conv.bias is not None
    if conv.stride < LEAST_STRIDE:
        return Product(y=conv(x, memory).contiguous())
    y = F.conv1d(x, conv.two_taps(), padding=1).contiguous()
    overhang = None if memory is None else memory.buffer(conv, "unfinished", (conv.conv.out_channels, conv.overhang), y)
    return Product(y=y, bias=conv.conv.bias, stride=conv.stride, overhang=overhang)


def snake_and(
    product: Product, snake: nn.Module, conv: nn.Module, memory: Memory | None, keep: bool = False
) -> tuple[Product, Tensor | None]:
    """Finish a product, and apply Snake and the convolution that follows.

    Args:
        product: What comes in; given up.
        snake: A Snake.
        conv: A CausalConv or CausalTransposedConv.
        memory: The streams that it continues, or None.
        keep: Whether the finished product itself is wanted, too.

    Returns:
        The convolution's product, and the finished product [B, C, S] or None.
    """
    from s2quant.codec.kernels import finish

    assert isinstance(snake, Snake) and isinstance(conv, CausalConv | CausalTransposedConv)
    num_past, past = (conv.context if isinstance(conv, CausalConv) else 0), None
    if memory is not None and num_past:
        past = memory.buffer(conv, "past", (snake.alpha.shape[1], num_past), product.y)
    x, total = finish(
        product.y,
        product.bias,
        snake.alpha,
        num_past=num_past,
        past=past,
        residual=product.residual,
        keep=keep,
        stride=product.stride,
        overhang=product.overhang,
    )
    del product.y, product.residual  # as large as what they were made into
    if isinstance(conv, CausalTransposedConv):
        return upsampled(conv, x, memory), total
    missing = (num_past - x.shape[-1]) % conv.stride  # columns of the last stride of a whole signal
    assert memory is None or not missing, (x.shape, conv.stride)
    return convolved(conv, F.pad(x, (0, missing)) if missing else x), total


def convolved(conv: nn.Module, x: Tensor) -> Product:
    """Convolve a signal that has its past before it.

    Args:
        conv: A CausalConv.
        x: [B, C_in, context + S].

    Returns:
        Its product.
    """
    assert isinstance(conv, CausalConv) and conv.conv.bias is not None
    y = F.conv1d(x, conv.conv.weight, None, conv.stride, 0, conv.conv.dilation, conv.conv.groups)
    return Product(y=y.contiguous(), bias=conv.conv.bias)


def biased(product: Product) -> Tensor:
    """Add the bias and nothing else, in place.

    Args:
        product: Of a convolution that no residual branch goes around.

    Returns:
        [B, C, S].
    """
    assert product.bias is not None and product.residual is None and product.stride == 1
    return product.y.add_(product.bias[:, None])


def residual_unit(unit: nn.Module, product: Product, memory: Memory | None) -> Product:
    """Apply a residual unit.

    Args:
        unit: A ResidualUnit.
        product: What comes in; given up.
        memory: The streams that it continues, or None.

    Returns:
        The product of its last convolution, with the residual branch.
    """
    assert isinstance(unit, ResidualUnit)
    first, dilated, second, last = unit.block
    inner, total = snake_and(product, first, dilated, memory, keep=True)
    outer, _ = snake_and(inner, second, last, memory)
    outer.residual = total
    return outer


@torch.no_grad()
def decode(decoder: Decoder, x: Tensor, memory: Memory | None = None) -> Tensor:
    """Do what the decoder does.

    Args:
        decoder: The decoder.
        x: [B, latent_dim, T].
        memory: The streams that x continues, or None.

    Returns:
        Samples [B, 1, T * product of the decoder rates], in (-1, 1).
    """
    first, *blocks, snake, last = decoder.model
    assert isinstance(first, CausalConv)
    with torch.cuda.device_of(x):  # where Triton launches
        product = convolved(first, first.padded(x, memory))
        for block in blocks:
            assert isinstance(block, DecoderBlock)
            product, _ = snake_and(product, block.block[0], block.block[1], memory)
            for unit in block.block[2:]:
                product = residual_unit(unit, product, memory)
        product, _ = snake_and(product, snake, last, memory)
        return biased(product).tanh_()


@torch.no_grad()
def encode(encoder: Encoder, x: Tensor, memory: Memory | None = None) -> Tensor:
    """Do what the encoder does.

    Args:
        encoder: The encoder.
        x: Samples [B, 1, S].
        memory: The streams that x continues, or None.

    Returns:
        [B, latent_dim, S / product of the encoder rates].
    """
    first, *blocks, snake, last = encoder.block
    assert isinstance(first, CausalConv)
    with torch.cuda.device_of(x):
        product = convolved(first, first.padded(x, memory))
        for block in blocks:
            assert isinstance(block, EncoderBlock)
            *units, then, strided = block.block[: len(DILATIONS) + 2]
            for unit in units:
                product = residual_unit(unit, product, memory)
            product, _ = snake_and(product, then, strided, memory)
            for transformer in block.block[len(DILATIONS) + 2 :]:
                product = Product(y=transformer(biased(product), memory).contiguous())
        product, _ = snake_and(product, snake, last, memory)
        return biased(product)
