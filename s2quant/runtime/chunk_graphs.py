"""Chunks of sound by replayed CUDA graphs: hundreds of operations of the codec cost the host one launch.

Legend: N codebooks, F frames, s samples of a chunk.

A graph decodes F frames of one utterance: codes, sound and the codec's memory lie at fixed addresses. The graph of a
first chunk forgets what the memory held and starts afresh; that of a later one needs the utterance's memory copied in.
Afterwards the utterance gets a copy of the memory, so whatever decodes its next chunk goes on exactly. All graphs of a
codec share their memory for what lies between, and are replayed on the codec's own stream, one after the other.

The codec's weights must stay where and as they are (`Codec.rest_encoder` moves none that decoding needs). Without
capturing, the same function runs operation by operation, on any device: the tests compare that with the usual way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2quant.codec import Codec, CodecStream
from s2quant.codec.blocks import CausalTransposedConv
from s2quant.errors import UserError
from s2quant.runtime.captures import capture, capture_stream

# Whether an engine on a CUDA device uses graphs unless it is told: first sound 9 ms earlier, for 44 MB
# (reports/2026-11-26-h100). Graphs of later chunks would take more memory, and nobody waits for these chunks.
CODEC_GRAPHS = True
FIRST_CHUNK_FRAMES = 4
LATER_FRAMES: tuple[int, ...] = ()  # such as (8, 16): numbers of frames of later chunks that have a graph, too
MOST_REPLAYED = 4  # utterances; more are decoded together, operation by operation


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the codec's stream, one per device: memory that a stream has freed is kept for that stream.

    Args:
        device: A CUDA device.

    Returns:
        Its stream, of higher priority than the frames'.
    """
    return torch.cuda.Stream(device, priority=-1)


@dataclass(frozen=True, kw_only=True)
class _Program:
    """What decodes a number of frames."""

    fresh: bool
    codes: Tensor  # int64 [1, N, F]
    audio: Tensor  # float32 [1, 1, s]
    graph: torch.cuda.CUDAGraph | None


class ChunkGraphs:
    """The graphs of one codec.

    Args:
        codec: The codec; shared, not changed.
        later_frames: Frames of the later chunks that have a graph.
        captured: Whether graphs are captured; None: on a CUDA device.

    Raises:
        UserError: Graphs are wanted of a codec that is not on a CUDA device.
    """

    def __init__(self, codec: Codec, later_frames: Sequence[int] = LATER_FRAMES, captured: bool | None = None) -> None:
        on_cuda = codec.device.type == "cuda"
        self.captured = on_cuda if captured is None else captured
        if self.captured and not on_cuda:
            raise UserError(f"graphs of a codec on {codec.device}", "a CUDA device", "leave them out")
        self.codec, self.stream = codec, CodecStream(codec)
        self._pool = torch.cuda.graph_pool_handle() if self.captured else None
        keys = [(True, FIRST_CHUNK_FRAMES), *((False, frames) for frames in later_frames)]
        with contextlib.ExitStack() as stack:
            if on_cuda:
                side = side_stream(codec.device)
                side.wait_stream(torch.cuda.current_stream(codec.device))  # the weights may still be on their way
                stack.enter_context(torch.cuda.stream(side))
            self._settle()
            self._programs = {key: self._program(*key) for key in keys}
        # what graphs read beside the codec's own weights lives as long as they do
        self._read = [m.arranged for m in codec.modules() if isinstance(m, CausalTransposedConv)]

    def _settle(self) -> None:
        """Make the memory, in one piece: where it lies from now on."""
        codes = torch.zeros(1, self.codec.num_codebooks, 1, dtype=torch.int64, device=self.codec.device)
        self.stream.step(codes)
        self.stream.memory.gather()

    def _program(self, fresh: bool, frames: int) -> _Program:
        device = self.codec.device
        with torch.inference_mode(False):  # written inside and outside of that mode
            codes = torch.zeros(1, self.codec.num_codebooks, frames, dtype=torch.int64, device=device)
            audio = torch.zeros(1, 1, frames * self.codec.frame_size, device=device)
        program = _Program(fresh=fresh, codes=codes, audio=audio, graph=None)
        if not self.captured:
            return program
        self.decode(program)  # libraries choose their kernels and take their work space
        graph = torch.cuda.CUDAGraph()
        with capture(graph, self._pool, capture_stream(device)):
            self.decode(program)
        return _Program(fresh=fresh, codes=codes, audio=audio, graph=graph)

    @torch.no_grad()
    def decode(self, program: _Program) -> None:
        """Decode a program's codes into its sound, going on from the memory; what a graph captures.

        Args:
            program: The program; its sound is written in place, as is the memory.
        """
        if program.fresh:
            self.stream.reset()
        program.audio.copy_(self.stream.step(program.codes))

    def takes(self, stream: CodecStream, num_frames: int) -> bool:
        """Say whether there is a graph for a chunk.

        Args:
            stream: Of the utterance.
            num_frames: F.

        Returns:
            Whether `push` takes it.
        """
        return stream.memory.batch_size == 1 and (stream.state_bytes == 0, num_frames) in self._programs

    @torch.no_grad()
    def push(self, stream: CodecStream, codes: Tensor) -> Tensor:
        """Decode the next frames of one utterance, as `CodecStream.step` does.

        Args:
            stream: Of the utterance; such a chunk as `takes` takes. Its memory is afterwards its own.
            codes: int64 [1, N, F], on the codec's device or in pinned memory, not negative.

        Returns:
            float32 [1, 1, s] on the codec's device, good until the next call.
        """
        fresh = stream.state_bytes == 0
        program = self._programs[fresh, codes.shape[-1]]
        program.codes.copy_(codes, non_blocking=True)
        if not fresh:
            self.stream.memory.copy_(stream.memory)
        if program.graph is None:
            self.decode(program)
        else:
            program.graph.replay()
        if fresh:
            stream.memory = self.stream.memory.clone()
        else:
            stream.memory.copy_(self.stream.memory)
        return program.audio
