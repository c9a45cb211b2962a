"""Chunks by graphs: what a graph captures, run operation by operation, gives the usual way's sound and memory."""

import pytest
import torch

from s2quant.codec import CodecStream
from s2quant.errors import UserError
from s2quant.runtime import chunk_graphs, streaming
from s2quant.runtime.chunk_graphs import ChunkGraphs
from s2quant.runtime.engine import Engine
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import Request, Speech


@pytest.fixture(scope="module")
def codec(engine):
    return engine.codec


def codes_of(codec, count, frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (count, codec.num_codebooks, frames), generator=generator)


def same_memory(ours, theirs):
    assert ours._buffers.keys() == theirs._buffers.keys() and len(ours._buffers) > 10
    for key, buffer in ours._buffers.items():
        other = theirs._buffers[key]
        assert buffer.dtype == other.dtype and torch.equal(buffer, other)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("later", [(), (8, 16)])
def test_a_replayed_chunk_is_the_usual_one_to_the_bit_as_is_what_follows(codec, count, later):
    graphs = ChunkGraphs(codec, later, captured=False)
    codes = codes_of(codec, count, 4 + 8 + 16 + 5)
    lanes, usual = [[CodecStream(codec) for _ in range(count)] for _ in range(2)]
    parts = torch.split(codes, [4, 8, 16, 5], dim=2)
    for part in parts:
        for row in range(count):  # chunk by chunk, in turns: the graphs' own memory is another's in between
            one, wanted = part[row : row + 1], usual[row].push(part[row : row + 1])
            frames = one.shape[2]
            has_graph = graphs.takes(lanes[row], frames)
            assert has_graph == (frames == 4 or frames in later)
            found = graphs.push(lanes[row], one) if has_graph else lanes[row].push(one)
            assert torch.equal(found, wanted)
            same_memory(lanes[row].memory, usual[row].memory)
    whole = codec.decode(codes)
    assert (
        float((graphs.push(CodecStream(codec), parts[0][:1]) - whole[:1, :, : 4 * codec.frame_size]).abs().max()) < 1e-5
    )


def test_what_has_no_graph_is_not_taken(codec):
    graphs = ChunkGraphs(codec, (8,), captured=False)
    fresh, begun, pair = CodecStream(codec), CodecStream(codec), CodecStream(codec, 2)
    begun.push(codes_of(codec, 1, 1))
    assert [graphs.takes(fresh, n) for n in (3, 4, 8)] == [False, True, False]
    assert [graphs.takes(begun, n) for n in (4, 8, 16)] == [False, True, False]
    assert not graphs.takes(pair, 4)


def test_a_memory_that_is_not_in_one_piece_is_taken_too(codec):
    """A later chunk of a stream that began without a graph, or left a group."""
    graphs, codes = ChunkGraphs(codec, (8,), captured=False), codes_of(codec, 2, 12)
    usual, pair = CodecStream(codec), CodecStream(codec, 2)
    usual.push(codes[:1, :, :4])
    pair.push(codes[:, :, :4])
    left = CodecStream.joined([(pair, 1)])
    begun = CodecStream(codec)
    begun.push(codes[:1, :, :4])
    assert torch.equal(graphs.push(begun, codes[:1, :, 4:]), usual.push(codes[:1, :, 4:]))
    same_memory(begun.memory, usual.memory)
    whole = codec.decode(codes)[1:, :, 4 * codec.frame_size :]
    torch.testing.assert_close(graphs.push(left, codes[1:, :, 4:]), whole, atol=1e-5, rtol=0)


def events_of(codec, lengths):
    """Frames of several utterances in turns, each with its end."""
    codes = [codes_of(codec, 1, n, seed)[0] for seed, n in enumerate(lengths)]
    for frame in range(max(lengths) + 1):
        for index, own in enumerate(codes):
            if frame < own.shape[1]:
                yield index, own[:, frame]
            elif frame == own.shape[1]:
                yield Speech(
                    index=index, codes=own, stop_reason="end", batch_frames=(frame,), num_prompt_tokens=1, seconds=0.0
                )


