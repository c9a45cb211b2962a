"""One frame at a time: cached Slow AR step, sampled semantic code, nine Fast AR passes.

Legend: B active slots, T prompt positions, N codebooks, D width.

The maths is that of `s2quant.model`; this file only decides where keys and values are kept and what is fed next.
The Fast AR runs nine passes, not ten: its first two positions (hidden vector and semantic code) are both known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2quant.model import DualAR, FastAR
from s2quant.runtime.cache import KVCache
from s2quant.runtime.prefix import PrefixCache, read_prompt
from s2quant.runtime.sampler import RAS_WINDOW, Noise, SamplingRows, draw, draw_semantic, frame_uniforms


class Decoder:
    """The cached model for up to B slots.

    Args:
        model: The model, in eval mode.
        num_slots: B at most.
        capacity: Positions per slot to begin with.
        residual_size: Entries of a residual codebook that exist in the codec; logits above are never drawn.
        prefixes: What prompts begin with, kept from run to run; None keeps nothing.
    """

    def __init__(
        self,
        model: DualAR,
        num_slots: int,
        capacity: int,
        residual_size: int,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.model, self.config, self.num_slots, self.prefixes = model, model.config, num_slots, prefixes
        weight = model.slow.embeddings.weight
        self.device = weight.device
        self.residual_size = residual_size
        self.num_semantic = self.config.semantic_end_id - self.config.semantic_begin_id + 1
        self.cache = KVCache(self.config.slow, num_slots, capacity, self.device, weight.dtype)
        self.fast_cache = KVCache(self.config.fast, num_slots, self.config.num_codebooks, self.device, weight.dtype)
        self.windows = torch.full((num_slots, RAS_WINDOW), -1, device=self.device)

    def prefill(self, slot: int, tokens: Tensor, held: int = 0, prefix: int = 0) -> Tensor:
        """Read a prompt into a slot.

        Args:
            slot: The slot; what it held behind the first `held` positions is overwritten.
            tokens: int64 [1+N, T], on the CPU.
            held: First positions that the slot holds already; less than T.
            prefix: First positions that other prompts may share; see `read_prompt`.

        Returns:
            [1, D]: the normed hidden vector of the last position.
        """
        slow, length = self.model.slow, tokens.shape[1]
        self.cache.ensure(length)
        self.windows[slot] = -1
        x = read_prompt(slow, self.cache, slot, tokens, held=held, prefix=prefix, prefixes=self.prefixes)
        assert x is not None, (held, length)
        return slow.norm(x[:, -1])

    def move(self, source: int, target: int, length: int) -> None:
        """Move an utterance to another slot.

        Args:
            source: Its slot.
            target: The slot to overwrite.
            length: Positions in use.
        """
        self.cache.move(source, target, length)
        self.windows[target] = self.windows[source]

    def step(self, columns: Tensor, positions: list[int]) -> Tensor:
        """Feed each active slot its last column.

        Args:
            columns: int64 [B, 1+N]: token id and codes.
            positions: The position of each column.

        Returns:
            [B, D]: normed hidden vectors.
        """
        slow = self.model.slow
        self.cache.ensure(max(positions) + 1)
        table = slow.rotary.table(max(positions) + 1, self.device)[torch.tensor(positions, device=self.device)]
        x = slow.blocks(slow.embed(columns[..., None]), table[:, None], self.cache.step_attends(positions))
        return slow.norm(x[:, 0])

    def sample(self, hidden: Tensor, rows: SamplingRows, noises: Sequence[Noise], slots: slice, first: bool) -> Tensor:
        """Draw one frame for each active slot.

        Args:
            hidden: [B, D], normed.
            rows: Sampling parameters of these slots.
            noises: Random numbers of these slots.
            slots: Which slots they are.
            first: Whether this is the first frame after a prompt: no RAS, and not put in the window.

        Returns:
            int64 [B, 1+N]: token id and codes; at im_end the codes mean nothing.
        """
        num_residual = self.config.num_codebooks - 1
        uniform, uniform_fast = frame_uniforms(noises, self.num_semantic, num_residual, self.residual_size)
        logits = self.model.slow.constrained_logits(hidden)
        window = None if first else self.windows[slots]
        semantic = draw_semantic(logits, rows, uniform, window, self.num_semantic)
        if window is not None:
            self.windows[slots] = torch.cat([window[:, 1:], semantic[:, None]], dim=1)
        ended = semantic == self.num_semantic
        token = torch.where(ended, self.config.im_end_id, semantic + self.config.semantic_begin_id)
        codes = residual_codes(
            *(self.model.fast, self.fast_cache, hidden, semantic.masked_fill(ended, 0), rows, uniform_fast),
            self.residual_size,
        )
        return torch.cat([token[:, None], codes], dim=1)


def residual_codes(
    fast: FastAR,
    cache: KVCache,
    hidden: Tensor,
    semantic: Tensor,
    rows: SamplingRows,
    uniform: Tensor,
    residual_size: int,
) -> Tensor:
    """Draw the residual codes of one frame per slot, in nine passes of the Fast AR.

    Args:
        fast: The Fast AR.
        cache: Its cache, of B slots or more, written from position 0.
        hidden: [B, D], normed, from the Slow AR.
        semantic: int64 [B], the semantic codes.
        rows: Sampling parameters of the B slots.
        uniform: float32 [B, N - 1, R] in [0, 1).
        residual_size: Entries R of a residual codebook.

    Returns:
        int64 [B, N]: all codes of the frame, the semantic one first.
    """
    batch, num_codebooks = len(hidden), fast.config.num_codebooks
    table = fast.rotary.table(num_codebooks, hidden.device)
    codes = [semantic]
    x = torch.stack([fast.embed_hidden(hidden), fast.embed_code(semantic)], dim=1)  # positions 0 and 1
    for index in range(1, num_codebooks):
        start = 0 if index == 1 else index
        out = fast.blocks(x, table[start : index + 1], cache.fill_attends(batch, start))
        logits = fast.head(out[:, -1])[:, :residual_size]
        codes.append(draw(logits, rows, uniform[:, index - 1]))
        x = fast.embed_code(codes[-1])[:, None]
    return torch.stack(codes, dim=1)
