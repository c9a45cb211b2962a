"""Does the sound go on? Chunks that come at certain times, played as they would be heard.

A listener's player begins with the first chunk and plays at the speed of sound. When the next chunk is not there at
the end of the last one, there is a gap (an underrun), and the player goes on when the chunk comes.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2quant.evaluate.first_audio import wait_for
from s2quant.runtime.engine import Engine
from s2quant.runtime.speech import Request


@dataclass(frozen=True, kw_only=True)
class Playback:
    """How one stream was heard.

    Args:
        first_audio_s: When it began; None when there was no sound at all.
        audio_s: Sound in all.
        underruns: Gaps in it.
        longest_gap_s: The longest of them; 0 when there is none.
        late_s: All gaps together: by as much the player should have waited at the beginning to have none.
    """

    first_audio_s: float | None
    audio_s: float
    underruns: int
    longest_gap_s: float
    late_s: float


def play(chunks: Sequence[tuple[float, float]]) -> Playback:
    """Simulate a player.

    Args:
        chunks: When each was ready, in seconds from any zero and never before the one ahead of it, and its length in
            seconds. Those of no length are not heard.

    Returns:
        What was heard.
    """
    assert all(one[0] <= other[0] for one, other in itertools.pairwise(chunks)), "chunks out of order"
    heard = [(ready, length) for ready, length in chunks if length > 0]
    gaps = []
    plays_until = heard[0][0] if heard else 0.0
    for ready, length in heard:
        if ready > plays_until:
            gaps.append(ready - plays_until)
        plays_until = max(ready, plays_until) + length
    return Playback(
        first_audio_s=heard[0][0] if heard else None,
        audio_s=sum(length for _, length in heard),
        underruns=len(gaps),
        longest_gap_s=max(gaps, default=0.0),
        late_s=sum(gaps),
    )


def measure_streams(
    engines: Mapping[str, Engine],
    requests: Sequence[Request],
    counts: Sequence[int],
    repeats: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Stream many requests at a time and play every stream.

    Args:
        engines: Name of the arm -> its engine, of as many slots as there are streams.
        requests: As many as the most streams.
        counts: Streams at a time.
        repeats: Timed rounds; one more is warm-up.
        progress: Told the phase, the rounds done and their total.

    Returns:
        One row per count and arm: streams, arm, first_audio_s (the median stream's, median of the rounds),
        slowest_first_audio_s, underruns (of all streams), streams_with_underruns, longest_gap_s, late_s (each the
        worst of the rounds), audio_s_per_s (median of the rounds).

    Raises:
        UserError: A request cannot be spoken.
    """
    rounds: dict[tuple[int, str], list[tuple[list[Playback], float]]] = {
        (n, arm): [] for n in counts for arm in engines
    }
    total, done = len(counts) * (1 + repeats) * len(engines), 0
    for count in counts:
        for turn in range(1 + repeats):
            for arm, engine in engines.items() if turn % 2 else reversed(list(engines.items())):
                progress(f"{arm}, {count} stream(s)", done, total)
                played = _round(engine, requests[:count])
                done += 1
                if turn:
                    rounds[count, arm].append(played)
    return [_row(count, arm, played) for (count, arm), played in rounds.items()]


def _round(engine: Engine, requests: Sequence[Request]) -> tuple[list[Playback], float]:
    """Stream all requests together: how each was heard, and the seconds that all took."""
    assert engine.codec is not None
    rate = engine.codec.sample_rate
    chunks: dict[int, list[tuple[float, float]]] = {index: [] for index in range(len(requests))}
    engine.prefixes.clear()  # the first sound is that of an engine that has spoken nothing, as in the other tables
    wait_for(engine.device)
    began = time.perf_counter()
    for chunk in engine.stream_requests(requests):
        chunks[chunk.index].append((time.perf_counter() - began, len(chunk.audio) / rate))
    return [play(stream) for stream in chunks.values()], time.perf_counter() - began


def _row(count: int, arm: str, rounds: Sequence[tuple[list[Playback], float]]) -> dict[str, Any]:
    firsts = [[p.first_audio_s for p in played if p.first_audio_s is not None] for played, _ in rounds]
    return {
        "streams": count,
        "arm": arm,
        "first_audio_s": statistics.median(statistics.median(first) for first in firsts),
        "slowest_first_audio_s": max(max(first) for first in firsts),
        "underruns": max(sum(p.underruns for p in played) for played, _ in rounds),
        "streams_with_underruns": max(sum(p.underruns > 0 for p in played) for played, _ in rounds),
        "longest_gap_s": max(max(p.longest_gap_s for p in played) for played, _ in rounds),
        "late_s": max(max(p.late_s for p in played) for played, _ in rounds),
        "audio_s_per_s": statistics.median(sum(p.audio_s for p in played) / took for played, took in rounds),
    }
