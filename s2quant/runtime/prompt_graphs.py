"""Prompts read as CUDA graphs: padded pieces of few sizes, so that the host asks for a piece, not for each operation.

Legend: L positions of a piece, C context, N codebooks, P positions of the cache, h head width.

Reading a prompt is some 2,700 small operations, which a host asks for more slowly than a GPU does them. Everything
that differs from piece to piece (tokens, slot, first position) lives in tensors of fixed addresses; one graph exists
per (L, C), and all give their memory back to one pool. A graph leaves nothing in the pool: what it makes are keys and
values in the cache. On a CPU the same function runs as it is.

Padding stands behind the real positions of a piece, where causality hides it from them. Its keys and values are
written all the same, at positions that nobody looks at before they are written again: the positions of a slot are
written in order, by the next piece, then by frames, and whoever looks from position p has written p himself and sees
nothing behind it. Where the cache ends, padding goes to its last position. No prompt has a real position there, as a
prompt's last position is left to the first frame (`FastDecoder.begin`), which writes it before it looks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s2quant.model import SlowAR
from s2quant.runtime.cache import KVCache
from s2quant.runtime.captures import capture

if TYPE_CHECKING:
    from s2quant.runtime.fused import FusedFrame

# Whether an engine's fast decoder reads prompts so on a CUDA device unless it is told: 7 to 22 ms in place of 40 to 97
# for 1 to 300 positions of a W4A16 model, and keys and values as near to the eager ones as those are to one another
# (reports/2026-11-26-h100, by the part "prompts" of tools/stream_check.py).
PROMPT_GRAPHS = True
# Whether pieces of up to KERNEL_PIECE positions are read by the fused frame's kernels, 6 to 9 launches a layer, not by
# some 65 operations of torch; and longer prompts in such pieces. Measured: 2.2 ms in place of 7.3 for 16 positions, 4.0
# in place of 10 for 64, 12 in place of 17 for 256, 17 in place of 22 for 300, and as near to the eager way
# (reports/2026-11-26-prompts, tools/prompt_check.py --kernels 512/64,256/256).
PROMPT_KERNELS = True
KERNEL_PIECE = 256
LEAST_PIECE = 16
MOST_PIECE = 512
MOST_CONTEXT = 4096  # beyond, the mask of a piece would take more memory than a graph is worth


class PromptReader:
    """Reads the positions of prompts into a cache, in padded pieces.

    Args:
        slow: The Slow AR.
        cache: Its cache.
        context_bucket: Gives C for the number of positions that are looked at; no more than the cache has for as many
            as it has.
        captured: Whether pieces are captured as CUDA graphs; only on a CUDA device.
        pool: The memory pool of the graphs, which no other stream uses; another one when these are forgotten.
        most: Positions of the largest piece; None: what `fused` takes, else MOST_PIECE.
        fused: Whose kernels read the pieces that are small enough; None: nobody's.
    """

    def __init__(
        self,
        slow: SlowAR,
        cache: KVCache,
        context_bucket: Callable[[int], int],
        captured: bool,
        pool: Any = None,
        most: int | None = None,
        fused: FusedFrame | None = None,
    ) -> None:
        self.slow, self.cache, self.context_bucket = slow, cache, context_bucket
        self.captured, self.pool, self.fused = captured, pool, fused
        own = MOST_PIECE if fused is None or not fused.prompt_rows else fused.prompt_rows
        self.most = own if most is None else most
        device = cache.keys.device
        with torch.inference_mode(False):  # written inside and outside of that mode
            shape = (1, 1 + slow.config.num_codebooks, self.most)
            self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
            self._slot = torch.zeros(1, dtype=torch.int64, device=device)
            self._start = torch.zeros(1, dtype=torch.int64, device=device)
        self._table: Tensor | None = None  # float32 [P, h/2, 2], of the cache as long as it is now
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def takes(self, num_positions: int) -> bool:
        """Say whether a prompt can be read in pieces.

        Args:
            num_positions: Its positions, with those that are in the slot already.

        Returns:
            Whether it can; else the plain way has to read it.
        """
        return self.context_bucket(num_positions) <= MOST_CONTEXT

    def forget(self) -> None:
        """Give up the graphs: the cache is about to move."""
        self._graphs.clear()
        self._table = None

    def read(self, slot: int, tokens: Tensor, start: int) -> None:
        """Bring keys and values of the positions from `start` on into a slot.

        Args:
            slot: The slot, which holds the positions before.
            tokens: int64 [1+N, T], on the CPU; `takes` its T positions, which are fewer than those of the cache.
            start: First position to be read, less than T.
        """
        length = tokens.shape[1]
        assert start < length < self.cache.capacity and self.takes(length), (start, length, self.cache.capacity)
        if self._table is None:
            self._table = self.slow.rotary.table(self.cache.capacity, self._tokens.device).float()
        sizes = pieces(length - start, self.most)
        ids = F.pad(tokens[:, start:], (0, sum(sizes) - (length - start)))  # padded with text, whose id is valid
        ids = ids.to(self._tokens.device)
        self._slot.fill_(slot)
        done = 0
        for size in sizes:
            self._tokens[0, :, :size] = ids[:, done : done + size]
            self._start.fill_(start + done)
            self._run(size, self.context_bucket(min(start + done + size, length)))
            done += size

    def _has_kernels(self, size: int) -> bool:
        return self.fused is not None and size <= self.fused.prompt_rows

    def _run(self, size: int, context: int) -> None:
        """Read the piece that has been put in place."""
        if not self.captured:
            self._piece(size, context)
            return
        key = (size, context)
        if key not in self._graphs:
            self._graphs[key] = self._capture(size, context)
        self._graphs[key].replay()

    def _capture(self, size: int, context: int) -> torch.cuda.CUDAGraph:
        """Capture a piece, after it has been read without a graph: the graph is going to write the same once more.

        So nothing has to be put back, and no memory is set aside for another stream.
        """
        if self._has_kernels(size):
            from s2quant.runtime.kernels.launch import compile_together

            compile_together(lambda: self._piece(size, context))
        self._piece(size, context)  # warm-up: libraries choose their kernels, Triton compiles and loads its own
        graph = torch.cuda.CUDAGraph()
        with capture(graph, self.pool):
            self._piece(size, context)
        return graph

    @torch.inference_mode()
    def _piece(self, size: int, context: int) -> None:
        """Read a piece; no shape depends on a value, and nothing waits for the device."""
        assert self._table is not None
        positions = self._start + torch.arange(size, device=self._start.device)
        if self.fused is not None and self._has_kernels(size):
            columns = self._tokens[0, :, :size].T.contiguous()
            self.fused.read(columns, positions, self._slot, self.cache, self._table, context)
            return
        rows = self._table[positions.clamp(max=self.cache.capacity - 1)]
        x = self.slow.embed(self._tokens[:, :, :size])
        self.slow.blocks(x, rows, self.cache.piece_attends(self._slot, positions, context))


def pieces(count: int, most: int) -> list[int]:
    """Cut positions into pieces.

    Args:
        count: Positions, 1 or more.
        most: Positions of the largest piece.

    Returns:
        Sizes in order: as many of the largest as are filled, then the smallest of 16, 64, 128, 256, ... that holds the
        rest; their sum is `count` or more. (32 would be half a millisecond faster than 64, and have kernels of its own
        to compile.)
    """
    whole, rest = divmod(count, most)
    if not rest:
        return [most] * whole
    size = LEAST_PIECE
    while size < rest:
        size *= 4 if size == LEAST_PIECE else 2
    return [most] * whole + [min(size, most)]
