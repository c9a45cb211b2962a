"""The codec's transformers: causal, and each query sees a fixed window of positions.

Legend: B batch, T positions, D width, H heads, h head width, W window, P remembered positions.

Query t sees keys max(0, t - W + 1) ... t. Queries are taken W at a time against the at most 2W - 1 keys they can
see, so memory grows with T and not with its square, and there is no mask of a fixed size. A `Memory` keeps each
layer's last W - 1 keys (rotated by their absolute positions) and values; the cosines of a position are computed when
it comes, so a stream may run past any table.

Facts of the reference implementation: RMSNorm eps 1e-5; rotary base 10000, adjacent pairs, a table rounded to
bfloat16; the window is applied by a boolean mask of scaled_dot_product_attention; layer scale multiplies the
attention and feed-forward branches before they are added; one last RMSNorm. It has no q/k norm and no bias.

Source: https://github.com/fishaudio/fish-speech/blob/3dd1f85/fish_speech/models/dac/modded_dac.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.codec.config import TransformerSize
from s2quant.codec.memory import Memory
from s2quant.layers import FeedForward, RMSNorm, apply_rotary

ROPE_BASE = 10000.0
NORM_EPS = 1e-5


def rotary_rows(positions: Tensor, head_dim: int) -> Tensor:
    """Compute the rows of `s2quant.layers.rotary_table` at any positions.

    Args:
        positions: int64 [B, T], below 2**24 (nine days of frames: beyond, float32 cannot count them).
        head_dim: Head width h.

    Returns:
        bfloat16 [B, T, h/2, 2]: cosine, sine.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / ROPE_BASE**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(torch.bfloat16)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, first: Tensor | None = None) -> Tensor:
    """Attend to the last W positions.

    Args:
        q: [B, T, H, h].
        k: [B, P + T, H, h]; the last T belong to the queries.
        v: [B, P + T, H, h].
        window: Positions W that a query sees, itself included.
        first: int64 [B], index of the first key that is not padding; None when all are real.

    Returns:
        [B, T, H, h].
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, ..., h]
    num_past = k.shape[2] - q.shape[2]
    outputs = []
    for start in range(0, q.shape[2], window):
        block = q[:, :, start : start + window]
        low, high = max(0, num_past + start - window + 1), num_past + start + block.shape[2]
        query = torch.arange(num_past + start, high, device=q.device)[:, None]
        key = torch.arange(low, high, device=q.device)
        mask = (key <= query) & (key > query - window)  # [queries, keys]
        if first is not None:
            mask = mask & (key >= first[:, None, None, None])  # [B, 1, queries, keys]
        outputs.append(F.scaled_dot_product_attention(block, k[:, :, low:high], v[:, :, low:high], attn_mask=mask))
    return torch.cat(outputs, dim=2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with one fused projection.

    Args:
        dim: Width D.
        head_dim: Head width h.
        window: Window W.
    """

    def __init__(self, dim: int, head_dim: int, window: int) -> None:
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, table: Tensor, first: Tensor | None, memory: Memory | None) -> Tensor:
        """Attend.

        Args:
            x: [B, T, D].
            table: Rotary rows [B or 1, T, h/2, 2].
            first: int64 [B], index of the first remembered key that is real; None without a memory.
            memory: The streams that x continues, or None.

        Returns:
            [B, T, D].
        """
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.wqkv(x).chunk(3, dim=-1))
        q, k = apply_rotary(q, table), apply_rotary(k, table)
        if memory is not None and self.window > 1:
            past = memory.buffer(self, "keys_values", (2, self.window - 1, *k.shape[2:]), k)
            k, v = torch.cat([past[:, 0], k], dim=1), torch.cat([past[:, 1], v], dim=1)
            past[:, 0].copy_(k[:, -(self.window - 1) :])
            past[:, 1].copy_(v[:, -(self.window - 1) :])
        y: Tensor = self.wo(window_attention(q, k, v, self.window, first).flatten(-2))
        return y


class LayerScale(nn.Module):
    """Multiply by a learned vector.

    Args:
        dim: Width D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last axis.

        Args:
            x: [..., D].

        Returns:
            [..., D].
        """
        return x * self.gamma


class Block(nn.Module):
    """One pre-norm transformer block.

    Args:
        dim: Width D.
        intermediate_size: Width inside the feed-forward.
        head_dim: Head width h.
        window: Window W.
    """

    def __init__(self, dim: int, intermediate_size: int, head_dim: int, window: int) -> None:
        super().__init__()
        self.attention = Attention(dim, head_dim, window)
        self.feed_forward = FeedForward(dim, intermediate_size)
        self.attention_norm = RMSNorm(dim, NORM_EPS)
        self.ffn_norm = RMSNorm(dim, NORM_EPS)
        self.attention_layer_scale = LayerScale(dim)
        self.ffn_layer_scale = LayerScale(dim)

    def forward(self, x: Tensor, table: Tensor, first: Tensor | None, memory: Memory | None) -> Tensor:
        """Apply the block.

        Args:
            x: [B, T, D].
            table: Rotary rows [B or 1, T, h/2, 2].
            first: int64 [B], index of the first remembered key that is real; None without a memory.
            memory: The streams that x continues, or None.

        Returns:
            [B, T, D].
        """
        x = x + self.attention_layer_scale(self.attention(self.attention_norm(x), table, first, memory))
        return x + self.ffn_layer_scale(self.feed_forward(self.ffn_norm(x)))


class WindowTransformer(nn.Module):
    """Blocks and a last norm, on channels-first data.

    Args:
        dim: Width D, a multiple of the head width.
        size: Depth and feed-forward width.
        head_dim: Head width h.
        window: Window W.
    """

    def __init__(self, dim: int, size: TransformerSize, head_dim: int, window: int) -> None:
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.layers = nn.ModuleList(
            [Block(dim, size.intermediate_size, head_dim, window) for _ in range(size.num_layers)]
        )
        self.norm = RMSNorm(dim, NORM_EPS)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Apply the transformer.

        Args:
            x: [B, D, T].
            memory: The streams that x continues, or None.

        Returns:
            [B, D, T].
        """
        positions = torch.arange(x.shape[-1], device=x.device)[None]  # [1, T]
        first = None
        if memory is not None:
            seen = memory.buffer(self, "seen", (), x, dtype=torch.int64)  # [B] positions before this chunk
            positions = positions + seen[:, None]
            first = self.window - 1 - seen  # remembered keys before this index are padding
            seen += x.shape[-1]
        x = x.transpose(1, 2)
        table = rotary_rows(positions, self.head_dim)
        for layer in self.layers:
            x = layer(x, table, first, memory)
        y: Tensor = self.norm(x)
        return y.transpose(1, 2)
