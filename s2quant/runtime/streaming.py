"""Frames -> sound while they are being made, of one utterance or of many.

Legend: N codebooks, F frames, s samples of a chunk.

Every utterance is decoded with exact state of its own, in chunks of 4, 8, ... 64 frames: the first sound comes early,
and later chunks cost less per frame. On a CUDA device the codec works on a stream of its own, of higher priority, and
nobody waits for it: the next frames are asked for while a chunk is being decoded, and a chunk is given out at the
first frame after it has arrived. Chunks of several utterances that are full at the same frame are decoded together
there: the host, which launches the frames too, launches fewer operations. On a CPU a chunk is decoded when it is full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2quant.codec import Codec, CodecStream
from s2quant.runtime.chunk_graphs import FIRST_CHUNK_FRAMES, MOST_REPLAYED, ChunkGraphs, side_stream
from s2quant.runtime.slots import Event
from s2quant.runtime.speech import Speech

LARGEST_CHUNK_FRAMES = 64
GROUP_FRAMES = 512  # decoded at a time, of all utterances together: bounds the codec's memory


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
    """One utterance on its way through the codec: a slot of a stream that may be shared."""

    def __init__(self, codec: Codec) -> None:
        self.stream, self.slot = CodecStream(codec), 0
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


@dataclass(frozen=True, kw_only=True)
class _Due:
    """A chunk to be decoded."""

    index: int
    lane: _Lane
    codes: Tensor  # [N, F]
    speech: Speech | None


class ChunkDecoder:
    """The codec behind several utterances that are being spoken.

    Args:
        codec: The codec; shared, not changed.
        grouped: Whether chunks of the same length that are full at the same frame are decoded together, a frame later.
        graphs: Of the codec, for the chunks that have one; None: no chunk has.
    """

    def __init__(self, codec: Codec, grouped: bool = False, graphs: ChunkGraphs | None = None) -> None:
        self.codec, self.grouped, self.graphs = codec, grouped, graphs
        self._lanes: dict[int, _Lane] = {}
        self._due: list[_Due] = []
        self._heard: set[int] = set()  # whose frames have come since the last group
        self._side: torch.cuda.Stream | None = None
        if codec.device.type == "cuda":
            self._side = side_stream(codec.device)
            self._side.wait_stream(torch.cuda.current_stream(codec.device))  # the weights may still be on their way

    def take(self, event: Event) -> list[_Decoding]:
        """Accept a frame or the end of an utterance.

        Args:
            event: From the engine, utterances mixed at will.

        Returns:
            Chunks that are now being decoded.
        """
        speech = event if isinstance(event, Speech) else None
        index = event.index if isinstance(event, Speech) else event[0]
        begun = []
        if speech is None:  # a second frame of the same utterance: the frames of all others have been heard
            begun = self.flush() if index in self._heard else []
            self._heard.add(index)
        if index not in self._lanes:
            self._lanes[index] = _Lane(self.codec)
        lane = self._lanes[index]
        if not isinstance(event, Speech):
            lane.frames.append(event[1])
        if speech is not None or len(lane.frames) == lane.chunk_frames:
            codes = torch.stack(lane.frames, dim=1) if lane.frames else torch.zeros(0, 0, dtype=torch.int64)
            self._due.append(_Due(index=index, lane=lane, codes=codes, speech=speech))
            lane.frames, lane.chunk_frames = [], min(2 * lane.chunk_frames, LARGEST_CHUNK_FRAMES)
        if speech is not None:
            del self._lanes[index]
        return begun if self.grouped else begun + self.flush()

    def flush(self) -> list[_Decoding]:
        """Begin to decode all chunks that are full.

        Returns:
            The chunks; those of one utterance in order: one with sound, one without behind its last frame, or both.
        """
        due, self._due = self._due, []
        self._heard.clear()
        begun: list[_Decoding] = []
        lengths = dict.fromkeys(one.codes.shape[1] for one in due)
        for num_frames in sorted(lengths, key=lambda length: length == 0):  # those without sound last
            same = [one for one in due if one.codes.shape[1] == num_frames]
            size = max(1, GROUP_FRAMES // max(1, num_frames)) if self.grouped else 1
            for start in range(0, len(same), size):
                begun += self._shared_out(same[start : start + size])
        return begun

    def _shared_out(self, group: list[_Due]) -> list[_Decoding]:
        """Decode chunks of one length: those of a graph one by one, unless they are many, the others together."""
        if self.graphs is None:
            return self._decode(group)
        has_graph = [self.graphs.takes(one.lane.stream, one.codes.shape[1]) for one in group]
        if not 0 < sum(has_graph) <= MOST_REPLAYED:
            return self._decode(group)
        begun = [self._replay(one, self.graphs) for one, has in zip(group, has_graph, strict=True) if has]
        others = [one for one, has in zip(group, has_graph, strict=True) if not has]
        return begun + (self._decode(others) if others else [])

    def _replay(self, one: _Due, graphs: ChunkGraphs) -> _Decoding:
        """Decode a chunk by its graph."""
        codes = one.codes[None]
        if self._side is None:
            return _Decoding(one.index, graphs.push(one.lane.stream, codes)[0, 0].cpu().clone(), one.speech, None)
        with torch.cuda.stream(self._side):
            return self._to_host(graphs.push(one.lane.stream, codes.pin_memory())[:, 0], [one])[0]

    def _to_host(self, sound: Tensor, group: list[_Due]) -> list[_Decoding]:
        """Send sound [B, s] to the host, on the codec's stream."""
        host = torch.empty(sound.shape, dtype=sound.dtype, pin_memory=True)
        host.copy_(sound, non_blocking=True)
        done = torch.cuda.Event()
        done.record(self._side)
        return [_Decoding(one.index, row, one.speech, done) for one, row in zip(group, host, strict=True)]

    def _decode(self, group: list[_Due]) -> list[_Decoding]:
        """Decode chunks of one length together."""
        if group[0].codes.shape[1] == 0:
            return [_Decoding(one.index, torch.zeros(0), one.speech, None) for one in group]
        codes = torch.stack([one.codes for one in group])  # [B, N, F]
        if self._side is None:
            audio, done = self._joined(group).push(codes).cpu()[:, 0], None
            return [_Decoding(one.index, row, one.speech, done) for one, row in zip(group, audio, strict=True)]
        with torch.cuda.stream(self._side):
            there = codes.pin_memory().to(self.codec.device, non_blocking=True)  # else the copy waits for the codec
            return self._to_host(self._joined(group).step(there)[:, 0], group)

    @staticmethod
    def _joined(group: list[_Due]) -> CodecStream:
        """Put the group's streams side by side; from now on each lane is a slot of that."""
        stream = CodecStream.joined([(one.lane.stream, one.lane.slot) for one in group])
        for slot, one in enumerate(group):
            one.lane.stream, one.lane.slot = stream, slot
        return stream


def decoded(codec: Codec, events: Iterable[Event], alone: bool, graphs: ChunkGraphs | None = None) -> Iterator[Chunk]:
    """Turn what the engine says into sound.

    Args:
        codec: The codec.
        events: Frames and speeches; asked for only when the chunks so far have been taken or are under way.
        alone: Whether there is one utterance only: its first chunk is then waited for, because nothing is as urgent.
        graphs: Of the codec, for the chunks that have one; None: no chunk has.

    Yields:
        Chunks, those of one utterance in order.
    """
    decoder = ChunkDecoder(codec, grouped=codec.device.type == "cuda" and not alone, graphs=graphs)
    waiting: deque[_Decoding] = deque()
    hurry = alone
    for event in events:
        waiting.extend(decoder.take(event))
        while waiting and (hurry or waiting[0].is_ready()):
            hurry = False
            yield waiting.popleft().chunk()
    waiting.extend(decoder.flush())
    while waiting:
        yield waiting.popleft().chunk()
