"""Continuity: a player with known gaps, streams that come at known times, and the figures of `bench`."""

import json

import pytest
import torch

from s2quant.cli import main
from s2quant.evaluate import continuity
from s2quant.evaluate.continuity import Playback, measure_streams, play
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import Request
from s2quant.runtime.streaming import Chunk


def test_chunks_in_time_have_no_gap():
    assert play([(1.0, 0.5), (1.2, 1.0), (2.5, 1.0)]) == Playback(
        first_audio_s=1.0, audio_s=2.5, underruns=0, longest_gap_s=0.0, late_s=0.0
    )  # the last one comes at the very moment


def test_gaps_are_counted_and_the_player_goes_on_later():
    heard = play([(1.0, 0.5), (2.0, 1.0), (2.5, 0.25), (3.5, 1.0)])
    assert heard == Playback(first_audio_s=1.0, audio_s=2.75, underruns=2, longest_gap_s=0.5, late_s=0.75)


def test_no_sound_and_chunks_of_no_length():
    assert (
        play([])
        == play([(1.0, 0.0)])
        == Playback(first_audio_s=None, audio_s=0.0, underruns=0, longest_gap_s=0.0, late_s=0.0)
    )
    assert play([(1.0, 1.0), (9.0, 0.0)]).underruns == 0
    with pytest.raises(AssertionError, match="out of order"):
        play([(2.0, 1.0), (1.0, 1.0)])


def waited(chunks, seconds):
    """What a player has that begins so long after the first chunk: all that came before is ready then."""
    begin = chunks[0][0] + seconds
    return [(max(ready, begin), length) for ready, length in chunks]


@pytest.mark.parametrize("seed", range(20))
def test_to_have_waited_for_as_long_as_all_gaps_is_enough_and_no_less_is(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(30, generator=generator) + 0.1
    ready = (1.1 * torch.rand(30, generator=generator)).cumsum(0)
    chunks = list(zip(ready.tolist(), lengths.tolist(), strict=True))
    heard = play(chunks)
    schedule = [at - chunks[0][0] - sum(length for _, length in chunks[:n]) for n, (at, _) in enumerate(chunks)]
    assert heard.late_s == pytest.approx(max(schedule)) and heard.longest_gap_s <= heard.late_s + 1e-9
    assert (heard.underruns > 0) == (heard.late_s > 0)
    assert play(waited(chunks, heard.late_s + 1e-6)).underruns == 0
    if heard.underruns:
        assert play(waited(chunks, 0.9 * heard.late_s)).underruns > 0


@pytest.mark.parametrize("count", [1, 8, 32])
def test_growing_chunks_play_on_while_speaking_is_faster_than_half_of_real_time(count):
    """Frames of all streams at a steady pace, chunks of 4, 8, ... 64 frames: what the engine's sizes allow."""
    sizes = [4, 8, 16, 32, 64, 64, 64]
    for share, gaps in ((0.45, False), (0.55, True)):  # time per frame of sound, over the frame's length
        for stream in range(count):
            asked, ready = 0.0, []
            for size in sizes:
                asked += size
                ready.append((0.1 + 0.001 * stream + share * asked, float(size)))
            assert (play(ready).underruns > 0) == gaps


class Scripted:
    """An engine whose chunks come at scripted times."""

    def __init__(self, engine, clock, script):
        self.codec, self.device, self.clock, self.script = engine.codec, engine.device, clock, script
        self.asked = []
        self.prefixes, self.cleared = self, 0

    def clear(self):
        self.cleared += 1

    def stream_requests(self, requests):
        self.asked.append(len(requests))
        assert self.cleared == len(self.asked)  # no round knows prefixes of an earlier one
        start = self.clock[0]
        for at, index, seconds in self.script:
            self.clock[0] = start + at
            yield Chunk(index=index, audio=torch.zeros(round(seconds * self.codec.sample_rate)))


def test_streams_are_played_one_by_one(tiny_folder, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(continuity.time, "perf_counter", lambda: clock[0])
    script = [(0.5, 0, 1.0), (1.0, 1, 1.0), (1.25, 0, 2.0), (3.0, 1, 1.0), (4.0, 0, 0.5)]
    engine = Scripted(load_engine(tiny_folder), clock, script)
    (row,) = measure_streams({"only": engine}, [Request(text="Hi.")] * 2, [2], 3, lambda *_: None)
    assert engine.asked == [2] * 4
    assert row == {
        "streams": 2,
        "arm": "only",
        "first_audio_s": 0.75,
        "slowest_first_audio_s": 1.0,
        "underruns": 2,
        "streams_with_underruns": 2,
        "longest_gap_s": 1.0,
        "late_s": 1.0,
        "audio_s_per_s": pytest.approx(5.5 / 4),
    }


def test_bench_times_first_sounds_and_streams(tiny_folder, tmp_path, capsys):
    out = tmp_path / "bench"
    words = ["bench", "--model", str(tiny_folder), "--frames", "14", "--repeats", "1", "--dtype", "float32"]
    assert main([*words, "--streams", "1,3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "bench.json").read_text())
    anew, voice, prefix = result["first_audio"]
    assert [row["state"] for row in result["first_audio"]] == ["anew", "voice kept", "voice and prefix kept"]
    assert {row["num_voice_frames"] for row in result["first_audio"]} == {216}  # ten seconds
    assert anew["voice_s"] > 5 * voice["voice_s"] and anew["first_audio_s"] > voice["first_audio_s"]
    assert prefix["first_audio_s"] < anew["first_audio_s"]
    assert [(row["streams"], row["arm"]) for row in result["streams"]] == [(1, "bf16"), (3, "bf16")]
    for row in result["streams"]:
        assert 0 < row["first_audio_s"] <= row["slowest_first_audio_s"] and row["audio_s_per_s"] > 0
    assert printed.count("voice and prefix kept") == 1 and "underruns" in printed
    assert main([*words, "--streams", "1,1"]) == 2 and main([*words, "--streams", "x"]) == 2
    assert main([*words, "--voice", "x.wav"]) == 2 and "give both" in capsys.readouterr().err
