"""Streamed decoding equals whole decoding, whatever the chunks, and carries a constant state."""

import pytest
import torch
from codec_cases import TINY, random_codes
from torch import nn

from s2quant.codec import CodecStream
from s2quant.codec.memory import Memory
from s2quant.codec.transformer import WindowTransformer
from s2quant.errors import UserError

CHUNKS = {"one by one": [1] * 40, "uneven": [1, 4, 2, 13, 1, 19], "past the window": [30, 10], "whole": [40]}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_any_chunks_give_the_whole_decode(short, chunks):
    codes = random_codes(short.config, 2, 40)
    stream = CodecStream(short, batch_size=2)
    pieces = [stream.push(chunk) for chunk in codes.split(chunks, dim=-1)]
    assert [piece.shape[-1] for piece in pieces] == [n * short.frame_size for n in chunks]
    assert (torch.cat(pieces, dim=-1) - short.decode(codes, None)).abs().max() < 1e-5


def test_the_tiny_codec_past_its_window(tiny):
    codes = random_codes(TINY, 1, 270)
    stream = CodecStream(tiny)
    pieces = [stream.push(chunk) for chunk in codes.split([4, 131, 1, 25, 109], dim=-1)]
    assert (torch.cat(pieces, dim=-1) - tiny.decode(codes, None)).abs().max() < 1e-5


def test_the_state_does_not_grow(short):
    stream = CodecStream(short)
    assert stream.state_bytes == 0
    sizes = []
    for chunk in random_codes(short.config, 1, 60).split([1, 2, 1, 30, 1, 25], dim=-1):
        stream.push(chunk)
        sizes.append(stream.state_bytes)
    assert len(set(sizes)) == 1 and sizes[0] > 0


def test_a_reset_stream_is_a_new_one(short):
    codes = random_codes(short.config, 1, 9)
    stream = CodecStream(short)
    first = stream.push(codes)
    assert (stream.push(codes) - first).abs().max() > 1e-3
    stream.reset()
    assert torch.equal(stream.push(codes), first)


def test_one_slot_is_reset_and_the_others_go_on(short):
    codes = random_codes(short.config, 3, 24)
    stream = CodecStream(short, batch_size=3)
    stream.push(codes[..., :11])
    stream.reset([1])
    audio = torch.cat([stream.push(codes[..., t : t + 1]) for t in range(11, 24)], dim=-1)
    whole = short.decode(codes, None)[..., 11 * short.frame_size :]
    assert (audio[[0, 2]] - whole[[0, 2]]).abs().max() < 1e-5
    assert (audio[1] - short.decode(codes[1:2, :, 11:], None)[0]).abs().max() < 1e-5


def test_positions_are_absolute_and_unbounded(short):
    """A stream a million frames old goes on with the same rotary angles that a table of that length would have."""
    stream = CodecStream(short)
    codes = random_codes(short.config, 1, 12)
    fresh = stream.push(codes)
    module = short.quantizer.post_module
    with torch.no_grad():
        seen = stream.memory.buffer(module, "seen", (), fresh, torch.int64)
        assert seen.tolist() == [12]
        stream.reset()
        seen += 1_000_000
    late = stream.push(codes)
    assert seen.tolist() == [1_000_012]
    assert torch.isfinite(late).all()
    # The angles are relative, so audio differs only by the table's rounding and by keys of zeros that now count.
    assert 0 < (late - fresh)[..., -short.frame_size :].abs().max() < 0.5


def test_a_memory_serves_both_modes_of_inference(short):
    codes = random_codes(short.config, 1, 6)
    stream = CodecStream(short)
    with torch.inference_mode():
        first = stream.push(codes[..., :3])
    audio = torch.cat([first, stream.push(codes[..., 3:])], dim=-1)
    assert (audio - short.decode(codes)).abs().max() < 1e-5


def test_the_callers_codes_are_kept_and_clamped(short):
    codes = random_codes(short.config, 1, 3)
    codes[0, 0, 0], codes[0, 1, 1] = 64, 999
    before = codes.clone()
    assert torch.allclose(CodecStream(short).push(codes), short.decode(codes), atol=1e-6)
    assert torch.equal(codes, before)


