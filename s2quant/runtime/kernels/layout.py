"""Where the codes of a 4-bit or 8-bit weight go for the matrix-vector kernel.

Legend: M outputs, K inputs, G groups, P outputs padded to whole tiles of 16.

Inputs are sorted by group once (`order`), so that the groups of an act-order weight are contiguous; whoever makes
the kernel's x writes it in that order (`place`). Word order, from the slowest: tile of 16 outputs, step of 128
inputs, part of the step (4 bits: two of 64, 8 bits: four of 32), lane (32), word (4). Lane 4 g + t has outputs g and
g + 8 and inputs 8 t .. 8 t + 7 of each 32.

4 bits: word 2 q + s has inputs 4 s .. 4 s + 3 of those, in the q-th 32 of the part; in it, nibble 4 p + n belongs to
output g + 8 (n % 2) and input 2 (n // 2) + p of the four.
8 bits: word 2 s + n has inputs 4 s + 2 n and 4 s + 2 n + 1; in it, byte 2 p + h belongs to output g + 8 h and input p
of the two. The highest bit of a byte is stored inverted: what the loop wants (`s2quant.runtime.kernels.ptx`).

So two inputs that meet in one register are 16 bits apart. Scales: tile, step, g, group of the step, output g or g + 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from s2quant.packing import QuantizedWeight
from s2quant.runtime.kernels.ptx import STEP, TILE, Kind

STEP_INPUTS = STEP["w4"]  # and of "w8"
KINDS: dict[int, Kind] = {4: "w4", 8: "w8"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A symmetric 4-bit or 8-bit weight as the kernel reads it.

    Args:
        words: int32 [P/16, K/128, bits/2, 32, 4].
        scales: float16 or bfloat16 [P/16, K/128, 8, 128/group_size, 2].
        order: int64 [K], the input that stands at each place; None when they stand in their natural order.
        out_features: M.
        in_features: K.
        group_size: Inputs per scale.
        bits: 4 or 8.
    """

    words: Tensor
    scales: Tensor
    order: Tensor | None
    out_features: int
    in_features: int
    group_size: int
    bits: int = 4

    @property
    def kind(self) -> Kind:
        """The kernel's name of it."""
        return KINDS[self.bits]

    @property
    def place(self) -> Tensor | None:
        """int32 [K], the place of each input; None when every input stands at its own."""
        if self.order is None:
            return None
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order), device=self.order.device)
        return place.to(torch.int32)


def layout_obstacle(weight: QuantizedWeight) -> str | None:
    """Say why the kernel's layout cannot hold a weight.

    Args:
        weight: The quantized weight.

    Returns:
        The reason, or None when it can.
    """
    if weight.bits not in KINDS:
        return f"{weight.bits} bits, not 4 or 8"
    if weight.group_size not in (32, 64, 128):
        return f"group size {weight.group_size}, not 32, 64 or 128"
    if weight.in_features % STEP_INPUTS:
        return f"{weight.in_features} inputs, not a multiple of {STEP_INPUTS}"
    if weight.out_features % 8:
        return f"{weight.out_features} outputs, not a multiple of 8"
    return None


def pack(weight: QuantizedWeight) -> Packed:
    """Lay a weight out for the kernel.

    Args:
        weight: A weight that `layout_obstacle` does not refuse.

    Returns:
        The packed weight, on the same device.
    """
    obstacle = layout_obstacle(weight)
    assert obstacle is None, obstacle
    order = torch.argsort(weight.g_idx, stable=True)
    natural = bool((order == torch.arange(len(order), device=order.device)).all())
    codes = weight.codes if natural else weight.codes[:, order]
    return Packed(
        words=_words_w4(codes) if weight.bits == 4 else _words_w8(codes),
        scales=_scales(weight.scales, weight.group_size),
        order=None if natural else order,
        out_features=weight.out_features,
        in_features=weight.in_features,
        group_size=weight.group_size,
        bits=weight.bits,
    )


