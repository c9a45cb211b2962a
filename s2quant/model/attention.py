"""Attention and the transformer block that the Slow AR and the Fast AR share.

Legend: B batch, T query positions, S key positions (S >= T), D width, H query heads, KV key/value heads, h head width.

The block is written once. What differs between a whole sequence, a cached step and a captured graph is only where
keys and values come from, so that is an argument: `attend(q, k, v)` gets rotated queries and keys of the T new
positions and returns their attention output. A runtime passes one that writes a cache; `causal_attention` and
`softmax_attention` need none.

Padding must be on the right: there causality already hides it from every real position, so no padding mask exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.checkpoint.config import TransformerConfig
from s2quant.layers import FeedForward, RMSNorm, apply_rotary, rotary_table

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, T, H, h], k [B, T, KV, h], v [B, T, KV, h]) -> [B, T, H, h], with positions already applied to q and k."""


class Rotary:
    """Rotary tables on demand, one per device, made anew when too short (1024, 2048, ... positions).

    Not a module and not a buffer: nothing of it is in a state dict, and a model built on the meta device needs no
    repair. The table is always computed on the CPU and then moved, so that its rounding does not depend on the device.

    Args:
        config: The transformer whose head width, base and length count.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self.head_dim, self.base, self.max_positions = config.head_dim, config.rope_base, config.max_seq_len
        self._tables: dict[torch.device, Tensor] = {}

    def table(self, num_positions: int, device: torch.device) -> Tensor:
        """Give the rows of positions 0 to num_positions - 1.

        Args:
            num_positions: Number of positions P, at most the configured max_seq_len.
            device: Where the rows are needed.

        Returns:
            bfloat16 [P, h/2, 2]: cosine, sine. A view of the cached table: not to be written to, and to be
            kept by whoever needs its address to stay valid.
        """
        assert 0 < num_positions <= self.max_positions, (num_positions, self.max_positions)
        cached = self._tables.get(device)
        if cached is None or len(cached) < num_positions:
            length = min(max(1024, 1 << (num_positions - 1).bit_length()), self.max_positions)
            with torch.inference_mode(False), torch.no_grad():  # usable later under autograd, whoever asked first
                cached = rotary_table(length, self.head_dim, self.base).to(device)
            self._tables[device] = cached
        return cached[:num_positions]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend causally through torch's scaled dot product; the queries are the last T of the S key positions.

    Args:
        q: [B, T, H, h].
        k: [B, S, KV, h].
        v: [B, S, KV, h].
        mask: What `causal_mask` gives, by whoever has it already; None: made here.

    Returns:
        [B, T, H, h].
    """
    num_queries = q.shape[1]
    if mask is None:
        mask = causal_mask(num_queries, k.shape[1], q.device)
    if mask is not None:  # the kernels that take a mask do not share heads, and the one that does is far slower
        k, v = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return y.transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally with plain matrix products, every step rounded to q's dtype, as the Fast AR was trained.

    Args:
        q: [B, T, H, h], the last T of the S positions.
        k: [B, S, KV, h].
        v: [B, S, KV, h].

    Returns:
        [B, T, H, h].
    """
    num_queries, num_heads, head_dim = q.shape[1:]
    k, v = _repeat_heads(k, num_heads), _repeat_heads(v, num_heads)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * (1 / math.sqrt(head_dim))  # [B, H, T, S]
    if num_queries > 1:
        scores = scores.masked_fill(~_causal_mask(num_queries, k.shape[1], q.device), float("-inf"))
    return (torch.softmax(scores, dim=-1) @ v.transpose(1, 2)).transpose(1, 2)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
    """Say what `causal_attention` needs to be told of who may look at whom.

    Args:
        num_queries: T.
        num_keys: S.
        device: Where the mask is needed.

    Returns:
        bool [T, S], True = may look; None where torch itself knows.
    """
    return None if num_queries in (1, num_keys) else _causal_mask(num_queries, num_keys, device)


def _causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    assert num_queries <= num_keys, (num_queries, num_keys)
    full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return full.tril(diagonal=num_keys - num_queries)  # bool [T, S], True = may look


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give every query head its key/value head: head i reads head i // (H / KV)."""
    return x.repeat_interleave(num_heads // x.shape[2], dim=2)


class Attention(nn.Module):
    """Multi-head attention with fused projections, shared key/value heads and rotary positions.

    Rows of `wqkv` are all queries, all keys, all values. Queries and keys may be normalised per head, before rotation.

    Args:
        config: Sizes and constants.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.n_head, config.n_local_heads, config.head_dim
        self.wqkv = nn.Linear(config.dim, config.qkv_dim, bias=False)
        self.wo = nn.Linear(config.n_head * config.head_dim, config.dim, bias=False)
        # torch's own norm here, not layers.RMSNorm: the reference uses it, and its rounding in bfloat16 differs.
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_dim, config.norm_eps) if config.attention_qk_norm else None for _ in range(2)
        )

    def forward(self, x: Tensor, table: Tensor, attend: Attend) -> Tensor:
        """Mix positions.

        Args:
            x: [B, T, D].
            table: [T, h/2, 2] or [B, T, h/2, 2], rotary rows at the positions of x.
            attend: What turns queries, keys and values into the attention output.

        Returns:
            [B, T, D].
        """
        out: Tensor = self.wo(self.mixed(x, table, attend))
        return out

    def mixed(self, x: Tensor, table: Tensor, attend: Attend) -> Tensor:
        """Mix positions up to the last projection.

        Args:
            x: As `forward`.
            table: As `forward`.
            attend: As `forward`.

        Returns:
            [B, T, H * h], the input of `wo`.
        """
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 KV, h]
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        y = attend(apply_rotary(q, table), apply_rotary(k, table), v)
        assert y.shape == q.shape, (y.shape, q.shape)
        return y.flatten(-2)


class Block(nn.Module):
    """One pre-norm transformer block: attention, then SwiGLU, each added to its input.

    Args:
        config: Sizes and constants.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.intermediate_size)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, table: Tensor, attend: Attend) -> Tensor:
        """Apply the block.

        Args:
            x: [B, T, D].
            table: [T, h/2, 2] or [B, T, h/2, 2], rotary rows at the positions of x.
            attend: See `Attend`.

        Returns:
            [B, T, D].
        """
        x = x + self.attention(self.attention_norm(x), table, attend)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


def run_blocks(blocks: nn.ModuleList, x: Tensor, table: Tensor, attends: Sequence[Attend]) -> Tensor:
    """Apply a stack of blocks.

    Args:
        blocks: The stack.
        x: [B, T, D].
        table: [T, h/2, 2] or [B, T, h/2, 2], rotary rows at the positions of x.
        attends: One `Attend` per block (each has its own cache), in order.

    Returns:
        [B, T, D], not normalised.
    """
    for block, attend in zip(blocks, attends, strict=True):
        x = block(x, table, attend)
    return x
