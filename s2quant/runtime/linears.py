"""Linears that multiply with quantized weights, behind one interface.

Legend: M out_features, K in_features, G groups.

`make_linear` picks a backend and says which in `.backend`:

- "reference": dequantizes at every call; exact, any bits, any device; slow.
- "int4": torch's own 4-bit kernels (CPU: `_weight_int4pack_mm_for_cpu`; CUDA: `_weight_int4pack_mm`), bf16
  arithmetic, scales rounded to bf16. Channels are sorted into contiguous groups once, so act order costs one
  gather of the activations.

- "triton": our own kernels on a Hopper GPU (`s2quant.runtime.triton_linear`), which the fast decoder's fused frame
  needs; as exact as "reference" but for the order of the sums.

"auto" means int4 where its kernel takes the shape and the model runs in bf16, the reference otherwise; a
backend that is asked for by name and cannot do it is an error.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.errors import UserError
from s2quant.packing import QuantizedWeight

Backend = Literal["auto", "reference", "int4", "triton"]
BACKENDS = ("auto", "reference", "int4", "triton")


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


class Int4Linear(QuantizedLinear):
    """torch's packed 4-bit kernel.

    Args:
        weight: A symmetric 4-bit weight whose shape passes `int4_obstacle`.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__(weight, "int4")
        device = weight.codes.device
        order = torch.argsort(weight.g_idx, stable=True)
        codes = weight.codes[:, order]
        scales = weight.scales.to(torch.bfloat16)  # [G, M]
        self.is_cuda = device.type == "cuda"
        self.order: Tensor | None
        self.packed: Tensor
        self.scales_and_zeros: Tensor
        sorted_already = bool((order == torch.arange(len(order), device=device)).all())
        self.register_buffer("order", None if sorted_already else order, persistent=False)
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


def int4_obstacle(weight: QuantizedWeight) -> str | None:
    """Say why torch's 4-bit kernel cannot take a weight.

    Args:
        weight: The quantized weight.

    Returns:
        The reason, or None when it can.
    """
    out_features, in_features = weight.codes.shape
    device = weight.codes.device.type
    if device not in ("cpu", "cuda"):
        return f"no 4-bit kernel for {device}"
    if weight.bits != 4:
        return f"{weight.bits} bits, not 4"
    if weight.group_size not in (32, 64, 128, 256):
        return f"group size {weight.group_size}, not 32, 64, 128 or 256"
    multiple = 8 if device == "cuda" else 16
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
        backend: "auto", "reference", "int4" or "triton"; auto in bf16 is triton on a Hopper GPU, else int4, where they
            take the weight, and otherwise the reference.

    Returns:
        The linear; `.backend` names what was chosen.

    Raises:
        UserError: The backend is unknown or cannot take this weight.
    """
    if backend not in BACKENDS:
        raise UserError(f"linear backend {backend!r}", f"one of {', '.join(BACKENDS)}", "name one of these")
    if backend == "triton" or (backend == "auto" and dtype == torch.bfloat16 and _is_triton_best(weight)):
        return _triton_linear(weight)
    obstacle = int4_obstacle(weight)
    if backend == "int4" and obstacle:
        raise UserError(f"the int4 backend: {obstacle}", "a weight its kernel takes", "use the reference backend")
    if backend == "reference" or obstacle or (backend == "auto" and dtype != torch.bfloat16):
        return ReferenceLinear(weight)
    return Int4Linear(weight)


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