def test_nothing_pushed_gives_nothing(short):
    stream = CodecStream(short, batch_size=2)
    assert stream.push(random_codes(short.config, 2, 0)).shape == (2, 1, 0)
    assert stream.state_bytes == 0


def test_bad_pushes_are_refused_and_leave_the_stream_alone(short):
    codes = random_codes(short.config, 2, 8)
    stream = CodecStream(short, batch_size=2)
    first = stream.push(codes[..., :4])
    for bad in (codes[:1], codes[:, :2], codes - 100, codes.float()):
        with pytest.raises(UserError):
            stream.push(bad)
    audio = torch.cat([first, stream.push(codes[..., 4:])], dim=-1)
    assert (audio - short.decode(codes)).abs().max() < 1e-5


def test_a_memory_refuses_gradients():
    with pytest.raises(AssertionError, match="in place"):
        Memory(1).buffer(nn.Identity(), "x", (1,), torch.zeros(1))


def test_every_layer_is_remembered_by_itself(short):
    stream = CodecStream(short)
    stream.push(random_codes(short.config, 1, 1))
    owners = [owner for owner, _ in stream.memory._buffers]
    assert sum(isinstance(owner, WindowTransformer) for owner in owners) == 1
    assert len(owners) == len(set(owners)) == 1 + 3 + 2 + 1 + 2 * (1 + 3) + 1


def test_streams_of_several_memories_go_on_side_by_side(short):
    """Streams at different places, one of them fresh, are joined, parted and joined again in another order."""
    codes = random_codes(short.config, 4, 40)
    whole = short.decode(codes, None)
    size = short.frame_size
    pair, single, fresh = CodecStream(short, 2), CodecStream(short), CodecStream(short)
    pieces = [[piece] for piece in pair.push(codes[:2, :, :11])] + [[single.push(codes[2:3, :, :3])[0]], []]
    at = [11, 11, 3, 0]
    slots = [(pair, 0), (pair, 1), (single, 0), (fresh, 0)]
    for order, frames in (([2, 0, 3], 5), ([1, 3], 7), ([3, 1], 4), ([0, 1, 2, 3], 6)):
        stream = CodecStream.joined([slots[n] for n in order])
        out = stream.push(torch.stack([codes[n, :, at[n] : at[n] + frames] for n in order]))
        for place, n in enumerate(order):
            pieces[n].append(out[place])
            at[n] += frames
            slots[n] = (stream, place)
    for n in range(4):
        assert (torch.cat(pieces[n], dim=-1) - whole[n, :, : at[n] * size]).abs().max() < 1e-5


def test_a_memory_given_whole_is_given_back(short):
    stream = CodecStream(short, 3)
    stream.push(random_codes(short.config, 3, 4))
    assert CodecStream.joined([(stream, n) for n in range(3)]).memory is stream.memory
    assert CodecStream.joined([(stream, n) for n in (0, 2, 1)]).memory is not stream.memory
    assert CodecStream.joined([(stream, 0)]).memory is not stream.memory


def test_a_memory_in_one_piece_goes_on_as_before(short):
    codes = random_codes(short.config, 2, 20)
    stream, usual = CodecStream(short, 2), CodecStream(short, 2)
    for one in (stream, usual):
        one.push(codes[:, :, :7])
    stream.memory.gather()
    copy = CodecStream(short, 2)
    copy.memory = stream.memory.clone()
    assert copy.state_bytes == usual.state_bytes
    for start in (7, 13):  # the copy is no part of the original: both advance by themselves
        wanted = usual.push(codes[:, :, start : start + 6])
        for one in (stream, copy):
            assert torch.equal(one.push(codes[:, :, start : start + 6]), wanted)
    stream.reset([1])
    fresh = CodecStream(short).push(codes[1:, :, :4])
    assert (stream.push(codes[:, :, :4])[1:] - fresh).abs().max() < 1e-5
    stream.memory.copy_(copy.memory)
    copy.reset()
    assert not any(buffer.any() for buffer in copy.memory._buffers.values())
    assert torch.equal(stream.push(codes[:, :, 19:]), usual.push(codes[:, :, 19:]))
