"""Frames -> sound while they are being made, of one utterance or of many.

Legend: N codebooks, F frames, s samples of a chunk.

Every utterance is decoded with exact state of its own, in chunks of 4, 8, ... 64 frames: the first sound comes early,
and later chunks cost less per frame. On a CUDA device the codec works on a stream of its own, of higher priority, and
nobody waits for it: the next frames are asked for while a chunk is being decoded, and a chunk is given out at the
first frame after it has arrived. On a CPU a chunk is decoded when it is full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2quant.codec import Codec, CodecStream
from s2quant.runtime.slots import Event
from s2quant.runtime.speech import Speech

FIRST_CHUNK_FRAMES = 4
LARGEST_CHUNK_FRAMES = 64


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Sound of one utterance, following what was given of it before.

    Args:
        index: The request's place in the list.
        audio: float32 [s], on the CPU; may be empty in the last chunk.
        speech: The whole speech beside the last chunk, else None.
    """

    index: int
    audio: Tensor
    speech: Speech | None = None


class _Lane:
    """One utterance on its way through the codec."""

    def __init__(self, codec: Codec) -> None:
        self.stream = CodecStream(codec)
        self.frames: list[Tensor] = []
        self.chunk_frames = FIRST_CHUNK_FRAMES


class _Decoding:
    """A chunk under way."""

    def __init__(self, index: int, audio: Tensor, speech: Speech | None, done: torch.cuda.Event | None) -> None:
        self._chunk = Chunk(index=index, audio=audio, speech=speech)
        self._done = done

    def is_ready(self) -> bool:
        return self._done is None or self._done.query()

    def chunk(self) -> Chunk:
        if self._done is not None:
            self._done.synchronize()
        return self._chunk


class ChunkDecoder:
    """The codec behind several utterances that are being spoken.

    Args:
        codec: The codec; shared, not changed.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._lanes: dict[int, _Lane] = {}
        self._side: torch.cuda.Stream | None = None
        if codec.device.type == "cuda":
            self._side = torch.cuda.Stream(codec.device, priority=-1)
            self._side.wait_stream(torch.cuda.current_stream(codec.device))  # the weights may still be on their way

    def take(self, event: Event) -> _Decoding | None:
        """Accept a frame or the end of an utterance.

        Args:
            event: From the engine, utterances mixed at will.

        Returns:
            The chunk that this event completes, perhaps still under way; None if it completes none.
        """
        if isinstance(event, Speech):
            lane = self._lanes.pop(event.index, None)
            return self._decode(event.index, lane, event)
        index, frame = event
        if index not in self._lanes:
            self._lanes[index] = _Lane(self.codec)
        lane = self._lanes[index]
        lane.frames.append(frame)
        if len(lane.frames) < lane.chunk_frames:
            return None
        lane.chunk_frames = min(2 * lane.chunk_frames, LARGEST_CHUNK_FRAMES)
        return self._decode(index, lane, None)

    def _decode(self, index: int, lane: _Lane | None, speech: Speech | None) -> _Decoding:
        if lane is None or not lane.frames:
            return _Decoding(index, torch.zeros(0), speech, None)
        codes = torch.stack(lane.frames, dim=1)[None]  # [1, N, F]
        lane.frames = []
        if self._side is None:
            return _Decoding(index, lane.stream.push(codes).cpu()[0, 0], speech, None)
        with torch.cuda.stream(self._side):
            there = codes.pin_memory().to(self.codec.device, non_blocking=True)  # else the copy waits for the codec
            audio = lane.stream.step(there)[0, 0]
            host = torch.empty(audio.shape, dtype=audio.dtype, pin_memory=True)
            host.copy_(audio, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._side)
        return _Decoding(index, host, speech, done)


def decoded(codec: Codec, events: Iterable[Event], alone: bool) -> Iterator[Chunk]:
    """Turn what the engine says into sound.

    Args:
        codec: The codec.
        events: Frames and speeches; asked for only when the chunks so far have been taken or are under way.
        alone: Whether there is one utterance only: its first chunk is then waited for, because nothing is as urgent.

    Yields:
        Chunks, those of one utterance in order.
    """
    decoder = ChunkDecoder(codec)
    waiting: deque[_Decoding] = deque()
    hurry = alone
    for event in events:
        decoding = decoder.take(event)
        if decoding is not None:
            waiting.append(decoding)
        while waiting and (hurry or waiting[0].is_ready()):
            hurry = False
            yield waiting.popleft().chunk()
    while waiting:
        yield waiting.popleft().chunk()
