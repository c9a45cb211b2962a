"""The "int8" backend of the quantized linears: 8-bit codes through torch's 4-bit kernel on a CPU with AVX-512.

torch has no 8-bit kernel with groups on a CPU, but a code is two halves of 4 bits, code = 16 high + low, so that

    (code - 128) * scale = (high - 8) * 16 scale + (low - 8) * scale + 8 scale

and every term is what the 4-bit kernel computes, (half - 8) * scale + zero. The halves stand side by side as 2K inputs:
scales 16 scale and scale, zeros 0 and 8 scale, all exact in bf16 where the scale is; one call, float32 sums, one
rounding of the result. The weight stays one byte each.

One row costs half of what it costs in bf16, but the kernel's time grows with the rows. From `MANY_ROWS` on the weight
is made in bf16 for a moment, some blocks of outputs at a time, and multiplied by torch. That reads the kernel's layout:
in a block of 64 outputs n, byte [k, n] holds the codes of the outputs n (low half) and n + 32 (high half). It is no
promise of torch, so `int8_obstacle` tries it. Without AVX-512 torch's kernel is slower at one row than its bf16
product: other CPUs are refused.

Legend: M out_features, K in_features, G groups, B rows of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from s2quant.packing import QuantizedWeight
from s2quant.runtime.linears import QuantizedLinear, int4_shape_obstacle, sorted_order

BLOCK = 64  # outputs
MANY_ROWS = 40  # of x: about as fast either way
CHUNK_VALUES = 1 << 19  # weights made in bf16 at a time: they stay in the processor's caches


class Int8Linear(QuantizedLinear):
    """An 8-bit linear as two 4-bit ones side by side.

    Args:
        weight: An 8-bit weight that passes `int8_obstacle`.
    """

    order: Tensor | None
    packed: Tensor
    scales_and_zeros: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight, "int8")
        order = sorted_order(weight)
        codes = weight.codes if order is None else weight.codes[:, order]
        scales = weight.scales.to(torch.bfloat16)  # [G, M]
        pairs = torch.stack(
            [torch.cat([16 * scales, scales]), torch.cat([torch.zeros_like(scales), 8 * scales])], dim=-1
        )
        both = None if order is None else torch.cat([order, order])
        self.register_buffer("order", both, persistent=False)  # int64 [2K]: one gather, for both halves
        self.register_buffer("packed", _pack(codes), persistent=False)  # uint8 [M, K]
        self.register_buffer("scales_and_zeros", pairs, persistent=False)  # bf16 [2G, M, 2]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in bf16.

        Args:
            x: [..., K], any floating dtype.

        Returns:
            [..., M] in x's dtype.
        """
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        out = self._multiply_few(rows) if len(rows) < MANY_ROWS else self._multiply_many(rows)
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _multiply_few(self, rows: Tensor) -> Tensor:
        """Multiply bf16 [B, K] by the packed halves."""
        both = torch.cat([rows, rows], dim=1) if self.order is None else rows.index_select(1, self.order)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(both, self.packed, self.group_size, self.scales_and_zeros)

    def _multiply_many(self, rows: Tensor) -> Tensor:
        """Multiply bf16 [B, K] by some blocks of the weight at a time."""
        if self.order is not None:
            rows = rows.index_select(1, self.order[: self.in_features])
        out = rows.new_empty(len(rows), self.out_features)
        for columns in _chunks(self.out_features, self.in_features):
            blocks = rows @ self._dequantize(columns)  # [m/64, B, 64]
            out[:, columns] = blocks.transpose(0, 1).flatten(1)
        return out

    def _dequantize(self, columns: slice) -> Tensor:
        """Compute bf16 [m/64, K, 64], the weight of whole blocks of outputs, inputs in the order of their groups."""
        scales = self.scales_and_zeros[len(self.scales_and_zeros) // 2 :, columns, 0]  # [G, m]
        scales = scales.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()  # [m/64, G, 64]
        steps = _unpack(self.packed[columns]).bitwise_xor_(128).view(torch.int8)  # code - 128
        values = steps.to(torch.bfloat16).unflatten(1, (-1, self.group_size))  # exact
        return values.mul_(scales[:, :, None]).flatten(1, 2)


def _chunks(out_features: int, in_features: int) -> Iterator[slice]:
    """Cut the outputs into whole blocks, some at a time."""
    step = BLOCK * max(1, CHUNK_VALUES // (BLOCK * in_features))
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def _pack(codes: Tensor) -> Tensor:
    """Pack uint8 [M, K] as 4-bit codes [M, 2K]: uint8 [M, K]."""
    packed = torch.empty_like(codes)
    for rows in _chunks(*codes.shape):
        halves = torch.cat([codes[rows] >> 4, codes[rows] & 15], dim=1).to(torch.int32)
        packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(halves, 1)
    return packed


def _unpack(packed: Tensor) -> Tensor:
    """Read whole blocks of what `_pack` made, uint8 [m, K], as codes uint8 [m/64, K, 64]."""
    high, low = packed.view(-1, 2, packed.shape[1], BLOCK // 2).unbind(1)  # [m/64, K, 32] each
    return torch.cat([(high & 15) << 4 | (low & 15), (high & 240) | (low >> 4)], dim=-1)


@cache
def _is_layout_known() -> bool:
    """Try whether torch's layout is the one that `_unpack` reads."""
    codes = torch.arange(2 * BLOCK * 32).mul_(167).remainder_(251).to(torch.uint8).view(2 * BLOCK, 32)
    return torch.equal(_unpack(_pack(codes)), codes.view(2, BLOCK, 32).transpose(1, 2))


def int8_obstacle(weight: QuantizedWeight) -> str | None:
    """Say why the backend cannot take a weight.

    Args:
        weight: The quantized weight.

    Returns:
        The reason, or None when it can.
    """
    device, capability = weight.codes.device.type, torch.backends.cpu.get_cpu_capability()
    if device != "cpu":
        return f"a kernel for CPUs, not for {device}"
    if weight.bits != 8:
        return f"{weight.bits} bits, not 8"
    if capability != "AVX512":
        return f"torch computes with {capability} on this CPU, not with AVX512"
    if obstacle := int4_shape_obstacle(weight, BLOCK):
        return obstacle
    return None if _is_layout_known() else f"torch {torch.__version__} packs 4-bit weights in an unknown layout"
