"""Streaming: the same sound as whole, early, in growing chunks, and stopped at will."""

import pytest
import torch

from s2quant.codec import CodecStream
from s2quant.errors import UserError
from s2quant.runtime import streaming
from s2quant.runtime.decoder import Decoder
from s2quant.runtime.engine import Engine
from s2quant.runtime.speech import Request


@pytest.fixture
def no_end(engine, monkeypatch):
    plain = engine.model.slow.constrained_logits

    def constrained_logits(hidden):
        logits = plain(hidden).clone()
        logits[:, -1] = -1e4
        return logits

    monkeypatch.setattr(engine.model.slow, "constrained_logits", constrained_logits)


def test_the_chunks_together_are_the_whole_sound(engine, no_end):
    request = Request(text="Hello there, this is streamed.", seed=4, max_frames=75)
    chunks, speeches = zip(*engine.stream_request(request), strict=True)
    assert [speech is None for speech in speeches] == [True] * (len(chunks) - 1) + [False]
    assert torch.equal(speeches[-1].codes, engine.speak(request).codes)
    whole = engine.decode(speeches[-1].codes)
    assert whole.shape == (75 * engine.codec.frame_size,)
    torch.testing.assert_close(torch.cat(chunks), whole, atol=1e-5, rtol=0)
    frames = [len(chunk) // engine.codec.frame_size for chunk in chunks]
    assert frames == [4, 8, 16, 32, 15]


def test_chunks_stop_growing_and_the_last_may_be_empty(engine, no_end, monkeypatch):
    monkeypatch.setattr(CodecStream, "push", lambda self, codes: torch.zeros(1, 1, codes.shape[2]))
    chunks = [len(chunk) for chunk, _ in engine.stream_request(Request(text="Hi.", max_frames=188))]
    assert chunks == [4, 8, 16, 32, 64, 64, 0]
    assert [len(chunk) for chunk in engine.stream("Hi.", max_frames=12)] == [4, 8]  # no empty chunk here


def test_the_first_chunk_comes_after_four_frames(engine, no_end, monkeypatch):
    steps = []
    plain = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args: steps.append(1) or plain(self, *args))
    stream = engine.stream("Hello there.", max_frames=200)
    assert not steps
    assert len(next(stream)) == 4 * engine.codec.frame_size
    assert len(steps) == 3  # the first frame comes from the prefill
    next(stream)
    assert len(steps) == 11
    stream.close()
    assert len(steps) == 11 and list(stream) == []
    assert len(engine.speak(Request(text="Hi.", max_frames=2)).codes[0]) == 2  # the engine goes on


def test_two_streams_side_by_side_do_not_disturb_each_other(engine, no_end):
    alone = torch.cat(list(engine.stream("One.", seed=1, max_frames=14)))
    first, second = engine.stream("One.", seed=1, max_frames=14), engine.stream("Two.", seed=2, max_frames=14)
    chunks = [chunk for pair in zip(first, second, strict=True) for chunk in pair]
    torch.testing.assert_close(torch.cat(chunks[::2]), alone, atol=1e-6, rtol=0)


def test_long_text_streams_through_its_batches(engine, no_end):
    text = "<|speaker:0|>" + "One two three. " * 18 + "<|speaker:1|>" + "Four five six. " * 18
    chunks = list(engine.stream_request(Request(text=text, max_frames=6)))
    speech = chunks[-1][1]
    assert speech.batch_frames == (6, 6)
    torch.testing.assert_close(torch.cat([c for c, _ in chunks]), engine.decode(speech.codes), atol=1e-5, rtol=0)


def test_without_a_codec_sound_is_refused_at_once(engine):
    silent = Engine(engine.model, engine.tokenizer)
    for call in (silent.stream, lambda text: silent.stream_request(Request(text=text))):
        with pytest.raises(UserError, match=r"codec\.pth"):
            call("Hello.")
    with pytest.raises(UserError, match=r"codec\.pth"):
        silent.decode(torch.zeros(10, 3, dtype=torch.int64))
    assert silent.speak(Request(text="Hi.", max_frames=2)).codes.shape[0] == 10


def test_a_stream_takes_one_voice_or_several(engine, no_end, tmp_path):
    from s2quant.prompt import Voice

    voice = Voice(text="Said.", codes=torch.arange(10 * 5).view(10, 5))
    one = torch.cat(list(engine.stream("Hi.", voice=voice, max_frames=4)))
    listed = torch.cat(list(engine.stream("Hi.", voice=[voice], max_frames=4)))
    none = torch.cat(list(engine.stream("Hi.", max_frames=4)))
    assert torch.equal(one, listed) and not torch.equal(one, none)


MANY = [Request(text=f"Number {n}.", seed=n, max_frames=count) for n, count in enumerate((30, 3, 12, 75, 29))]