def pair(first: Packed, second: Packed) -> Packed:
    """Lay two packed weights of one input out as one: tiles of 8 outputs of the first and 8 of the second.

    Args:
        first: w1.
        second: w3; of the same sizes and order.

    Returns:
        The packed pair; `out_features` counts both.
    """
    assert first.words.shape == second.words.shape and first.out_features == second.out_features
    assert (first.bits, first.group_size) == (second.bits, second.group_size)
    bits = first.bits
    low = {4: 0x0F0F0F0F, 8: 0x00FF00FF}[bits]  # the codes of outputs g; those of g + 8 are the others
    words = torch.stack(
        [
            (first.words & low) | ((second.words & low) << bits),
            ((first.words >> bits) & low) | (((second.words >> bits) & low) << bits),
        ],
        dim=1,
    )
    scales = torch.stack([first.scales, second.scales], dim=-1)  # tile step g group half weight
    words = words.flatten(0, 1)[: first.out_features // 8].contiguous()
    scales = scales.movedim(-2, 1).flatten(0, 1)[: first.out_features // 8].contiguous()
    return Packed(
        words=words,
        scales=scales,
        order=first.order,
        out_features=2 * first.out_features,
        in_features=first.in_features,
        group_size=first.group_size,
        bits=first.bits,
    )


def with_outputs(packed: Packed, order: Tensor) -> Packed:
    """Put the outputs of a pair into another order.

    Args:
        packed: What `pair` gave.
        order: int64 [M/2], the output of w1, and of w3, that shall stand at each place.

    Returns:
        The same pair, its tiles of other outputs.
    """
    words = packed.words.unflatten(3, (8, 4)).movedim(3, 1)  # tile g step part t word
    scales = packed.scales.movedim(2, 1)  # tile g step group weight
    words, scales = (part.flatten(0, 1)[order].unflatten(0, (-1, 8)) for part in (words, scales))
    return replace(packed, words=words.movedim(1, 3).flatten(3, 4), scales=scales.movedim(1, 2).contiguous())


def arranged(values: Tensor, kind: Kind) -> Tensor:
    """Put inputs into the order in which many rows of x are multiplied: side by side what one shift unpacks.

    Args:
        values: [..., K], in the order of the layout.
        kind: Of the weight.

    Returns:
        [..., K]; of each 128 inputs first those of the lowest code of every word.
    """
    if kind == "bf16":
        return values
    if kind == "w4":  # step half q t s r p -> step r p half q t s
        ordered = values.reshape(-1, 2, 2, 4, 2, 2, 2).permute(0, 5, 6, 1, 2, 3, 4)
    else:  # step q t s n p -> step p q s t n
        ordered = values.reshape(-1, 4, 4, 2, 2, 2).permute(0, 5, 1, 3, 2, 4)
    return ordered.reshape(values.shape)


def arranged_place(place: Tensor | None, kind: Kind, in_features: int, device: torch.device) -> Tensor | None:
    """Say where each input stands for many rows of x.

    Args:
        place: int32 [K], where it stands in the order of the layout; None: in order.
        kind: Of the weight.
        in_features: K.
        device: Where the result is wanted.

    Returns:
        int32 [K]; None: in order.
    """
    if kind == "bf16":
        return place
    moved = torch.argsort(arranged(torch.arange(in_features, device=device), kind)).to(torch.int32)
    return moved if place is None else moved[place.long()]


def first_outputs(packed: Packed, out_features: int) -> Packed:
    """Keep the first outputs.

    Args:
        packed: The packed weight, no pair.
        out_features: How many, a multiple of 16.

    Returns:
        The smaller weight, views of the tensors.
    """
    assert out_features % TILE == 0 and out_features <= packed.out_features, (out_features, packed.out_features)
    tiles = out_features // TILE
    return replace(packed, words=packed.words[:tiles], scales=packed.scales[:tiles], out_features=out_features)


def _words_w4(codes: Tensor) -> Tensor:
    """uint8 [M, K], inputs sorted -> int32 [P/16, K/128, 2, 32, 4]; padded outputs are weights of zero."""
    codes = F.pad(codes, (0, 0, 0, -codes.shape[0] % TILE), value=8)
    tiles, steps = codes.shape[0] // TILE, codes.shape[1] // STEP_INPUTS
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


def _words_w8(codes: Tensor) -> Tensor:
    """uint8 [M, K], inputs sorted -> int32 [P/16, K/128, 4, 32, 4]; padded outputs are weights of zero."""
    codes = F.pad(codes, (0, 0, 0, -codes.shape[0] % TILE), value=128) ^ 128
    tiles, steps = codes.shape[0] // TILE, codes.shape[1] // STEP_INPUTS
    split = codes.view(tiles, 2, 8, steps, 4, 4, 2, 2, 2)  # outputs (tile, high, g), inputs (step, q, t, s, n, p)
    split = split.permute(0, 3, 4, 2, 5, 6, 7, 8, 1)  # tile step q g t s n p high
    # little-endian: byte 2 p + high is the bits from 16 p + 8 high on
    words = split.flatten(-2).contiguous().view(torch.int32)
    return words.view(tiles, steps, 4, 32, 4)


def _scales(scales: Tensor, group_size: int) -> Tensor:
    """[G, M] -> [P/16, K/128, 8, 128/group_size, 2]."""
    scales = F.pad(scales, (0, -scales.shape[1] % TILE))
    per_step = STEP_INPUTS // group_size
    split = scales.view(-1, per_step, scales.shape[1] // TILE, 2, 8)  # step group tile high g
    return split.permute(2, 0, 4, 1, 3).contiguous()
