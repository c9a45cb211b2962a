"""The "triton" backend of the quantized linears: our own kernels, for a Hopper GPU.

Legend: M rows of x, N out_features, K in_features.

Up to 64 rows read the codes as they are (`s2quant.runtime.kernels.choice`); more rows make a bf16 weight for a moment
and multiply with that. Triton is imported when the first such linear is made: it is no dependency of a CPU.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.gpu import kernel_obstacle
from s2quant.packing import QuantizedWeight
from s2quant.runtime.kernels.layout import Packed, layout_obstacle
from s2quant.runtime.linears import QuantizedLinear

MOST_ROWS = 64  # of x that read the codes as they are
HOPPER = (9, 0)


def triton_obstacle(device: torch.device) -> str | None:
    """Say why the kernels cannot run on a device.

    Args:
        device: The device.

    Returns:
        The reason, or None when they can; on a CPU they can where Triton interprets them.
    """
    reason = kernel_obstacle(device)
    if reason is not None or device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return reason
    if torch.cuda.get_device_capability(device) < HOPPER:
        return "a GPU older than Hopper (compute capability 9.0)"
    return None


def weight_obstacle(weight: QuantizedWeight) -> str | None:
    """Say why the backend cannot take a weight.

    Args:
        weight: The quantized weight, on its device.

    Returns:
        The reason, or None when it can.
    """
    return layout_obstacle(weight) or triton_obstacle(weight.codes.device)


class TritonLinear(QuantizedLinear):
    """A 4-bit or 8-bit linear in the kernels' layout; what reads it in the graph of a frame is `s2quant.runtime.fused`.

    Args:
        packed: The weight.
    """

    words: Tensor
    scales: Tensor
    order: Tensor | None

    def __init__(self, packed: Packed) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self.bits, self.group_size, self.backend = packed.bits, packed.group_size, "triton"
        for name in ("words", "scales", "order"):
            self.register_buffer(name, getattr(packed, name), persistent=False)

    @property
    def packed(self) -> Packed:
        """The weight as the kernels read it."""
        return Packed(
            words=self.words,
            scales=self.scales,
            order=self.order,
            out_features=self.out_features,
            in_features=self.in_features,
            group_size=self.group_size,
            bits=self.bits,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: [..., K], any floating dtype.

        Returns:
            [..., N] in x's dtype.
        """
        from s2quant.runtime.kernels.choice import is_many, multiply, padded_rows, plan_for
        from s2quant.runtime.kernels.dequantize import dequantize
        from s2quant.runtime.kernels.launch import MEASURED
        from s2quant.runtime.kernels.layout import arranged
        from s2quant.runtime.kernels.weights import Then, Weight

        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        if self.order is not None:
            rows = rows[:, self.order]
        count = len(rows)
        if count > MOST_ROWS:
            out = F.linear(rows, dequantize(self.packed))
            return out.view(*x.shape[:-1], self.out_features).to(x.dtype)
        weight = Weight.of(self.packed)
        out = torch.empty(count, self.out_features, dtype=torch.bfloat16, device=x.device)
        if count:
            rows = arranged(rows, weight.kind) if is_many(count, MEASURED) else rows
            padded = F.pad(rows, (0, 0, 0, padded_rows(count) - count))
            plan = plan_for(weight, count, MEASURED)
            multiply(weight, padded.contiguous(), count, Then(epilogue="store", out=out), plan)
        return out.view(*x.shape[:-1], self.out_features).to(x.dtype)


class PairedFeedForward(nn.Module):
    """A SwiGLU feed-forward whose first two linears are one packed pair.

    Args:
        pair: w1 and w3, 8 outputs of each in turn.
        w2: The third linear.
        place: int64 [N], where in the pair each output stands; None: in order.
    """

    place: Tensor | None

    def __init__(self, pair: TritonLinear, w2: nn.Module, place: Tensor | None = None) -> None:
        super().__init__()
        self.pair, self.w2 = pair, w2
        self.register_buffer("place", place, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward.

        Args:
            x: [..., D].

        Returns:
            [..., D] in x's dtype.
        """
        first, second = self.pair(x).unflatten(-1, (-1, 2, 8)).unbind(-2)
        gated = F.silu(first.flatten(-2)) * second.flatten(-2)
        y: Tensor = self.w2(gated if self.place is None else gated[..., self.place])
        return y
