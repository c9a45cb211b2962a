"""Linears that multiply with quantized weights, behind one interface.

Legend: M out_features, K in_features, G groups.

`make_linear` picks a backend and says which in `.backend`:

- "reference": dequantizes at every call; exact, any bits, any device; slow.
- "dense": dequantizes once, when it is made: the reference's numbers at the speed and memory of a linear that is not
  quantized.
- "int4": torch's own 4-bit kernels (CPU: `_weight_int4pack_mm_for_cpu`; CUDA: `_weight_int4pack_mm`), bf16
  arithmetic, scales rounded to bf16. Channels are sorted into contiguous groups once, so act order costs one
  gather of the activations.
- "int8": 8 bits through the same kernel on a CPU with AVX-512 (`s2quant.runtime.int8`), scales rounded to bf16.
- "triton": our own kernels on a Hopper GPU (`s2quant.runtime.triton_linear`), which the fast decoder's fused frame
  needs; as exact as "reference" but for the order of the sums.

"auto" in bf16 means the first of triton (on a Hopper GPU), int4 and int8 whose kernel takes the weight; where none
does, dense on a CPU, since dequantizing costs many times the product of few rows, and the reference on a GPU. In any
other dtype it means the reference. A backend that is asked for by name and cannot do it is an error.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.errors import UserError
from s2quant.packing import QuantizedWeight

Backend = Literal["auto", "reference", "dense", "int4", "int8", "triton"]
BACKENDS = ("auto", "reference", "dense", "int4", "int8", "triton")


class QuantizedLinear(nn.Module):
    """What every backend offers: the call of `nn.Linear` without bias.

    Args:
        weight: The quantized weight.
        backend: The backend's name.
    """

    def __init__(self, weight: QuantizedWeight, backend: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.group_size, self.backend = weight.bits, weight.group_size, backend

    def extra_repr(self) -> str:
        """Describe the module in a model's printout."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, backend={self.backend}"


class ReferenceLinear(QuantizedLinear):
    """Dequantize, then multiply: exact in the activations' dtype.

    Args:
        weight: The quantized weight.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight, "reference")
        self._weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: [..., K], any floating dtype, on the weight's device.

        Returns:
            [..., M] in x's dtype.
        """
        return F.linear(x, self._weight.dequantize(x.dtype))


