"""The frame as one function of device tensors, replayed as one CUDA graph; run as it is on a CPU.

Legend: B slots of a bucket, T prompt positions, N codebooks, K frames of random numbers kept per slot, S of them each.

Everything that differs from frame to frame lives in tensors of fixed addresses: columns, positions, windows, sampling
parameters, the random numbers and which of them come next. So a frame needs nothing from the host but "once more",
and the host may ask for the next frame before it has read the last one (`s2quant.runtime.lagged`). One graph exists
per (batch bucket, context bucket, rank bucket); growing the cache drops them, because its address changes.

A prompt is read up to its last position; that one is fed by the first frame. The random numbers are those of the
plain decoder, in the same blocks (`s2quant.runtime.sampler.Noise`): one launch per slot and block, outside the graph,
ahead of its use, and in turns, so that no frame waits for the blocks of all slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from s2quant.errors import UserError
from s2quant.model import DualAR
from s2quant.runtime.cache import KVCache
from s2quant.runtime.captures import capture, warm_up_stream
from s2quant.runtime.decoder import residual_codes
from s2quant.runtime.fused import FusedFrame
from s2quant.runtime.fused_weights import frame_obstacle
from s2quant.runtime.prefix import PrefixCache, read_prompt
from s2quant.runtime.prompt_graphs import KERNEL_PIECE, PROMPT_KERNELS, PromptReader
from s2quant.runtime.sampler import (
    AHEAD,
    RAS_WINDOW,
    Noise,
    SamplingRows,
    draw_semantic,
    noise_size,
    split_noise,
)
from s2quant.sampling import Sampling

KEPT = 2 * AHEAD  # frames of random numbers kept, two blocks: a frame asked for in vain can be asked for again
FIRST_CONTEXT = 512
FIRST_RANKS = 32
NUM_READS = 4  # copies to the host that may be under way


@dataclass(kw_only=True)
class FrameState:
    """What changes from frame to frame, one row per slot, written in place.

    Args:
        columns: int64 [B, 1+N], the column to be fed, then the one drawn.
        positions: int64 [B], where it goes.
        windows: int64 [B, RAS_WINDOW], recent semantic draws.
        first: bool [B], whether the coming draw is the first after a prompt.
        draws: int64 [B], how many frames of random numbers the utterance has used.
        temperature: float32 [B, 1].
        top_p: float32 [B, 1].
        top_k: int64 [B, 1].
        ignore_end: bool [B].
        noise: float32 [B, K, S], random numbers; see `split_noise`.
    """

    columns: Tensor
    positions: Tensor
    windows: Tensor
    first: Tensor
    draws: Tensor
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    ignore_end: Tensor
    noise: Tensor

    def move(self, source: int, target: int) -> None:
        """Copy one slot's row over another's, in place.

        Args:
            source: Slot to copy from.
            target: Slot to overwrite.
        """
        for tensor in vars(self).values():
            tensor[target] = tensor[source]


class Read:
    """Columns on their way to the host."""

    def __init__(self, columns: Tensor, done: torch.cuda.Event | None) -> None:
        self._columns, self._done = columns, done

    def columns(self) -> Tensor:
        """Wait for the columns.

        Returns:
            int64 [B, 1+N], on the CPU.
        """
        if self._done is not None:
            self._done.synchronize()
        return self._columns.clone()


class FastDecoder:
    """The cached model for up to B slots, one frame per call without waiting.

    Args:
        model: The model, in eval mode.
        num_slots: B at most.
        capacity: Positions per slot to begin with.
        residual_size: Entries of a residual codebook that exist in the codec; logits above are never drawn.
        graphs: Whether frames are captured as CUDA graphs; only on a CUDA device.
        fused: Whether frames are made by our own kernels (`s2quant.runtime.fused`); None: where they can.
        prompt_graphs: Whether prompts are read in padded pieces (`s2quant.runtime.prompt_graphs`), captured as frames.
        prompts_together: Whether those that begin before the same frame are read together, where the kernels read them.

    Raises:
        UserError: Kernels are wanted and cannot run this model.
    """

    def __init__(
        self,
        model: DualAR,
        num_slots: int,
        capacity: int,
        residual_size: int,
        graphs: bool | None = None,
        fused: bool | None = None,
        prompt_graphs: bool = False,
        prompts_together: bool = False,
    ) -> None:
        self.model, self.config, self.num_slots, self.residual_size = model, model.config, num_slots, residual_size
        weight = model.slow.embeddings.weight
        self.device = weight.device
        self.graphs_wanted = self.device.type == "cuda" if graphs is None else graphs
        assert not self.graphs_wanted or self.device.type == "cuda", "graphs need a CUDA device"
        self.num_semantic = self.config.semantic_end_id - self.config.semantic_begin_id + 1
        self.max_positions = self.config.slow.max_seq_len
        with torch.inference_mode(False):  # written inside and outside of that mode
            self.cache = KVCache(self.config.slow, num_slots, self._context_bucket(capacity), self.device, weight.dtype)
            self.fast_cache = KVCache(self.config.fast, num_slots, self.config.num_codebooks, self.device, weight.dtype)
            self.state = self._state()
            self._host = self._host_ring()
        self.fused_obstacle = frame_obstacle(model, residual_size, fused)
        if fused and self.fused_obstacle:
            raise UserError(f"fused frames: {self.fused_obstacle}", "a model its kernels take", "leave them out")
        self._fused: FusedFrame | None = None
        if self.fused_obstacle is None:
            rows = KERNEL_PIECE if prompt_graphs and PROMPT_KERNELS else 0
            self._fused = FusedFrame(model, num_slots, residual_size, self.max_positions, prompt_rows=rows)
        self._table = model.slow.rotary.table(self.cache.capacity, self.device)
        self._graphs: dict[tuple[int, int, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.graphs_wanted else None
        self.reader: PromptReader | None = None
        if prompt_graphs:
            bucket = partial(context_bucket, most=self.max_positions)  # not this decoder's: no cycle
            how = (self.graphs_wanted, self._pool, None, self._fused, prompts_together)
            self.reader = PromptReader(model.slow, self.cache, bucket, *how)
        self._num_reads = 0
        self._noises: list[Noise | None] = [None] * num_slots
        self.positions = [0] * num_slots  # where each slot's next column goes, known to the host
        self.prefixes: PrefixCache | None = None  # what prompts begin with, where somebody keeps it
        self._drawn, self._made, self._top_k = [0] * num_slots, [0] * num_slots, [1] * num_slots

    def _state(self) -> FrameState:
        slots, device = self.num_slots, self.device
        size = noise_size(self.num_semantic, self.config.num_codebooks - 1, self.residual_size)
        return FrameState(
            columns=torch.zeros(slots, 1 + self.config.num_codebooks, dtype=torch.int64, device=device),
            positions=torch.zeros(slots, dtype=torch.int64, device=device),
            windows=torch.full((slots, RAS_WINDOW), -1, device=device),
            first=torch.zeros(slots, dtype=torch.bool, device=device),
            draws=torch.zeros(slots, dtype=torch.int64, device=device),
            temperature=torch.ones(slots, 1, device=device),
            top_p=torch.ones(slots, 1, device=device),
            top_k=torch.ones(slots, 1, dtype=torch.int64, device=device),
            ignore_end=torch.zeros(slots, dtype=torch.bool, device=device),
            noise=torch.zeros(slots, KEPT, size, device=device),
        )

    def _host_ring(self) -> Tensor:
        shape = (NUM_READS, self.num_slots, 1 + self.config.num_codebooks)
        return torch.zeros(shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    # ---- utterances --------------------------------------------------------------------------------------------

    def seat(self, slot: int, noise: Noise, sampling: Sampling, ignore_end: bool) -> None:
        """Give a slot to an utterance.

        Args:
            slot: The slot.
            noise: The utterance's random numbers, on the model's device; none of them taken.
            sampling: Its sampling parameters.
            ignore_end: Whether the end is never drawn.
        """
        state = self.state
        self._noises[slot], self._top_k[slot] = noise, sampling.top_k
        self._made[slot] = 0
        state.temperature[slot], state.top_p[slot], state.top_k[slot] = (
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
        )
        state.ignore_end[slot] = ignore_end

    def begin(self, slot: int, tokens: Tensor, drawn: int, held: int = 0, prefix: int = 0) -> None:
        """Read a prompt into a slot, before the next frame at the latest; that is the first after it.

        Args:
            slot: The slot; what it held behind the first `held` positions is overwritten.
            tokens: int64 [1+N, T], on the CPU.
            drawn: Frames that the utterance has drawn for good before this prompt: its random numbers go on there.
            held: First positions that the slot holds already; less than T.
            prefix: First positions that other prompts may share; see `read_prompt`.
        """
        slow, state, length = self.model.slow, self.state, tokens.shape[1]
        self.ensure(length)
        if self.reader is not None and self.reader.waits(slot):  # a run that was given up has left it
            self.reader.catch_up()
        assert drawn <= self._made[slot] <= drawn + KEPT, (drawn, self._made[slot])
        state.columns[slot] = tokens[:, -1].to(self.device)  # waits for the device, so before it is given work
        before, kept, reader = tokens[:, :-1], self.prefixes, self.reader
        read_prompt(slow, self.cache, slot, before, held=held, prefix=prefix, prefixes=kept, reader=reader)
        state.positions[slot], state.draws[slot] = length - 1, drawn
        state.windows[slot], state.first[slot] = -1, True
        self.positions[slot], self._drawn[slot] = length - 1, drawn

    def move(self, source: int, target: int) -> None:
        """Move an utterance to another slot.

        Args:
            source: Its slot.
            target: The slot to overwrite.
        """
        if self.reader is not None:
            self.reader.catch_up()
        self.cache.move(source, target, min(self.positions[source], self.cache.capacity))
        self.state.move(source, target)
        self._noises[target] = self._noises[source]
        for values in (self.positions, self._drawn, self._made, self._top_k):
            values[target] = values[source]

    def free(self, slot: int) -> None:
        """Leave a slot empty: frames that have it nonetheless look at little for it.

        Args:
            slot: The slot; what it holds is not read any more.
        """
        self.state.positions[slot] = self.positions[slot] = 0

    def ensure(self, capacity: int) -> None:
        """Make room, keeping what is there; graphs are dropped when the cache has to grow.

        Args:
            capacity: Positions needed per slot.
        """
        if capacity > self.cache.capacity:
            self._graphs.clear()
            if self.reader is not None:
                self.reader.forget()
            if self._pool is not None:  # torch does not take a pool again that has lost all of its graphs
                self._pool = torch.cuda.graph_pool_handle()
                if self.reader is not None:
                    self.reader.pool = self._pool
            self.cache.ensure(self._context_bucket(capacity))
            self._table = self.model.slow.rotary.table(self.cache.capacity, self.device)

    # ---- frames ------------------------------------------------------------------------------------------------

    def launch(self, count: int, rows: int = 0) -> Read:
        """Make one more frame in each of the first slots, without waiting for it.

        Args:
            count: Number of slots.
            rows: Slots that the frame has at least: those beyond `count` are made in vain.

        Returns:
            The columns to come; to be read before NUM_READS more frames are asked for.
        """
        if self.reader is not None:
            self.reader.catch_up()
        for slot in range(count):
            self._make_noise(slot)
        live = min(max(self.positions[:count]) + 1, self.cache.capacity)
        ranks = self._rank_bucket(count) if self._fused is None else 0  # the fused frame has one graph for any top_k
        key = (_bucket(max(count, rows), 1, self.num_slots), self._context_bucket(live), ranks)
        self.replay(key)
        for slot in range(count):
            self.positions[slot] += 1
            self._drawn[slot] += 1
        host = self._host[self._num_reads % NUM_READS][:count]
        self._num_reads += 1
        host.copy_(self.state.columns[:count], non_blocking=True)
        if self.device.type != "cuda":
            return Read(host, None)
        done = torch.cuda.Event()
        done.record()
        return Read(host, done)

    def replay(self, key: tuple[int, int, int]) -> None:
        """Run a frame; capture it first where graphs are wanted and this one does not exist.

        Args:
            key: Batch, context and rank bucket.
        """
        if not self.graphs_wanted:
            self._frame(*key)
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
        self._graphs[key].replay()

    def _capture(self, key: tuple[int, int, int]) -> torch.cuda.CUDAGraph:
        """Capture a frame; the state and the caches are afterwards what they were before."""
        before = [tensor.clone() for tensor in vars(self.state).values()]
        where = self.state.positions[: key[0]].clamp(max=self.cache.capacity - 1)
        rows = torch.arange(key[0], device=self.device)
        kept = [part[:, rows, :, where].clone() for part in (self.cache.keys, self.cache.values)]
        stream = warm_up_stream(self.device)
        if self._fused is not None:
            from s2quant.runtime.kernels.launch import compile_together

            compile_together(lambda: self._frame(*key))
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._frame(*key)  # warm-up: libraries choose their kernels and take their work space
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with capture(graph, self._pool):
            self._frame(*key)
        for tensor, old in zip(vars(self.state).values(), before, strict=True):
            tensor.copy_(old)
        for part, old in zip((self.cache.keys, self.cache.values), kept, strict=True):
            part[:, rows, :, where] = old
        return graph

    @torch.inference_mode()
    def _frame(self, batch: int, context: int, ranks: int) -> None:
        """Feed each of the first slots its column and draw the next one, in place."""
        if self._fused is not None:
            self._fused.run(self.state, (self.cache, self.fast_cache), self._table, batch, context)
            return
        state, slow, config = self.state, self.model.slow, self.config
        columns, positions, first = state.columns[:batch], state.positions[:batch], state.first[:batch]
        windows, draws = state.windows[:batch], state.draws[:batch]
        where = positions.clamp(max=context - 1)  # a row that is asked on in vain stays inside
        x = slow.embed(columns[..., None])
        x = slow.blocks(x, self._table[where][:, None], self.cache.bucket_attends(where, context))
        hidden = slow.norm(x[:, 0])
        rows = SamplingRows(
            temperature=state.temperature[:batch],
            top_p=state.top_p[:batch],
            top_k=state.top_k[:batch],
            max_top_k=ranks,
            ignore_end=state.ignore_end[:batch],
        )
        slots, turn = torch.arange(batch, device=self.device), draws % KEPT
        window = windows.masked_fill(first[:, None], -1)  # nothing is a repetition at first
        uniform, uniform_fast = split_noise(state.noise[slots, turn], self.num_semantic, self.residual_size)
        semantic = draw_semantic(slow.constrained_logits(hidden), rows, uniform, window, self.num_semantic)
        shifted = torch.cat([windows[:, 1:], semantic[:, None]], dim=1)
        windows.copy_(torch.where(first[:, None], windows, shifted))
        ended = semantic == self.num_semantic
        codes = residual_codes(
            self.model.fast,
            self.fast_cache,
            hidden,
            semantic.masked_fill(ended, 0),
            rows,
            uniform_fast,
            self.residual_size,
        )
        token = torch.where(ended, config.im_end_id, semantic + config.semantic_begin_id)
        columns.copy_(torch.cat([token[:, None], codes], dim=1))
        positions.add_(1)
        draws.add_(1)
        first.fill_(False)

    def _make_noise(self, slot: int) -> None:
        """Make a slot's next block of random numbers: at once if the coming frame has none, else when it is its turn.

        A block is made when fewer than AHEAD frames are left, over frames that nobody can ask for again.
        """
        noise, left = self._noises[slot], self._made[slot] - self._drawn[slot]
        its_turn = (self._num_reads + slot) % AHEAD == 0
        if noise is None or (left > 0 and not (left < AHEAD and its_turn)):
            return
        start = self._made[slot] % KEPT
        noise.fill(self.state.noise[slot, start : start + AHEAD])
        self._made[slot] += AHEAD

    def _context_bucket(self, live: int) -> int:
        return context_bucket(live, self.max_positions)

    def _rank_bucket(self, count: int) -> int:
        return _bucket(max(self._top_k[:count]), FIRST_RANKS, self.num_semantic + 1)


def context_bucket(live: int, most: int) -> int:
    """Round positions up to what a cache has room for, and a frame looks at.

    Args:
        live: Positions.
        most: Positions that the model takes.

    Returns:
        FIRST_CONTEXT times a power of two, or `most`.
    """
    return _bucket(live, FIRST_CONTEXT, most)


def _bucket(wanted: int, first: int, most: int) -> int:
    """Give the smallest of first, 2 first, 4 first, ... that holds what is wanted, but no more than the most."""
    size = first
    while size < wanted:
        size *= 2
    return min(size, most)
