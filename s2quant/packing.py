"""GPTQ's storage of a quantized weight: integer codes in int32 words, and back.

The only file that knows GPTQ's bit order and that format "gptq" (v1) stores every zero point minus one.

Codes form one stream of bits per column, lowest bit first, cut into 32-bit words: `qweight` runs along the
inputs, `qzeros` along the outputs. With 2, 4 and 8 bits a word holds 16, 8 or 4 values; with 3 bits, 32 values
fill 3 words and the values 10 and 21 straddle two of them. A weight is `(code - zero) * scale`, where zero and
scale belong to the input's group, `g_idx[k]`. Only the symmetric grid is accepted, zero = 2^(bits-1): stored as
0x88888888 in "gptq_v2" and 0x77777777 in "gptq" for 4 bits. Which one a file is can be told from those words.

Legend: M outputs, K inputs, G groups of `group_size` inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from s2quant.errors import UserError, shorten_list

Format = Literal["gptq", "gptq_v2"]

BITS = (2, 3, 4, 8)
WORD_BITS = 32
SCALE_DTYPES = (torch.float16, torch.bfloat16)
TENSOR_NAMES = ("qweight", "qzeros", "scales", "g_idx")
_CHUNK_VALUES = 1 << 19  # what a CPU's caches hold
_CHUNK_VALUES_GPU = 1 << 24


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """One quantized linear, unpacked.

    Args:
        codes: uint8 [M, K], each below 2^bits, inputs in their natural order.
        scales: float16 or bfloat16 [G, M], as stored.
        zeros: uint8 [G, M], the true zero point: 2^(bits-1).
        g_idx: int32 [K], the group of each input; each group occurs `group_size` times.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int
    group_size: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, those of the widest elements first."""
        return {name: getattr(self, name) for name in ("g_idx", "scales", "codes", "zeros")}

    @property
    def out_features(self) -> int:
        """Number of outputs, M."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Number of inputs, K."""
        return self.codes.shape[1]

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Move to a device.

        Args:
            device: Where the tensors shall be.

        Returns:
            The same weight there.
        """
        return replace(self, **{name: getattr(self, name).to(device) for name in ("codes", "scales", "zeros", "g_idx")})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute the weight that the codes stand for; the product is taken in float32, so fp16 cannot overflow.

        Args:
            dtype: Type of the result.

        Returns:
            `dtype` [M, K], on the device of the codes.
        """
        out = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        group = self.g_idx.long()
        chunk = _CHUNK_VALUES_GPU if self.codes.is_cuda else _CHUNK_VALUES
        step = max(1, chunk // max(1, self.in_features))  # a few rows at a time keep the temporaries small
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            scale = self.scales[:, rows].float().T.contiguous().index_select(1, group)  # [m, K]
            zero = self.zeros[:, rows].float().T.contiguous().index_select(1, group)
            out[rows] = (self.codes[rows].float() - zero).mul_(scale)
        return out


def packed_shapes(
    out_features: int, in_features: int, bits: int, group_size: int, name: str = "sizes of a packed linear"
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Say what tensors a packed linear has.

    Args:
        out_features: Outputs, M.
        in_features: Inputs, K.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; divides K.
        name: How messages name it.

    Returns:
        Tensor name to (dtype, shape); for scales float16, though bfloat16 is read and kept as well.

    Raises:
        UserError: The sizes do not fill whole groups and words; every fault is listed.
    """
    _refuse(_size_faults(out_features, in_features, bits, group_size), name)
    groups = in_features // group_size
    return {
        "qweight": (torch.int32, (in_features * bits // WORD_BITS, out_features)),
        "qzeros": (torch.int32, (groups, out_features * bits // WORD_BITS)),
        "scales": (torch.float16, (groups, out_features)),
        "g_idx": (torch.int32, (in_features,)),
    }


def packed_bytes(out_features: int, in_features: int, bits: int, group_size: int) -> int:
    """Count the bytes of a packed linear: qweight, qzeros, 16-bit scales and g_idx together.

    Args:
        out_features: Outputs, M.
        in_features: Inputs, K.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; divides K.

    Returns:
        Bytes.
    """
    shapes = packed_shapes(out_features, in_features, bits, group_size).values()
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes)


def pack(
    weight: QuantizedWeight, checkpoint_format: Format = "gptq", name: str = "quantized weight"
) -> dict[str, Tensor]:
    """Pack a weight into the tensors of a GPTQ checkpoint.

    Args:
        weight: The weight; on CPU or GPU.
        checkpoint_format: "gptq" stores zero - 1, "gptq_v2" stores zero.
        name: How messages name it.

    Returns:
        qweight int32 [K*bits/32, M], qzeros int32 [G, M*bits/32], scales [G, M] as they are, g_idx int32 [K];
        contiguous, on the weight's device.

    Raises:
        UserError: The weight is malformed (every fault is listed) or the format unknown.
    """
    _check_format(checkpoint_format)
    _refuse(_weight_faults(weight), name)
    stored = weight.zeros - 1 if checkpoint_format == "gptq" else weight.zeros
    return {
        "qweight": _pack_rows(weight.codes.T, weight.bits),
        "qzeros": _pack_rows(stored.T, weight.bits).T.contiguous(),
        "scales": weight.scales.contiguous(),
        "g_idx": weight.g_idx.contiguous(),
    }


def unpack(
    tensors: Mapping[str, Tensor],
    bits: int,
    group_size: int,
    checkpoint_format: Format | None = None,
    name: str = "quantized linear",
) -> QuantizedWeight:
    """Read a weight from the tensors of a GPTQ checkpoint; the inverse of `pack`.

    Args:
        tensors: Exactly qweight, qzeros, scales and g_idx.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale.
        checkpoint_format: What the checkpoint's config says, to be checked; None tells it from qzeros.
        name: How messages name it.

    Returns:
        The weight, on the device of the tensors; scales keep their dtype.

    Raises:
        UserError: A tensor is missing, left over, or of the wrong dtype or shape, g_idx is no grouping, a scale is
            not finite (every fault is listed), the zero points are not those of the symmetric grid, or they
            contradict `checkpoint_format`.
    """
    _refuse(_tensor_faults(tensors, bits, group_size), name)
    stored = _unpack_rows(tensors["qzeros"].T, bits).T.contiguous()  # [G, M]
    found = _format_of_zeros(stored, bits, name)
    if checkpoint_format is not None:
        _check_format(checkpoint_format)
        if found != checkpoint_format:
            raise UserError(
                f"{name}: qzeros of format {found!r} in a checkpoint that says {checkpoint_format!r}",
                "zero points as the checkpoint's format stores them; read as they are, every weight is off by a step",
                f"write checkpoint_format {found!r} into quantize_config.json and config.json if the tensors are right",
            )
    return QuantizedWeight(
        codes=_unpack_rows(tensors["qweight"], bits).T.contiguous(),
        scales=tensors["scales"],
        zeros=stored + 1 if found == "gptq" else stored,
        g_idx=tensors["g_idx"],
        bits=bits,
        group_size=group_size,
    )


def split_rows(weight: QuantizedWeight, sizes: Sequence[int]) -> list[QuantizedWeight]:
    """Split a weight along its outputs, as q, k and v out of wqkv.

    Args:
        weight: The weight.
        sizes: Outputs of each part, in order; they add up to M.

    Returns:
        The parts, views of the weight's tensors; all have its g_idx.
    """
    assert sum(sizes) == weight.out_features, (sizes, weight.out_features)
    parts = zip(
        weight.codes.split(list(sizes), dim=0),
        weight.scales.split(list(sizes), dim=1),
        weight.zeros.split(list(sizes), dim=1),
        strict=True,
    )
    return [replace(weight, codes=codes, scales=scales, zeros=zeros) for codes, scales, zeros in parts]


def symmetric_zero(bits: int) -> int:
    """Give the zero point of the symmetric grid.

    Args:
        bits: Bits per weight.

    Returns:
        2^(bits-1).
    """
    return 1 << (bits - 1)


def _period(bits: int) -> tuple[int, int]:
    """Give the smallest number of values that fill whole words, and that number of words."""
    values = WORD_BITS // math.gcd(WORD_BITS, bits)
    return values, values * bits // WORD_BITS


def _pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 [R, C] along its rows into int32 [R*bits/32, C]."""
    period, words = _period(bits)
    blocks = values.contiguous().view(-1, period, values.shape[1])
    out = torch.zeros((blocks.shape[0], words, blocks.shape[2]), dtype=torch.int32, device=values.device)
    for j in range(period):
        word, shift = divmod(j * bits, WORD_BITS)
        value = blocks[:, j].to(torch.int32)
        out[:, word] |= value << shift
        if shift + bits > WORD_BITS:
            out[:, word + 1] |= value >> (WORD_BITS - shift)
    return out.view(-1, values.shape[1])


def _unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Unpack int32 [R*bits/32, C] into uint8 [R, C]."""
    period, words = _period(bits)
    blocks = packed.contiguous().view(-1, words, packed.shape[1])
    out = torch.empty((blocks.shape[0], period, blocks.shape[2]), dtype=torch.uint8, device=packed.device)
    for j in range(period):
        word, shift = divmod(j * bits, WORD_BITS)
        value = blocks[:, word] >> shift
        if shift + bits > WORD_BITS:
            low = WORD_BITS - shift  # the shift above drags the sign along: keep the bits that are ours
            value = (value & ((1 << low) - 1)) | (blocks[:, word + 1] << low)
        out[:, j] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return out.view(-1, packed.shape[1])


def _format_of_zeros(stored: Tensor, bits: int, name: str) -> Format:
    """Tell the format from stored zero points, uint8 of any shape."""
    zero = symmetric_zero(bits)
    if stored.numel() and bool((stored == zero).all()):
        return "gptq_v2"
    if stored.numel() and bool((stored == zero - 1).all()):
        return "gptq"
    seen = ", ".join(str(value) for value in stored.unique().tolist()[:8])
    raise UserError(
        f"{name}: stored zero points {seen or '(none)'}",
        f"all {zero - 1} (format gptq) or all {zero} (format gptq_v2); an asymmetric grid is not supported",
        "quantize with sym: true, or check that the file is whole",
    )


def _check_format(found: str) -> None:
    if found not in ("gptq", "gptq_v2"):
        raise UserError(f"checkpoint_format {found!r}", "'gptq' or 'gptq_v2'", "use a GPTQ checkpoint of these formats")


def _refuse(faults: Sequence[str], name: str) -> None:
    if faults:
        raise UserError(
            f"{name}:\n{shorten_list(faults)}",
            "a GPTQ weight: 2, 3, 4 or 8 bits, symmetric, whole groups and words",
            "check the sizes and settings it was quantized with, and that the file is whole",
        )


def _size_faults(out_features: int, in_features: int, bits: int, group_size: int) -> list[str]:
    if bits not in BITS:
        return [f"bits is {bits!r}, not one of {BITS}"]
    faults = []
    period = _period(bits)[0]
    if out_features < 1 or out_features % period:
        faults.append(f"{out_features} outputs, not a positive multiple of {period} ({bits}-bit words)")
    if in_features < 1 or in_features % period:
        faults.append(f"{in_features} inputs, not a positive multiple of {period} ({bits}-bit words)")
    if group_size < 1 or in_features % group_size:
        faults.append(f"{in_features} inputs, not a multiple of group_size {group_size}")
    return faults


def _value_faults(g_idx: Tensor, scales: Tensor, group_size: int) -> list[str]:
    """List what is wrong with the values of g_idx and scales, their shapes being right."""
    faults = []
    groups = scales.shape[0]
    outside = int(((g_idx < 0) | (g_idx >= groups)).sum())
    if outside:
        faults.append(
            f"g_idx: {outside} values outside 0..{groups - 1} (from {int(g_idx.min())} to {int(g_idx.max())})"
        )
    else:
        counts = torch.bincount(g_idx, minlength=groups)
        wrong = (counts != group_size).nonzero().flatten()
        if wrong.numel():
            first = int(wrong[0])
            faults.append(
                f"g_idx: {wrong.numel()} of {groups} groups do not have {group_size} inputs"
                f" (group {first} has {int(counts[first])})"
            )
    bad = scales.numel() - int(torch.isfinite(scales).sum())
    if bad:
        faults.append(f"scales: {bad} values are not finite")
    return faults


def _shape_faults(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> list[str]:
    faults = []
    for name, (dtype, shape) in wanted.items():
        tensor = tensors[name]
        dtypes = SCALE_DTYPES if name == "scales" else (dtype,)
        if tensor.dtype not in dtypes:
            faults.append(f"{name} is {tensor.dtype}, not {' or '.join(str(allowed) for allowed in dtypes)}")
        if tuple(tensor.shape) != shape:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    devices = sorted({str(tensors[name].device) for name in wanted})
    if len(devices) > 1:
        faults.append(f"tensors on several devices: {', '.join(devices)}")
    return faults


def _tensor_faults(tensors: Mapping[str, Tensor], bits: int, group_size: int) -> list[str]:
    """List what is wrong with packed tensors, but for the zero points."""
    faults = [f"{name} is missing" for name in TENSOR_NAMES if name not in tensors]
    faults += [f"{name} is left over" for name in tensors if name not in TENSOR_NAMES]
    if faults:
        return faults
    out_features, in_features = tensors["qweight"].shape[-1], tensors["g_idx"].shape[-1]
    faults = _size_faults(out_features, in_features, bits, group_size)
    faults = faults or _shape_faults(tensors, packed_shapes(out_features, in_features, bits, group_size))
    return faults or _value_faults(tensors["g_idx"], tensors["scales"], group_size)


def _weight_faults(weight: QuantizedWeight) -> list[str]:
    """List what is wrong with an unpacked weight."""
    if weight.codes.dim() != 2:
        return [f"codes has shape {tuple(weight.codes.shape)}, not [M, K]"]
    faults = _size_faults(weight.out_features, weight.in_features, weight.bits, weight.group_size)
    if faults:
        return faults
    groups = weight.in_features // weight.group_size
    wanted = {
        "codes": (torch.uint8, (weight.out_features, weight.in_features)),
        "scales": (torch.float16, (groups, weight.out_features)),
        "zeros": (torch.uint8, (groups, weight.out_features)),
        "g_idx": (torch.int32, (weight.in_features,)),
    }
    faults = _shape_faults({name: getattr(weight, name) for name in wanted}, wanted)
    if faults:
        return faults
    faults = _value_faults(weight.g_idx, weight.scales, weight.group_size)
    largest = int(weight.codes.max())
    if largest >= 1 << weight.bits:
        faults.append(f"codes reach {largest}, {weight.bits} bits hold 0..{(1 << weight.bits) - 1}")
    if not bool((weight.zeros == symmetric_zero(weight.bits)).all()):
        faults.append(f"zeros are not all {symmetric_zero(weight.bits)}: an asymmetric grid is not supported")
    return faults