def test_many_at_a_time_are_each_alone(engine, no_end):
    chunks = list(engine.stream_requests(MANY))
    assert chunks[0].index == 1 and {chunk.index for chunk in chunks[:4]} == {0, 1, 2, 3}  # side by side
    for index, request in enumerate(MANY):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [chunk.speech is None for chunk in mine] == [True] * (len(mine) - 1) + [False]
        speech = engine.speak(request)
        assert torch.equal(mine[-1].speech.codes, speech.codes) and mine[-1].speech.index == index
        whole = engine.decode(speech.codes)
        torch.testing.assert_close(torch.cat([chunk.audio for chunk in mine]), whole, atol=1e-5, rtol=0)
    sizes = [len(chunk.audio) // engine.codec.frame_size for chunk in chunks if chunk.index == 3]
    assert sizes == [4, 8, 16, 32, 15]


class Late(streaming._Decoding):
    """A chunk that arrives some events after it was asked for."""

    def __init__(self, clock, after, index, audio, speech):
        super().__init__(index, audio, speech, None)
        self.clock, self.due, self.waited = clock, clock[0] + after, False

    def is_ready(self):
        return self.clock[0] >= self.due

    def chunk(self):
        self.waited = not self.is_ready()
        return super().chunk()


@pytest.mark.parametrize("alone", [True, False])
def test_nobody_waits_for_the_codec_but_for_the_first_sound_of_one_alone(engine, no_end, monkeypatch, alone):
    clock, late = [0], []

    class Slow(streaming.ChunkDecoder):
        def take(self, event):
            clock[0] += 1
            return super().take(event)

    def decoding(index, audio, speech, done):
        late.append(Late(clock, 3, index, audio, speech))
        return late[-1]

    monkeypatch.setattr(streaming, "ChunkDecoder", Slow)
    monkeypatch.setattr(streaming, "_Decoding", decoding)
    request = Request(text="Hello.", seed=4, max_frames=20)
    seen = [(clock[0], chunk) for chunk in streaming.decoded(engine.codec, engine.events([request]), alone)]
    assert [when for when, _ in seen] == [4 if alone else 7, 15, 21]  # 4 and 12 frames, and 3 events more; the end
    assert [one.waited for one in late] == [alone, False, True]
    whole = engine.decode(seen[-1][1].speech.codes)
    torch.testing.assert_close(torch.cat([chunk.audio for _, chunk in seen]), whole, atol=1e-5, rtol=0)


@pytest.fixture
def pushes(monkeypatch):
    """Note the shape [B, F] of everything that the codec's streams decode."""
    seen, push = [], CodecStream.push
    monkeypatch.setattr(CodecStream, "push", lambda self, c: (seen.append((len(c), c.shape[2])), push(self, c))[1])
    return seen


@pytest.mark.parametrize("limit", [512, 32])
def test_chunks_of_many_are_decoded_together_and_sound_the_same(engine, no_end, pushes, monkeypatch, limit):
    plain = streaming.ChunkDecoder
    monkeypatch.setattr(streaming, "ChunkDecoder", lambda codec, **_: plain(codec, grouped=True))
    monkeypatch.setattr(streaming, "GROUP_FRAMES", limit)
    chunks = list(engine.stream_requests(MANY))
    assert (4, 4) in pushes or (3, 4) in pushes
    assert all(batch * frames <= max(limit, frames) for batch, frames in pushes)
    assert len(pushes) < sum(len(chunk.audio) > 0 for chunk in chunks)
    for index, request in enumerate(MANY):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [chunk.speech is None for chunk in mine] == [True] * (len(mine) - 1) + [False]
        sound, speech = torch.cat([chunk.audio for chunk in mine]), engine.speak(request)
        assert torch.equal(mine[-1].speech.codes, speech.codes)
        torch.testing.assert_close(sound, engine.decode(speech.codes), atol=1e-5, rtol=0)


def test_streams_in_step_stay_one_group(engine, no_end, pushes, monkeypatch):
    decoder = streaming.ChunkDecoder(engine.codec, grouped=True)
    requests = [Request(text="Hi.", seed=n, max_frames=60, ignore_end=True) for n in range(4)]
    streams = []
    joined = CodecStream.joined
    monkeypatch.setattr(CodecStream, "joined", lambda rows: (streams.append(joined(rows)), streams[-1])[1])
    begun = [one for event in engine.events(requests) for one in decoder.take(event)] + decoder.flush()
    assert [(b, f) for b, f in pushes if f in (4, 8, 16, 32)] == [(4, 4), (4, 8), (4, 16), (4, 32)]
    assert len({id(stream.memory) for stream in streams[:4]}) == 1  # nothing is copied
    for index in range(4):
        sound = torch.cat([one.chunk().audio for one in begun if one.chunk().index == index])
        codes = engine.speak(requests[index]).codes
        torch.testing.assert_close(sound, engine.decode(codes), atol=1e-5, rtol=0)
