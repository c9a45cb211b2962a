"""Prompts are read in pieces, and what several prompts begin with is read once.

Legend: L layers, KV key/value heads, h head width, N codebooks, T prompt positions, P positions of the prefix.

A prompt begins with the system message: the instruction and the voices' codes, most of its positions. Its keys and
values depend on nothing after it, so they are kept and copied into the slot of the next prompt that begins with the
same tokens. A prompt is always read in two pieces, the prefix and the rest, cached or not: the same operations on the
same shapes, so the speech of a seed does not depend, to the last bit, on what was spoken before.

What a slot holds already is a prefix too: the next batch of text of a conversation goes on behind the last one.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from s2quant.model import SlowAR
from s2quant.runtime.cache import KVCache
from s2quant.runtime.prompt_graphs import PromptReader

PREFIX_BYTES = 256 * 2**20  # of the real size: 1,800 positions, or seven voices of ten seconds


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Keys and values of the first positions of a prompt.

    Args:
        keys: [L, KV, P, h].
        values: [L, KV, P, h].
    """

    keys: Tensor
    values: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes


class PrefixCache:
    """The prefixes read last, of one model.

    Args:
        max_bytes: The most bytes to keep, on the model's device; 0 keeps nothing. A prefix that alone is larger is
            not kept.
    """

    def __init__(self, max_bytes: int = PREFIX_BYTES) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[str, Prefix] = OrderedDict()
        self._of: weakref.ref[SlowAR] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def belong_to(self, slow: SlowAR) -> None:
        """Begin anew when the model is another one. Who changes weights in place calls `clear`.

        Args:
            slow: The model that is going to read.
        """
        if self._of is None or self._of() is not slow:
            self.clear()
            self._of = weakref.ref(slow)

    def find(self, key: str) -> Prefix | None:
        """Look up a prefix, which is then the last to be given up.

        Args:
            key: From `prefix_key`.

        Returns:
            The prefix, not to be written to; None when it is not kept.
        """
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return found

    def keep(self, key: str, prefix: Prefix) -> None:
        """Keep a prefix, giving up those not used for the longest time.

        Args:
            key: From `prefix_key`.
            prefix: Tensors of its own, that nothing else writes to.
        """
        if prefix.num_bytes > self.max_bytes or key in self._kept:
            return
        while self.num_bytes + prefix.num_bytes > self.max_bytes:
            self.num_bytes -= self._kept.popitem(last=False)[1].num_bytes
        self._kept[key] = prefix
        self.num_bytes += prefix.num_bytes

    def clear(self) -> None:
        """Give up everything."""
        self._kept.clear()
        self.num_bytes = 0


def prefix_key(tokens: Tensor, dtype: torch.dtype, device: torch.device) -> str:
    """Name the keys and values of one model at these tokens.

    Args:
        tokens: int64 [1+N, P], on the CPU.
        dtype: dtype of keys and values.
        device: Where they are.

    Returns:
        A key: equal exactly when the tokens, their shape, the dtype and the device are.
    """
    content = hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
    return f"{content} {list(tokens.shape)} {dtype} {device}"


def read_prompt(
    slow: SlowAR,
    cache: KVCache,
    slot: int,
    tokens: Tensor,
    *,
    held: int = 0,
    prefix: int = 0,
    prefixes: PrefixCache | None = None,
    reader: PromptReader | None = None,
) -> Tensor | None:
    """Bring a prompt's keys and values into a slot.

    Args:
        slow: The Slow AR.
        cache: Its cache, with room for T positions.
        slot: The slot; what it held behind the first `held` positions is overwritten.
        tokens: int64 [1+N, T], on the CPU.
        held: First positions whose keys and values are in the slot already.
        prefix: First positions that other prompts may share; 0 when none.
        prefixes: Where they are kept, or None.
        reader: Reads in padded pieces, where it takes so many positions; it may leave what is behind the prefix for
            its `catch_up`. None: everything is read as it is.

    Returns:
        [1, T - start, D]: the last blocks' output at the positions read last; None when there was nothing to read, or
        when a reader reads it.
    """
    device, start = cache.keys.device, held if held >= prefix else 0  # never a prefix made of other pieces

    def read(part: Tensor, first: int, is_kept: bool = False) -> Tensor | None:
        if reader is not None and reader.takes(part.shape[1]):
            (reader.read if is_kept else reader.leave)(slot, part, first)
            return None
        return _read(slow, cache, slot, part, first)

    if start < prefix < tokens.shape[1]:
        if prefixes is not None:
            prefixes.belong_to(slow)
        key = prefix_key(tokens[:, :prefix], cache.keys.dtype, device)
        found = prefixes.find(key) if prefixes is not None else None
        if found is not None:
            cache.write(slot, found.keys, found.values)
        else:
            read(tokens[:, :prefix], start, is_kept=True)
            if prefixes is not None and prefixes.max_bytes:
                keys, values = cache.copy(slot, prefix)
                prefixes.keep(key, Prefix(keys=keys, values=values))
        start = prefix
    return read(tokens, start) if start < tokens.shape[1] else None


def _read(slow: SlowAR, cache: KVCache, slot: int, tokens: Tensor, start: int) -> Tensor:
    """Run the blocks over the positions from `start` on."""
    device = cache.keys.device
    x = slow.embed(tokens[None, :, start:].to(device))
    table = slow.rotary.table(tokens.shape[1], device)[start:].float()  # once, not twice in every layer
    return slow.blocks(x, table, cache.prefill_attends(slot, start))


def num_held(held: Tensor | None, tokens: Tensor) -> int:
    """Count the positions that a slot need not read again.

    Args:
        held: int64 [1+N, P], what the slot's keys and values are of; None for a new slot.
        tokens: int64 [1+N, T], the prompt to come.

    Returns:
        How many first positions are the same; less than T, because the last position must be computed.
    """
    if held is None:
        return 0
    length = min(held.shape[1], tokens.shape[1] - 1)
    differs = (held[:, :length] != tokens[:, :length]).any(dim=0).nonzero()
    return int(differs[0]) if len(differs) else length
