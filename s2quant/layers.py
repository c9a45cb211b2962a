"""The three layers that the speech model and the codec share.

Legend: B batch, T positions, D width, H heads, h head width, P table length.

RMSNorm, interleaved rotary positions and the SwiGLU feed-forward are the same maths in the Slow AR, the Fast AR
and the codec's transformers; only sizes and constants differ. Rounding is part of the contract: the rotary table
is kept in bfloat16 because the model was trained with it so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class RMSNorm(nn.Module):
    """Scale to unit root mean square in float32, cast back, then multiply by a learned weight.

    Args:
        dim: Width D of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis.

        Args:
            x: [..., D], any floating dtype.

        Returns:
            [..., D] in x's dtype.
        """
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), without biases.

    Args:
        dim: Width D of input and output.
        intermediate_size: Width of the gated middle.
    """

    def __init__(self, dim: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, intermediate_size, bias=False)
        self.w3 = nn.Linear(dim, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to each position.

        Args:
            x: [..., D].

        Returns:
            [..., D] in x's dtype.
        """
        y: Tensor = self.w2(self.gated(x))
        return y

    def gated(self, x: Tensor) -> Tensor:
        """Apply the feed-forward up to its last projection.

        Args:
            x: [..., D].

        Returns:
            [..., intermediate_size] in x's dtype, the input of `w2`.
        """
        y: Tensor = F.silu(self.w1(x)) * self.w3(x)
        return y


def rotary_table(num_positions: int, head_dim: int, base: float, device: torch.device | str = "cpu") -> Tensor:
    """Tabulate cos and sin of the rotary angles, rounded to bfloat16.

    The angle position * base**(-2j/h) is computed in float32; only its cosine and sine are rounded.

    Args:
        num_positions: Number of positions P, from 0.
        head_dim: Head width h, even.
        base: The rotary base.
        device: Where the table lives.

    Returns:
        bfloat16 [P, h/2, 2]: cosine, sine.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), 1.0 / base**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(torch.bfloat16)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs (x0, x1), (x2, x3), ... of every head, in float32.

    Args:
        x: [B, T, H, h].
        table: [T, h/2, 2] or [B, T, h/2, 2], rows of `rotary_table` at the positions of x.

    Returns:
        [B, T, H, h] in x's dtype.
    """
    assert table.shape[-3] == x.shape[1] and table.shape[-2] * 2 == x.shape[-1], (x.shape, table.shape)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.float().unsqueeze(-3).unbind(-1)  # [(B,) T, 1, h/2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


class _NoDraws(TorchFunctionMode):
    """Leaves out what fills new parameters."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Let modules be made on the meta device, to be filled from a checkpoint.

    Nothing is drawn for them: some versions of torch import their compiler for that, which takes seconds.

    Yields:
        Nothing.
    """
    with torch.device("meta"), _NoDraws():
        yield