@pytest.fixture
def pushed(monkeypatch):
    """Count chunks of graphs, and those of the usual way."""
    seen = {"graph": 0, "usual": 0}
    replay, push = ChunkGraphs.push, CodecStream.push

    def noted(key, call):
        def run(*args):
            seen[key] += 1
            return call(*args)

        return run

    monkeypatch.setattr(ChunkGraphs, "push", noted("graph", replay))
    monkeypatch.setattr(CodecStream, "push", noted("usual", push))
    return seen


@pytest.mark.parametrize("lengths", [(30,), (30, 4), (3, 30, 13)])
@pytest.mark.parametrize(("later", "taken"), [((), 1), ((8, 16), 3)])
def test_streams_by_graphs_sound_the_same_to_the_bit(codec, pushed, lengths, later, taken):
    def sound(graphs):
        chunks = list(streaming.decoded(codec, events_of(codec, lengths), len(lengths) == 1, graphs))
        assert sum(chunk.speech is not None for chunk in chunks) == len(lengths)
        return [(chunk.index, chunk.audio) for chunk in chunks]

    usual = sound(None)
    assert pushed["graph"] == 0
    whole, pushed["usual"] = pushed["usual"], 0
    found = sound(ChunkGraphs(codec, later, captured=False))
    assert [index for index, _ in found] == [index for index, _ in usual]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(found, usual, strict=True))
    first = sum(length >= 4 for length in lengths)
    assert pushed["graph"] >= first and pushed["graph"] + pushed["usual"] == whole
    assert pushed["graph"] >= taken  # of the 30 frames: 4, 8, 16


@pytest.mark.parametrize(("count", "most"), [(3, 4), (5, 4), (5, 5)])
def test_few_of_a_group_are_replayed_and_many_decoded_together(codec, pushed, monkeypatch, count, most):
    monkeypatch.setattr(streaming, "MOST_REPLAYED", most)
    lengths = [20 + n for n in range(count)]
    decoder = streaming.ChunkDecoder(codec, grouped=True, graphs=ChunkGraphs(codec, captured=False))
    begun = [one for event in events_of(codec, lengths) for one in decoder.take(event)] + decoder.flush()
    assert pushed["graph"] == (count if count <= most else 0)
    for index, length in enumerate(lengths):
        sound = torch.cat([one.chunk().audio for one in begun if one.chunk().index == index])
        whole = codec.decode(codes_of(codec, 1, length, index))[0, 0]
        torch.testing.assert_close(sound, whole, atol=1e-5, rtol=0)


def test_graphs_on_a_cpu_are_refused_and_by_default_off(engine, tiny_folder, monkeypatch):
    assert not engine.codec_graphs and chunk_graphs.CODEC_GRAPHS
    for make in (
        lambda: Engine(engine.model, engine.tokenizer, engine.codec, codec_graphs=True),
        lambda: load_engine(tiny_folder, codec_graphs=True),
        lambda: ChunkGraphs(engine.codec, captured=True),
    ):
        with pytest.raises(UserError, match="graphs of a codec on cpu"):
            make()


def test_an_engine_makes_its_graphs_once_and_releases_them(engine, monkeypatch):
    own, made = Engine(engine.model, engine.tokenizer, engine.codec), []
    own.codec_graphs = True
    monkeypatch.setattr(
        "s2quant.runtime.engine.ChunkGraphs", lambda codec: made.append(ChunkGraphs(codec, captured=False)) or made[-1]
    )
    request = Request(text="Hi.", seed=1, max_frames=14, ignore_end=True)
    for _ in range(2):
        chunks = [chunk.audio for chunk in own.stream_requests([request])]
        usual = [chunk.audio for chunk in engine.stream_requests([request])]
        assert all(torch.equal(a, b) for a, b in zip(chunks, usual, strict=True))
    assert len(made) == 1 and own._chunk_graphs is made[0]
    own.release()
    assert own._chunk_graphs is None
