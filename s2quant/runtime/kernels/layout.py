"""Where a 4-bit weight's nibbles go for the matrix-vector kernel, and how long its vectors are.

Legend: M outputs, K inputs, G groups, P outputs padded to whole tiles of 16.

Inputs are sorted by group once (`order`), so that the groups of an act-order weight are contiguous; whoever makes
the kernel's x writes it in that order (`place`). Word order, from the slowest: tile of 16 outputs, step of 128
inputs, half a step (64), lane (32), word (4). Lane 4 g + t has outputs g and g + 8 and inputs 8 t .. 8 t + 7 of each
32; word 2 q + s has inputs 4 s .. 4 s + 3 of those, in the q-th 32 of the half. In a word, nibble 4 p + n belongs to
output g + 8 (n % 2) and input 2 (n // 2) + p of the four: two inputs that meet in one register are 16 bits apart.
Scales: tile, step, g, group of the step, output g or g + 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from s2quant.packing import QuantizedWeight
from s2quant.runtime.kernels.ptx import STEP, TILE

STEP_W4 = STEP["w4"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedW4:
    """A symmetric 4-bit weight as the kernel reads it.

    Args:
        words: int32 [P/16, K/128, 2, 32, 4].
        scales: float16 or bfloat16 [P/16, K/128, 8, 128/group_size, 2].
        order: int64 [K], the input that stands at each place; None when they stand in their natural order.
        out_features: M.
        in_features: K.
        group_size: Inputs per scale.
    """

    words: Tensor
    scales: Tensor
    order: Tensor | None
    out_features: int
    in_features: int
    group_size: int

    @property
    def place(self) -> Tensor | None:
        """int32 [K], the place of each input; None when every input stands at its own."""
        if self.order is None:
            return None
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order), device=self.order.device)
        return place.to(torch.int32)


def w4_obstacle(weight: QuantizedWeight) -> str | None:
    """Say why the kernel's layout cannot hold a weight.

    Args:
        weight: The quantized weight.

    Returns:
        The reason, or None when it can.
    """
    if weight.bits != 4:
        return f"{weight.bits} bits, not 4"
    if weight.group_size not in (32, 64, 128):
        return f"group size {weight.group_size}, not 32, 64 or 128"
    if weight.in_features % STEP_W4:
        return f"{weight.in_features} inputs, not a multiple of {STEP_W4}"
    if weight.out_features % 8:
        return f"{weight.out_features} outputs, not a multiple of 8"
    return None


def pack_w4(weight: QuantizedWeight) -> PackedW4:
    """Lay a weight out for the kernel.

    Args:
        weight: A weight that `w4_obstacle` does not refuse.

    Returns:
        The packed weight, on the same device.
    """
    obstacle = w4_obstacle(weight)
    assert obstacle is None, obstacle
    order = torch.argsort(weight.g_idx, stable=True)
    natural = bool((order == torch.arange(len(order), device=order.device)).all())
    codes = weight.codes if natural else weight.codes[:, order]
    return PackedW4(
        words=_words(codes),
        scales=_scales(weight.scales, weight.group_size),
        order=None if natural else order,
        out_features=weight.out_features,
        in_features=weight.in_features,
        group_size=weight.group_size,
    )


def pair_w4(first: PackedW4, second: PackedW4) -> PackedW4:
    """Lay two packed weights of one input out as one: tiles of 8 outputs of the first and 8 of the second.

    Args:
        first: w1.
        second: w3; of the same sizes and order.

    Returns:
        The packed pair; `out_features` counts both.
    """
    assert first.words.shape == second.words.shape and first.out_features == second.out_features
    low = 0x0F0F0F0F  # the nibbles of outputs g; those of g + 8 are the others
    words = torch.stack(
        [
            (first.words & low) | ((second.words & low) << 4),
            ((first.words >> 4) & low) | (((second.words >> 4) & low) << 4),
        ],
        dim=1,
    )
    scales = torch.stack([first.scales, second.scales], dim=-1)  # tile step g group half weight
    words = words.flatten(0, 1)[: first.out_features // 8].contiguous()
    scales = scales.movedim(-2, 1).flatten(0, 1)[: first.out_features // 8].contiguous()
    return PackedW4(
        words=words,
        scales=scales,
        order=first.order,
        out_features=2 * first.out_features,
        in_features=first.in_features,
        group_size=first.group_size,
    )


def _words(codes: Tensor) -> Tensor:
    """uint8 [M, K], inputs sorted -> int32 [P/16, K/128, 2, 32, 4]; padded outputs are weights of zero."""
    codes = F.pad(codes, (0, 0, 0, -codes.shape[0] % TILE), value=8)
    tiles, steps = codes.shape[0] // TILE, codes.shape[1] // STEP_W4
    words = torch.empty(tiles, steps, 2, 32, 4, dtype=torch.int32, device=codes.device)
    chunk = max(1, (1 << 24) // (TILE * codes.shape[1]))  # the nibbles take 4 bytes each for a moment
    for start in range(0, tiles, chunk):
        part = codes[start * TILE : (start + chunk) * TILE]
        # outputs (tile, high, g), inputs (step, half, q, t, s, r, p)
        nibbles = part.view(-1, 2, 8, steps, 2, 2, 4, 2, 2, 2).to(torch.int32)
        nibbles = nibbles.permute(0, 3, 4, 2, 6, 5, 7, 9, 8, 1)  # tile step half g t q s p r high
        shifts = torch.arange(8, device=codes.device, dtype=torch.int32) * 4
        packed = (nibbles.flatten(-3) << shifts).sum(-1, dtype=torch.int32)  # distinct bits: the sum is their union
        words[start : start + chunk] = packed.flatten(5, 6).flatten(3, 4)
    return words


def _scales(scales: Tensor, group_size: int) -> Tensor:
    """[G, M] -> [P/16, K/128, 8, 128/group_size, 2]."""
    scales = F.pad(scales, (0, -scales.shape[1] % TILE))
    per_step = STEP_W4 // group_size
    split = scales.view(-1, per_step, scales.shape[1] // TILE, 2, 8)  # step group tile high g
    return split.permute(2, 0, 4, 1, 3).contiguous()


def unpack_w4(packed: PackedW4) -> Tensor:
    """Compute the weight that a packed one stands for, in plain PyTorch.

    Args:
        packed: The packed weight.

    Returns:
        float32 [M, K], inputs in the order of the layout (`order`).
    """
    tiles, steps = packed.words.shape[:2]
    shifts = torch.arange(8, device=packed.words.device, dtype=torch.int32) * 4
    nibbles = (packed.words[..., None] >> shifts) & 15
    split = nibbles.view(tiles, steps, 2, 8, 4, 2, 2, 2, 2, 2)  # tile step half g t q s p r high
    codes = split.permute(0, 9, 3, 1, 2, 5, 4, 6, 8, 7).reshape(tiles * TILE, -1)
    scales = packed.scales.permute(0, 4, 2, 1, 3).reshape(tiles * TILE, -1)
    wide = scales.float().repeat_interleave(packed.group_size, dim=1)
    return ((codes - 8) * wide)[: packed.out_features]
