"""Both transformers together, run with the right answer as input (teacher forcing).

Legend: B batch, T positions, F frames, N codebooks, D width, V tokens, C codes.

The frame at position t is predicted at position t - 1: the Slow AR's logits there score its semantic token, and the
Slow AR's hidden vector there is what the Fast AR reads to score its codes 1..N-1. That is what evaluation measures
and what training needs; speaking with a cache is the runtime's work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2quant.checkpoint.config import S2Config
from s2quant.model.fast import FastAR
from s2quant.model.slow import SlowAR


@dataclass(frozen=True, kw_only=True)
class DualOutput:
    """Teacher-forced scores of both transformers.

    Args:
        logits: [B, T, V], the Slow AR's, of the token at the next position.
        hidden: [B, T, D], the Slow AR's, normed.
        fast_logits: [F, N, C], the Fast AR's: row i >= 1 scores code i of a frame, row 0 is not used.
        frames: int64 [F, 2], where each of the F frames is: its sequence in the batch and its position t.
        codes: int64 [F, N], the frames themselves: the right answers for `fast_logits`.
    """

    logits: Tensor
    hidden: Tensor
    fast_logits: Tensor
    frames: Tensor
    codes: Tensor


class DualAR(nn.Module):
    """The speech model: `slow` and `fast`.

    Args:
        config: The configuration of both.
    """

    def __init__(self, config: S2Config) -> None:
        super().__init__()
        self.config = config
        self.slow = SlowAR(config)
        self.fast = FastAR(config)

    def frames(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Find the frames that have a position before them to be predicted from.

        Args:
            tokens: int64 [B, 1+N, T].
            mask: bool [B, T], True at positions that count (real ones, or only those to be scored); None: all.

        Returns:
            int64 [F, 2]: sequence and position t >= 1, in order.
        """
        wanted = self.slow.is_semantic(tokens)
        if mask is not None:
            wanted = wanted & mask
        return (wanted[:, 1:].nonzero() + torch.tensor([0, 1], device=tokens.device)).reshape(-1, 2)

    def fast_logits(self, hidden: Tensor, tokens: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Score the codes of chosen frames; take fewer at a time where memory is short.

        Args:
            hidden: [B, T, D], normed, from the Slow AR on these tokens.
            tokens: int64 [B, 1+N, T].
            frames: int64 [F, 2], from `frames` or some of its rows.

        Returns:
            Logits [F, N, C] and the codes int64 [F, N] that they score.
        """
        sequence, position = frames.unbind(-1)
        codes = tokens[sequence, 1:, position]
        return self.fast(hidden[sequence, position - 1], codes), codes

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> DualOutput:
        """Score whole sequences.

        Use `slow.forward_hidden`, `slow.constrained_logits` and `fast_logits` instead where the whole vocabulary at
        every position is not needed: it is what takes the memory.

        Args:
            tokens: int64 [B, 1+N, T], padded on the right with any valid token.
            mask: bool [B, T], True at real positions; None when nothing is padded.

        Returns:
            The scores of every position and of every real frame.

        Raises:
            UserError: A token id or code is out of range, a sequence is too long, or padding is not on the right.
        """
        slow = self.slow(tokens, mask)
        frames = self.frames(tokens, mask)
        fast_logits, codes = self.fast_logits(slow.hidden, tokens, frames)
        return DualOutput(logits=slow.logits, hidden=slow.hidden, fast_logits=fast_logits, frames=frames, codes=codes)
