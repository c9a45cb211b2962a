"""Fast decoders at rest: which are kept, and that they speak as new ones do."""

from types import SimpleNamespace

import pytest
import torch

from s2quant.runtime import engine as engine_module
from s2quant.runtime.fast import FastDecoder
from s2quant.runtime.loading import load_engine
from s2quant.runtime.resting import MOST_DECODERS, RestingDecoders
from s2quant.runtime.speech import Request

MODEL, OTHER = object(), object()


def decoder(num_slots, num_bytes, model=MODEL):
    return SimpleNamespace(num_slots=num_slots, model=model, cache=SimpleNamespace(num_bytes=num_bytes))


def test_one_is_taken_by_its_slots_and_is_not_kept_meanwhile():
    resting, one, eight = RestingDecoders(100), decoder(1, 10), decoder(8, 80)
    assert resting.newest is None
    resting.put(one)
    resting.put(eight)
    assert resting.newest is eight and resting.take(3, MODEL) is None
    assert resting.take(1, MODEL) is one and resting.take(1, MODEL) is None
    resting.put(one)
    assert resting.newest is one and resting.take(8, MODEL) is eight
    resting.clear()
    assert resting.newest is None


def test_those_used_longest_ago_make_room():
    resting, decoders = RestingDecoders(100), {slots: decoder(slots, 40) for slots in (1, 2, 3)}
    for one in decoders.values():
        resting.put(one)
    assert [resting.take(slots, MODEL) for slots in decoders] == [None, decoders[2], decoders[3]]
    for slots in (2, 3):
        resting.put(decoders[slots])
    resting.put(large := decoder(8, 101))  # the one used last is kept whatever it has
    assert resting.newest is large and resting.take(8, MODEL) is large and resting.newest is None


def test_what_is_too_large_is_given_up_before_another_is_made():
    resting = RestingDecoders(100)
    resting.put(decoder(64, 101))
    assert resting.take(60, MODEL) is None and resting.newest is None
    resting.put(small := decoder(8, 100))
    assert resting.take(60, MODEL) is None and resting.newest is small


def test_no_more_are_kept_than_a_few():
    resting = RestingDecoders(100)
    for slots in range(1, MOST_DECODERS + 2):
        resting.put(decoder(slots, 1))
    assert len(resting._kept) == MOST_DECODERS and resting.take(1, MODEL) is None


def test_without_room_the_newest_is_kept():
    resting, one, two = RestingDecoders(), decoder(1, 10), decoder(2, 10)
    resting.put(one)
    resting.put(two)
    assert resting.newest is two and resting.take(2, MODEL) is two
    resting.put(two)
    assert resting.take(1, MODEL) is None and resting.newest is None
    assert RestingDecoders.on(torch.device("cpu")).most_bytes == 0


def test_those_of_another_model_are_given_up():
    resting = RestingDecoders(100)
    resting.put(decoder(1, 10, OTHER))
    resting.put(mine := decoder(2, 10))
    assert resting.take(1, MODEL) is None and resting.newest is mine


def test_an_engine_takes_them_up_again_and_says_the_same(tiny_folder, monkeypatch):
    made, beside = [], []

    class Counted(FastDecoder):
        def __init__(self, model, num_slots, *more, **named):
            made.append(num_slots)
            beside.append(engine._resting.newest)
            super().__init__(model, num_slots, *more, **named)

    monkeypatch.setattr(engine_module, "FastDecoder", Counted)
    requests = [Request(text=f"Number {n}.", seed=n, max_frames=6 + n) for n in range(3)]
    said = {}
    for room in (0, 1e9):
        made.clear()
        beside.clear()
        engine = load_engine(tiny_folder, dtype=torch.float32, num_slots=3, decoder="fast")
        engine._resting.most_bytes = room
        said[room] = [
            [speech.codes for speech in sorted(engine.generate(some), key=lambda speech: speech.index)]
            for some in (requests, requests[1:2], requests, requests[:2], requests[1:2])
        ]
        assert made == ([3, 1, 2] if room else [3, 1, 3, 2, 1])
        assert [kept is None for kept in beside] == ([True, False, False] if room else [True] * 5)
        assert len({id(kept) for kept in engine._resting._kept.values()}) == (3 if room else 1)
        engine.release()
        assert engine._resting.newest is None
    for mine, theirs in zip(*said.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_decoder_whose_run_broke_is_not_taken_up_again(tiny_folder, monkeypatch):
    engine = load_engine(tiny_folder, dtype=torch.float32, num_slots=2, decoder="fast")
    request = Request(text="Hello.", seed=1, max_frames=8)
    said = engine.speak(request).codes
    first = engine._resting.newest
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(FastDecoder, "launch", lambda self, *count: (_ for _ in ()).throw(RuntimeError("broken")))
        engine.speak(request)
    assert engine._resting.newest is None
    assert torch.equal(engine.speak(request).codes, said) and engine._resting.newest is not first
    events = engine.events([request])
    next(events)
    events.close()  # nobody wants the rest
    assert engine._resting.newest is not None and torch.equal(engine.speak(request).codes, said)
