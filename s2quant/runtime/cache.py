"""Keys and values of the positions already seen, for a batch of slots.

Legend: L layers, B slots, S capacity in positions, T new positions, H query heads, KV key/value heads, h head width.

The cache gives the model its `attend` functions: one for the prefill of a single slot, one for a step of all
active slots. Capacity is that of the requests, not of the model, and grows when a longer request takes a slot.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from s2quant.checkpoint.config import TransformerConfig
from s2quant.model import Attend, causal_attention, causal_mask, softmax_attention


class KVCache:
    """Keys and values of B slots, written in place.

    Args:
        config: The transformer's sizes.
        num_slots: B.
        capacity: S to begin with.
        device: Where it lives.
        dtype: dtype of keys and values.
    """

    def __init__(
        self, config: TransformerConfig, num_slots: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.num_layers = config.n_layer
        shape = (config.n_layer, num_slots, config.n_local_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def capacity(self) -> int:
        """Positions that fit per slot."""
        return self.keys.shape[3]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def ensure(self, capacity: int) -> None:
        """Grow, keeping what is there.

        Args:
            capacity: Positions needed per slot.
        """
        extra = capacity - self.capacity
        if extra > 0:
            self.keys = F.pad(self.keys, (0, 0, 0, extra))
            self.values = F.pad(self.values, (0, 0, 0, extra))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy one slot's positions over another's.

        Args:
            source: Slot to copy from.
            target: Slot to overwrite.
            length: Positions in use.
        """
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def copy(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Copy the first positions of a slot.

        Args:
            slot: The slot.
            length: Positions P.

        Returns:
            Keys and values [L, KV, P, h], in memory of their own.
        """
        return self.keys[:, slot, :, :length].clone(), self.values[:, slot, :, :length].clone()

    def write(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values at the first positions of a slot.

        Args:
            slot: The slot.
            keys: [L, KV, P, h].
            values: [L, KV, P, h].
        """
        self.keys[:, slot, :, : keys.shape[2]] = keys
        self.values[:, slot, :, : values.shape[2]] = values

    def prefill_attends(self, slot: int, start: int = 0) -> list[Attend]:
        """Make the `attend` functions for a run of positions of one slot.

        Args:
            slot: The slot.
            start: Position of the first new one; those before it are already in the cache.

        Returns:
            One function per layer; each takes B = 1, writes its keys and values, and attends causally.
        """
        masks: list[Tensor | None] = []  # the same in all layers, made by the first

        def attend_for(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                end = start + k.shape[1]
                keys, values = self.keys[layer, slot, :, :end], self.values[layer, slot, :, :end]  # [KV, end, h]
                keys[:, start:], values[:, start:] = k[0].transpose(0, 1), v[0].transpose(0, 1)
                if not masks:
                    masks.append(causal_mask(k.shape[1], end, q.device))
                return causal_attention(q, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], masks[0])

            return attend

        return [attend_for(layer) for layer in range(self.num_layers)]

    def fill_attends(self, batch: int, start: int) -> list[Attend]:
        """Make the `attend` functions for the same new positions in each of the first slots (the Fast AR's frame).

        Args:
            batch: Number of slots B.
            start: Position of the first new one.

        Returns:
            One function per layer; each takes B rows, writes its keys and values, and attends as the Fast AR does.
        """

        def attend_for(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                end = start + k.shape[1]
                keys, values = self.keys[layer, :batch, :, :end], self.values[layer, :batch, :, :end]
                keys[:, :, start:], values[:, :, start:] = k.transpose(1, 2), v.transpose(1, 2)
                return softmax_attention(q, keys.transpose(1, 2), values.transpose(1, 2))

            return attend

        return [attend_for(layer) for layer in range(self.num_layers)]

    def step_attends(self, positions: list[int]) -> list[Attend]:
        """Make the `attend` functions for one new position in each of the first slots.

        Args:
            positions: Where each active slot's new position goes; slot i is `positions[i]`.

        Returns:
            One function per layer; each takes T = 1 and as many rows as there are positions.
        """
        batch, live = len(positions), max(positions) + 1
        where = torch.tensor(positions, device=self.keys.device)
        rows = torch.arange(batch, device=self.keys.device)
        mask = None
        if min(positions) + 1 < live:
            mask = (torch.arange(live, device=self.keys.device) <= where[:, None])[:, None, None]  # [B, 1, 1, live]

        def attend_for(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.keys[layer, rows, :, where] = k[:, 0]
                self.values[layer, rows, :, where] = v[:, 0]
                keys, values = self.keys[layer, :batch, :, :live], self.values[layer, :batch, :, :live]
                return _attend_step(q, keys, values, mask)

            return attend

        return [attend_for(layer) for layer in range(self.num_layers)]

    def bucket_attends(self, positions: Tensor, context: int) -> list[Attend]:
        """Make the `attend` functions of a step whose positions only the device knows; shapes depend on no value.

        Args:
            positions: int64 [B], where each of the first slots' new position goes.
            context: Positions that are looked at; more than every position, at most the capacity.

        Returns:
            One function per layer; each takes T = 1 and B rows.
        """
        rows = torch.arange(len(positions), device=self.keys.device)
        mask = (torch.arange(context, device=self.keys.device) <= positions[:, None])[:, None, None]

        def attend_for(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self.keys[layer, rows, :, positions] = k[:, 0]
                self.values[layer, rows, :, positions] = v[:, 0]
                keys, values = (part[layer, : len(rows), :, :context] for part in (self.keys, self.values))
                return _attend_step(q, keys, values, mask)

            return attend

        return [attend_for(layer) for layer in range(self.num_layers)]

    def piece_attends(self, slot: Tensor, positions: Tensor, context: int) -> list[Attend]:
        """Make the `attend` functions for a run of positions that only the device knows; shapes depend on no value.

        Args:
            slot: int64 [1], the slot.
            positions: int64 [T], rising. Those behind the cache's end are padding, and written to its last position.
            context: Positions that are looked at; more than every position that is no padding, at most the capacity.

        Returns:
            One function per layer; each takes B = 1, writes its keys and values, and attends causally.
        """
        where = positions.clamp(max=self.capacity - 1)
        num_kv, dtype = self.keys.shape[2], self.keys.dtype
        hidden = torch.arange(context, device=self.keys.device) > positions[:, None]  # [T, C]
        causal = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, float("-inf"))
        masks: list[Tensor] = []  # [T H/KV, C], made by the first layer

        def attend_for(layer: int) -> Attend:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                length, heads, width = q.shape[1:]
                group = heads // num_kv
                if not masks:
                    masks.append(causal.repeat(group, 1))
                self.keys[layer, slot, :, where], self.values[layer, slot, :, where] = k[0], v[0]
                keys, values = (part[layer, :, :, :context][slot] for part in (self.keys, self.values))  # [1, KV, C, h]
                # heads that share keys are taken as query rows, so that no key is repeated
                rows = q.view(length, num_kv, group, width).permute(1, 2, 0, 3).reshape(1, num_kv, -1, width)
                y = F.scaled_dot_product_attention(rows, keys, values, attn_mask=masks[0])
                return y.view(num_kv, group, length, width).permute(2, 0, 1, 3).reshape(q.shape)

            return attend

        return [attend_for(layer) for layer in range(self.num_layers)]


def _attend_step(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attend from one query position per slot; heads that share keys are taken as query rows, so nothing is copied.

    Args:
        q: [B, 1, H, h].
        keys: [B, KV, S, h].
        values: [B, KV, S, h].
        mask: bool [B, 1, 1, S], True = may look; None: all.

    Returns:
        [B, 1, H, h].
    """
    batch, _, heads, width = q.shape
    grouped = q.view(batch, keys.shape[1], heads // keys.shape[1], width)  # [B, KV, H/KV, h]
    y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return y.reshape(batch, 1, heads, width)
