"""The Fast AR: the N codes of one frame, one after the other, from one hidden vector of the Slow AR.

Legend: F frames, N codebooks, D width of the Slow AR, E width of the Fast AR, P positions of a pass, V codes.

Position 0 holds the hidden vector, position i >= 1 holds the embedding of code i - 1 (one table for all codebooks),
and the logits at position i >= 1 score code i. Code 0 is the Slow AR's semantic token, so the logits at position 0
have no use. Every frame starts over at position 0. There is no cache and no sampling here.

Source: https://github.com/fishaudio/fish-speech/blob/3dd1f85/fish_speech/models/text2semantic/llama.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2quant.checkpoint.config import S2Config
from s2quant.layers import RMSNorm
from s2quant.model.attention import Attend, Block, Rotary, run_blocks, softmax_attention


class FastAR(nn.Module):
    """The audio decoder.

    Args:
        config: The whole configuration; the Fast AR reads vectors of the Slow AR's width.
    """

    def __init__(self, config: S2Config) -> None:
        super().__init__()
        self.config = config
        fast = config.fast
        same_width = fast.dim == config.slow.dim
        self.project_in = nn.Identity() if same_width else nn.Linear(config.slow.dim, fast.dim)  # with a bias
        self.embeddings = nn.Embedding(fast.vocab_size, fast.dim)
        self.layers = nn.ModuleList(Block(fast) for _ in range(fast.n_layer))
        self.norm = RMSNorm(fast.dim, fast.norm_eps)
        self.output = nn.Linear(fast.dim, fast.vocab_size, bias=False)
        self.rotary = Rotary(fast)

    def embed_hidden(self, hidden: Tensor) -> Tensor:
        """Make the input vector of position 0.

        Args:
            hidden: [..., D], normed, from the Slow AR.

        Returns:
            [..., E].
        """
        out: Tensor = self.project_in(hidden)
        return out

    def embed_code(self, codes: Tensor) -> Tensor:
        """Make the input vectors of positions 1..N-1 out of codes 0..N-2.

        Args:
            codes: int64 [...], within 0..V-1.

        Returns:
            [..., E].
        """
        out: Tensor = self.embeddings(codes)
        return out

    def blocks(self, x: Tensor, table: Tensor, attends: Sequence[Attend]) -> Tensor:
        """Run all blocks.

        Args:
            x: [F, P, E].
            table: [P, h/2, 2], rotary rows at the positions of x.
            attends: One per layer.

        Returns:
            [F, P, E], before the norm.
        """
        return run_blocks(self.layers, x, table, attends)

    def head(self, x: Tensor) -> Tensor:
        """Normalise and score the codes.

        Args:
            x: [..., E], from `blocks`.

        Returns:
            [..., V].
        """
        out: Tensor = self.output(self.norm(x))
        return out

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Score every code of whole frames, given the codes before it (teacher forcing).

        Args:
            hidden: [F, D], normed, of the position before each frame.
            codes: int64 [F, N], the frames. The last column is scored but never read.

        Returns:
            [F, N, V]: row i >= 1 scores code i; row 0 is not used.
        """
        num_codebooks = self.config.num_codebooks
        assert hidden.ndim == 2 and codes.shape == (len(hidden), num_codebooks), (hidden.shape, codes.shape)
        x = torch.cat([self.embed_hidden(hidden)[:, None], self.embed_code(codes[:, :-1])], dim=1)
        table = self.rotary.table(num_codebooks, hidden.device)
        return self.head(self.blocks(x, table, [softmax_attention] * len(self.layers)))
