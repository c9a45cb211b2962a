"""The Slow AR: text and audio frames in, one token distribution and one hidden vector per position out.

Legend: B batch, T positions, N codebooks, D width, V vocabulary, C constrained vocabulary.

Tokens are int64 [B, 1+N, T]: row 0 the token ids, rows 1..N the codes of a frame. A position is a frame exactly when
its token id is a semantic one; the code rows of every other position are ignored, whatever they hold. There is no
cache and no sampling here. `forward` and `forward_hidden` refuse ids and codes that are out of range.

Source: https://github.com/fishaudio/fish-speech/blob/3dd1f85/fish_speech/models/text2semantic/llama.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError, shorten_list
from s2quant.layers import RMSNorm
from s2quant.model.attention import Attend, Block, Rotary, causal_attention, run_blocks


@dataclass(frozen=True, kw_only=True)
class SlowOutput:
    """What the Slow AR says about every position.

    Args:
        logits: [B, T, V], of the token at the next position.
        hidden: [B, T, D], after the last norm: what the Fast AR reads.
    """

    logits: Tensor
    hidden: Tensor


class SlowAR(nn.Module):
    """The text model, with the codebook tables that belong to its input and a head tied to its embedding.

    Args:
        config: The whole configuration; the Slow AR needs the token ids too.
    """

    def __init__(self, config: S2Config) -> None:
        super().__init__()
        self.config = config
        slow = config.slow
        self.embeddings = nn.Embedding(slow.vocab_size, slow.dim)
        self.codebook_embeddings = nn.Embedding(config.num_codebooks * config.codebook_size, slow.dim)
        self.layers = nn.ModuleList(Block(slow) for _ in range(slow.n_layer))
        self.norm = RMSNorm(slow.dim, slow.norm_eps)
        self.rotary = Rotary(slow)

    def is_semantic(self, tokens: Tensor) -> Tensor:
        """Tell frames from text, by row 0 only.

        Args:
            tokens: int64 [B, 1+N, T].

        Returns:
            bool [B, T], True where the position is an audio frame.
        """
        return (tokens[:, 0] >= self.config.semantic_begin_id) & (tokens[:, 0] <= self.config.semantic_end_id)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the input vectors: at frames (token + the sum of N codes) / sqrt(N + 1), elsewhere the token.

        Ranges are not checked (that would wait for the device); `check_tokens` does it.

        Args:
            tokens: int64 [B, 1+N, T].

        Returns:
            [B, T, D] in the weights' dtype, in which the sums are rounded as well.
        """
        num_codebooks, codebook_size = self.config.num_codebooks, self.config.codebook_size
        assert tokens.ndim == 3 and tokens.shape[1] == 1 + num_codebooks, tokens.shape
        frames = self.is_semantic(tokens)  # [B, T]
        offsets = torch.arange(num_codebooks, device=tokens.device)[:, None] * codebook_size
        codes = tokens[:, 1:].masked_fill(~frames[:, None], 0) + offsets  # [B, N, T]
        text = self.embeddings(tokens[:, 0])
        audio = (text + self.codebook_embeddings(codes).sum(dim=1)) / math.sqrt(num_codebooks + 1)
        return torch.where(frames[..., None], audio, text)

    def blocks(self, x: Tensor, table: Tensor, attends: Sequence[Attend]) -> Tensor:
        """Run all blocks.

        Args:
            x: [B, T, D], from `embed`.
            table: [T, h/2, 2] or [B, T, h/2, 2], rotary rows at the positions of x.
            attends: One per layer.

        Returns:
            [B, T, D], before `norm`.
        """
        return run_blocks(self.layers, x, table, attends)

    def head(self, hidden: Tensor) -> Tensor:
        """Score the whole vocabulary with the tied embedding.

        Args:
            hidden: [..., D], normed.

        Returns:
            [..., V] in hidden's dtype.
        """
        return F.linear(hidden, self.embeddings.weight)

    def constrained_logits(self, hidden: Tensor) -> Tensor:
        """Score only what may follow inside speech: the semantic tokens in order of their code, then im_end.

        Args:
            hidden: [..., D], normed.

        Returns:
            [..., C]: column c < C - 1 is semantic code c, the last column is im_end. C is 4097 in S2 Pro.
        """
        begin, end, im_end = self.config.semantic_begin_id, self.config.semantic_end_id, self.config.im_end_id
        weight = self.embeddings.weight
        semantic, stop = weight[begin : end + 1], weight[im_end : im_end + 1]  # views: nothing of the table is copied
        return torch.cat([F.linear(hidden, semantic), F.linear(hidden, stop)], dim=-1)

    def constrained_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """List the token ids of the columns of `constrained_logits`.

        Args:
            device: Where the list is needed.

        Returns:
            int64 [C].
        """
        ids = [*range(self.config.semantic_begin_id, self.config.semantic_end_id + 1), self.config.im_end_id]
        return torch.tensor(ids, device=device)

    def forward_hidden(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the hidden vectors of whole sequences, without any head.

        Args:
            tokens: int64 [B, 1+N, T], padded on the right with any valid token.
            mask: bool [B, T], True at real positions; None when nothing is padded. Hidden vectors of padding are
                finite and mean nothing.

        Returns:
            [B, T, D], normed.

        Raises:
            UserError: A token id or code is out of range, a sequence is too long, or padding is not on the right.
        """
        check_tokens(self.config, tokens, mask)
        table = self.rotary.table(tokens.shape[2], tokens.device)
        out: Tensor = self.norm(self.blocks(self.embed(tokens), table, [causal_attention] * len(self.layers)))
        return out

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> SlowOutput:
        """Score the next token at every position of whole sequences.

        Args:
            tokens: int64 [B, 1+N, T], padded on the right with any valid token.
            mask: bool [B, T], True at real positions; None when nothing is padded.

        Returns:
            Logits and hidden vectors; those of padding mean nothing.

        Raises:
            UserError: See `forward_hidden`.
        """
        hidden = self.forward_hidden(tokens, mask)
        return SlowOutput(logits=self.head(hidden), hidden=hidden)


def check_tokens(config: S2Config, tokens: Tensor, mask: Tensor | None = None) -> None:
    """Refuse tokens that would read wrong rows: an excessive code would silently fetch the next codebook's.

    Args:
        config: The model's configuration.
        tokens: int64 [B, 1+N, T].
        mask: bool [B, T], True at real positions, or None.

    Raises:
        UserError: A token id or code is out of range, a sequence is too long, or padding is not on the right; all
            faults are listed.
    """
    assert tokens.ndim == 3 and tokens.shape[1] == 1 + config.num_codebooks, tokens.shape
    assert tokens.dtype == torch.int64, tokens.dtype
    assert mask is None or (mask.dtype == torch.bool and mask.shape == tokens[:, 0].shape), mask
    faults = []
    if not 1 <= tokens.shape[2] <= config.slow.max_seq_len:
        faults.append(f"{tokens.shape[2]} positions, not 1 to {config.slow.max_seq_len}")
    ids = tokens[:, 0]
    frames = ((ids >= config.semantic_begin_id) & (ids <= config.semantic_end_id))[:, None]
    for name, values, limit in (
        ("token id", ids, config.slow.vocab_size),
        ("code", tokens[:, 1:].masked_fill(~frames, 0), config.codebook_size),
    ):
        bad = values[(values < 0) | (values >= limit)]
        if bad.numel():
            faults.append(f"{bad.numel()} {name}(s) outside 0..{limit - 1}, the first is {int(bad[0])}")
    if mask is not None and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        faults.append("padding before a real position")
    if faults:
        raise UserError(
            f"tokens that the model cannot take:\n{shorten_list(faults)}",
            "token ids and codes within the tables, padding on the right",
            "encode the prompt with this checkpoint's own tokenizer and codec",
        )
