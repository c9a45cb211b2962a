"""Prompts read as CUDA graphs: padded pieces of few sizes, so that the host asks for a piece, not for each operation.

Legend: L positions of a piece, C context, N codebooks, P positions of the cache, h head width.

Reading a prompt is some 2,700 small operations, which a host asks for more slowly than a GPU does them. Everything
that differs from piece to piece (tokens, positions, slots) lives in tensors of fixed addresses; one graph exists
per (L, C), and all give their memory back to one pool. A graph leaves nothing in the pool: what it makes are keys and
values in the cache. On a CPU the same function runs as it is.

Padding stands behind the real positions of a piece, where causality hides it from them. Its keys and values are
written all the same, at positions that nobody looks at before they are written again: the positions of a slot are
written in order, by the next piece, then by frames, and whoever looks from position p has written p himself and sees
nothing behind it. Where the cache ends, padding goes to its last position. No prompt has a real position there, as a
prompt's last position is left to the first frame (`FastDecoder.begin`), which writes it before it looks.

Where the frame's kernels read all pieces, prompts that begin before the same frame are read together: their positions,
one prompt's after the other's, are cut into the same pieces, and each row has a slot of its own beside its position. A
prompt may so begin within a piece and go on in the next. All keys of a piece are written before any row looks at them,
and no row looks into another slot or behind its own position. Only the last piece is padded, with rows that go on
behind the last prompt, in its slot: the same places as if it were read alone.

A row's numbers depend on the kernels, not on its neighbours, and those depend on how many rows a piece has: one kind
for 16, another for 64, 128 and 256 (`s2quant.runtime.kernels.choice`, `attention.PIECE_ROWS`). So prompts of up to 16
positions share pieces of 16, all others share larger ones, and no bit depends on who is read with whom, or alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s2quant.errors import UserError
from s2quant.model import DualAR, SlowAR
from s2quant.runtime.cache import KVCache
from s2quant.runtime.captures import capture
from s2quant.runtime.fused_weights import frame_obstacle

if TYPE_CHECKING:
    from s2quant.runtime.fused import FusedFrame

# Whether an engine's fast decoder reads prompts so on a CUDA device unless it is told: 7 to 22 ms in place of 40 to 97
# for 1 to 300 positions of a W4A16 model, and keys and values as near to the eager ones as those are to one another
# (reports/2026-11-26-h100, by the part "prompts" of tools/stream_check.py).
PROMPT_GRAPHS = True
# Whether pieces of up to KERNEL_PIECE positions are read by the fused frame's kernels, 6 to 9 launches a layer, not by
# some 65 operations of torch; and longer prompts in such pieces. Measured: 2.2 ms in place of 7.3 for 16 positions, 4.0
# in place of 10 for 64, 12 in place of 17 for 256, 17 in place of 22 for 300, and as near to the eager way
# (reports/2026-11-26-prompts-and-codec, tools/prompt_check.py). Beyond KERNEL_CONTEXT positions it has not been
# measured, and by arithmetic it loses: each row's program reads all keys before it, 256 times what a matrix product
# reads. There pieces are of torch's operations.
PROMPT_KERNELS = True
KERNEL_PIECE = 256
KERNEL_CONTEXT = 1024
# Whether these kernels read the prompts that begin before the same frame together: the same bits, 12 ms in place of 32
# for 8 prompts of 20 positions, 70 in place of 258 for 64 (reports/2026-11-26-targets, tools/prompt_check.py).
PROMPTS_TOGETHER = True
LEAST_PIECE = 16  # rows up to which the kernels are those of few rows
LEAST_MANY = 64
MOST_PIECE = 512
MOST_CONTEXT = 4096  # beyond, the mask of a piece would take more memory than a graph is worth


@dataclass(frozen=True, kw_only=True)
class Part:
    """A prompt to be read into a slot, which holds what comes before.

    Args:
        slot: The slot.
        tokens: int64 [1+N, T], on the CPU; T less than the positions of the cache.
        start: First position to be read, less than T.
    """

    slot: int
    tokens: Tensor
    start: int

    @property
    def count(self) -> int:
        """Positions to be read."""
        return self.tokens.shape[1] - self.start

    def rows(self) -> Tensor:
        """Put everything about a position into one column.

        Returns:
            int64 [1+N+2, count]: the tokens, the position, the slot.
        """
        positions = torch.arange(self.start, self.tokens.shape[1])[None]
        return torch.cat([self.tokens[:, self.start :], positions, torch.full_like(positions, self.slot)])


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
        together: Whether `leave` leaves prompts to be read together, where `shares` allows it.
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
        together: bool = False,
    ) -> None:
        self.slow, self.cache, self.context_bucket = slow, cache, context_bucket
        self.captured, self.pool, self.fused = captured, pool, fused
        own = MOST_PIECE if fused is None or not fused.prompt_rows else fused.prompt_rows
        self.most = own if most is None else most
        device = cache.keys.device
        with torch.inference_mode(False):  # written inside and outside of that mode
            widest = self.most if fused is None else max(self.most, MOST_PIECE)
            self._rows = torch.zeros(3 + slow.config.num_codebooks, widest, dtype=torch.int64, device=device)
            self._tokens, self._positions, self._slots = self._rows[None, :-2], self._rows[-2], self._rows[-1]
        self.together = together and self.shares
        self._left: dict[int, Part] = {}  # by slot
        self._table: Tensor | None = None  # float32 [P, h/2, 2], of the cache as long as it is now
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    @property
    def shares(self) -> bool:
        """Whether the kernels read every piece of a prompt that is not too long, so that prompts may share them."""
        return self._has_kernels(self.most, 0)

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
        """Bring keys and values of the positions from `start` on into a slot, at once.

        Args:
            slot: The slot; see `Part`.
            tokens: int64 [1+N, T], on the CPU; `takes` its T positions, which are fewer than those of the cache.
            start: First position to be read, less than T.
        """
        part = Part(slot=slot, tokens=tokens, start=start)
        if self.shares:
            self.read_together([part])
        else:
            self._read([part], pieces(part.count, self.most))

    def read_together(self, parts: Sequence[Part]) -> None:
        """Bring keys and values of several prompts into their slots, with the bits that each has when read alone.

        Args:
            parts: The prompts, each of another slot; as `read` takes them.
        """
        assert self.shares and len({part.slot for part in parts}) == len(parts), [part.slot for part in parts]
        for part in parts:
            if self._is_long(part):
                whole = max(0, KERNEL_CONTEXT - part.start) // self.most
                self._read([part], [self.most] * whole + pieces(part.count - whole * self.most, MOST_PIECE))
        few = [part for part in parts if part.count <= LEAST_PIECE and not self._is_long(part)]
        many = [part for part in parts if part.count > LEAST_PIECE and not self._is_long(part)]
        for group, least, most in ((few, LEAST_PIECE, LEAST_PIECE), (many, LEAST_MANY, self.most)):
            if group:
                self._read(group, pieces(sum(part.count for part in group), most, least))

    def leave(self, slot: int, tokens: Tensor, start: int) -> None:
        """Leave a prompt for `catch_up`; it is read at once where prompts are not read together.

        Args:
            slot: The slot, of which nothing `waits`; see `Part`.
            tokens: As `read` takes them; not to be changed meanwhile.
            start: First position to be read, less than T.
        """
        if not self.together:
            self.read(slot, tokens, start)
            return
        assert not self.waits(slot), slot
        self._left[slot] = Part(slot=slot, tokens=tokens, start=start)

    def waits(self, slot: int) -> bool:
        """Say whether a slot's prompt has been left.

        Args:
            slot: The slot.

        Returns:
            Whether it has.
        """
        return slot in self._left

    def catch_up(self) -> None:
        """Read what has been left."""
        parts = list(self._left.values())
        self._left.clear()
        if parts:
            self.read_together(parts)

    def _read(self, parts: Sequence[Part], sizes: Sequence[int]) -> None:
        """Read prompts, one's positions after the other's, in pieces of these sizes."""
        for part in parts:
            length = part.tokens.shape[1]
            fits = part.start < length < self.cache.capacity
            assert fits and self.takes(length), (part.start, length, self.cache.capacity)
        if self._table is None:
            self._table = self.slow.rotary.table(self.cache.capacity, self._rows.device).float()
        last, count = parts[-1], sum(part.count for part in parts)
        longer = F.pad(last.tokens, (0, sum(sizes) - count))  # by text, whose id is valid
        padding = Part(slot=last.slot, tokens=longer, start=last.tokens.shape[1])
        rows = torch.cat([part.rows() for part in (*parts, padding)], dim=1)
        positions, rows = rows[-2, :count], rows.to(self._rows.device)
        done = 0
        for size in sizes:
            self._rows[:, :size] = rows[:, done : done + size]
            self._run(size, self.context_bucket(int(positions[done : done + size].max()) + 1))
            done += size

    def _is_long(self, part: Part) -> bool:
        """Say whether the kernels do not read all of a prompt."""
        return self.context_bucket(part.tokens.shape[1]) > KERNEL_CONTEXT

    def _has_kernels(self, size: int, context: int) -> bool:
        return self.fused is not None and size <= self.fused.prompt_rows and context <= KERNEL_CONTEXT

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
        if self._has_kernels(size, context):
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
        positions = self._positions[:size]
        if self.fused is not None and self._has_kernels(size, context):
            columns = self._tokens[0, :, :size].T.contiguous()
            self.fused.read(columns, positions, self._slots[:size], self.cache, self._table, context)
            return
        rows = self._table[positions.clamp(max=self.cache.capacity - 1)]
        x = self.slow.embed(self._tokens[:, :, :size])
        self.slow.blocks(x, rows, self.cache.piece_attends(self._slots[:1], positions, context))


def reads_together(asked: bool | None, in_pieces: bool, model: DualAR, residual_size: int) -> bool:
    """Say whether a fast decoder of a model reads prompts together.

    Args:
        asked: Whether it shall; None: as measured to be better, where it can.
        in_pieces: Whether it reads prompts in pieces at all.
        model: The model, on its device.
        residual_size: Entries of a residual codebook.

    Returns:
        Whether it does.

    Raises:
        UserError: It shall, and cannot.
    """
    if not (PROMPTS_TOGETHER if asked is None else asked):
        return False
    can = in_pieces and PROMPT_KERNELS
    reason = frame_obstacle(model, residual_size) if can else "they are not read in pieces by the frame's kernels"
    if asked and reason:
        raise UserError(f"prompts together: {reason}", "the frame's kernels, on a GPU", "read them one by one")
    return reason is None


def pieces(count: int, most: int, least: int = LEAST_PIECE) -> list[int]:
    """Cut positions into pieces.

    Args:
        count: Positions, 1 or more.
        most: Positions of the largest piece.
        least: Of the smallest, 16 or 64.

    Returns:
        Sizes in order: as many of the largest as are filled, then the smallest of 16, 64, 128, 256, ... that holds the
        rest; their sum is `count` or more. (32 would be half a millisecond faster than 64, and have kernels of its own
        to compile.)
    """
    whole, rest = divmod(count, most)
    if not rest:
        return [most] * whole
    size = least
    while size < rest:
        size *= 4 if size == LEAST_PIECE else 2
    return [most] * whole + [min(size, most)]