class DenseLinear(QuantizedLinear):
    """Dequantize once: the reference's product, bit for bit, in one dtype.

    Args:
        weight: The quantized weight.
        dtype: Of the products.
    """

    weight: Tensor

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, "dense")
        self.register_buffer("weight", weight.dequantize(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the weight's dtype.

        Args:
            x: [..., K], any floating dtype, on the weight's device.

        Returns:
            [..., M] in x's dtype.
        """
        return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


class Int4Linear(QuantizedLinear):
    """torch's packed 4-bit kernel.

    Args:
        weight: A symmetric 4-bit weight whose shape passes `int4_obstacle`.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight, "int4")
        order = sorted_order(weight)
        codes = weight.codes if order is None else weight.codes[:, order]
        scales = weight.scales.to(torch.bfloat16)  # [G, M]
        self.is_cuda = weight.codes.device.type == "cuda"
        self.order: Tensor | None
        self.packed: Tensor
        self.scales_and_zeros: Tensor
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("packed", _pack_for_kernel(codes, self.is_cuda), persistent=False)
        pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()  # w = (code - 8) * scale + 0
        self.register_buffer("scales_and_zeros", pairs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in bf16.

        Args:
            x: [..., K], any floating dtype.

        Returns:
            [..., M] in x's dtype.
        """
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        if self.order is not None:
            rows = rows[:, self.order]
        kernel = torch.ops.aten._weight_int4pack_mm if self.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        out = kernel(rows.contiguous(), self.packed, self.group_size, self.scales_and_zeros)
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)


def _pack_for_kernel(codes: Tensor, is_cuda: bool) -> Tensor:
    if not is_cuda:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).contiguous(), 1)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()  # uint8 [M, K/2], even channel in the high nibble
    return torch.ops.aten._convert_weight_to_int4pack(pairs, _inner_k_tiles(codes.shape[1]))


def _inner_k_tiles(in_features: int) -> int:
    return next(tiles for tiles in (8, 4, 2) if in_features % (tiles * 16) == 0)


def sorted_order(weight: QuantizedWeight) -> Tensor | None:
    """Say how inputs are sorted into contiguous groups.

    Args:
        weight: The quantized weight.

    Returns:
        int64 [K], the input at each place; None where they are sorted already.
    """
    order = torch.argsort(weight.g_idx, stable=True)
    return None if torch.equal(order, torch.arange(len(order), device=order.device)) else order


def int4_obstacle(weight: QuantizedWeight) -> str | None:
    """Say why torch's 4-bit kernel cannot take a weight.

    Args:
        weight: The quantized weight.

    Returns:
        The reason, or None when it can.
    """
    device = weight.codes.device.type
    if device not in ("cpu", "cuda"):
        return f"no 4-bit kernel for {device}"
    if weight.bits != 4:
        return f"{weight.bits} bits, not 4"
    return int4_shape_obstacle(weight, 8 if device == "cuda" else 16)


def int4_shape_obstacle(weight: QuantizedWeight, multiple: int) -> str | None:
    """Say why torch's 4-bit kernel cannot take a weight of this shape.

    Args:
        weight: The quantized weight.
        multiple: What its outputs must be a multiple of.

    Returns:
        The reason, or None when it can.
    """
    out_features, in_features = weight.codes.shape
    if weight.group_size not in (32, 64, 128, 256):
        return f"group size {weight.group_size}, not 32, 64, 128 or 256"
    if out_features % multiple:
        return f"{out_features} outputs, not a multiple of {multiple}"
    if in_features % 32:
        return f"{in_features} inputs, not a multiple of 32"
    return None


def make_linear(weight: QuantizedWeight, dtype: torch.dtype, backend: Backend = "auto") -> QuantizedLinear:
    """Build the linear for a quantized weight on the weight's device.

    Args:
        weight: The quantized weight, already on its device.
        dtype: The model's dtype.
        backend: One of `BACKENDS`; the module's head says what auto is.

    Returns:
        The linear; `.backend` names what was chosen.

    Raises:
        UserError: The backend is unknown or cannot take this weight.
    """
    if backend not in BACKENDS:
        raise UserError(f"linear backend {backend!r}", f"one of {', '.join(BACKENDS)}", "name one of these")
    chosen = _best(weight, dtype) if backend == "auto" else backend
    if chosen == "triton":
        return _triton_linear(weight)
    if chosen == "int4":
        _refuse(int4_obstacle(weight), "int4", "use the reference backend")
        return Int4Linear(weight)
    if chosen == "int8":
        from s2quant.runtime.int8 import Int8Linear, int8_obstacle

        _refuse(int8_obstacle(weight), "int8", "use the dense backend")
        return Int8Linear(weight)
    return DenseLinear(weight, dtype) if chosen == "dense" else ReferenceLinear(weight)


def _best(weight: QuantizedWeight, dtype: torch.dtype) -> Backend:
    """Choose the backend of "auto"."""
    from s2quant.runtime.int8 import int8_obstacle

    if dtype != torch.bfloat16:
        return "reference"
    if _is_triton_best(weight):
        return "triton"
    if int4_obstacle(weight) is None:
        return "int4"
    if weight.codes.device.type != "cpu":
        return "reference"
    return "int8" if int8_obstacle(weight) is None else "dense"


def _refuse(obstacle: str | None, backend: str, todo: str) -> None:
    if obstacle:
        raise UserError(f"the {backend} backend: {obstacle}", "a weight its kernel takes", todo)


def _is_triton_best(weight: QuantizedWeight) -> bool:
    """Whether its kernels take the weight on a GPU where they are known to be right and the fastest."""
    from s2quant.runtime.triton_linear import HOPPER, weight_obstacle

    device = weight.codes.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER[0]:
        return False
    return weight_obstacle(weight) is None


def _triton_linear(weight: QuantizedWeight) -> QuantizedLinear:
    from s2quant.runtime.kernels.layout import pack
    from s2quant.runtime.triton_linear import TritonLinear, weight_obstacle

    obstacle = weight_obstacle(weight)
    if obstacle:
        raise UserError(f"the triton backend: {obstacle}", "a weight and a GPU its kernels take", "use another backend")
    return TritonLinear(pack(weight))
