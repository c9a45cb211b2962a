"""The fast decoder: the plain decoder's codes, whatever the slots, the order, the endings; late reading unheard."""

import dataclasses
import itertools

import pytest
import runtime_cases as cases
import torch
from test_runtime_engine import MIXED, spoken
from test_runtime_golden import expected, golden, request  # noqa: F401

from s2quant.errors import UserError
from s2quant.runtime import fast as fast_module
from s2quant.runtime.decoder import Decoder
from s2quant.runtime.engine import Engine
from s2quant.runtime.fast import FastDecoder
from s2quant.runtime.loading import load_engine
from s2quant.runtime.sampler import AHEAD, Noise
from s2quant.runtime.speech import Request, Speech
from s2quant.sampling import Sampling


@pytest.fixture
def pair(prompt_engine):
    """Make a plain and a fast engine of the same small model."""

    def make(case="shared", num_slots=8, **more):
        engines = prompt_engine(case, num_slots, **more), prompt_engine(case, num_slots, **more)
        engines[1].decoder = "fast"
        return engines

    return make


def same(ours, theirs):
    assert torch.equal(ours.codes, theirs.codes)
    for key in ("index", "stop_reason", "batch_frames", "num_prompt_tokens"):
        assert getattr(ours, key) == getattr(theirs, key)


@pytest.mark.parametrize(("case", "num_slots"), [("project", 3), ("shared", 1), ("shared", 2), ("shared", 20)])
def test_fast_is_plain_over_slots_refills_and_batches_of_text(pair, case, num_slots):
    plain, fast = pair(case, num_slots)
    theirs = spoken(plain, MIXED)
    assert len({speech.codes.shape[1] for speech in theirs}) > 4
    for _ in range(2):  # the second time on the decoder at rest
        for ours, its in zip(spoken(fast, MIXED), theirs, strict=True):
            same(ours, its)


@pytest.mark.parametrize("number", range(len(cases.SPEECHES)))
def test_a_whole_speech_is_the_reference_s(golden, prompt_engine, fed_draws, number):  # noqa: F811
    case, length = cases.SPEECHES[number][:2]
    codes, stop_reason = expected(golden, number)
    engine = prompt_engine(case, lengths=(length,))
    engine.decoder = "fast"
    speech = engine.speak(request(number))
    assert torch.equal(speech.codes, codes) and speech.stop_reason == stop_reason


def test_a_long_context_crosses_buckets(pair, monkeypatch):
    monkeypatch.setattr(fast_module, "FIRST_CONTEXT", 16)
    plain, fast = pair("shared", 3, lengths=(5, 31, 60))
    requests = [Request(text=text, seed=n, max_frames=150, ignore_end=True) for n, text in enumerate(("60", "5", "31"))]
    seen = []
    replay = FastDecoder.replay
    monkeypatch.setattr(FastDecoder, "replay", lambda self, key: (seen.append(key), replay(self, key))[1])
    for ours, theirs in zip(spoken(fast, requests), spoken(plain, requests), strict=True):
        same(ours, theirs)
    assert {context for _, context, _ in seen} == {64, 128, 256} and {batch for batch, *_ in seen} == {3}


def test_speech_ends_where_the_positions_asked_for_do(tiny_folder):
    """By both decoders the same, and up to there that of a request without such an end; other batches are not begun."""
    plain, fast = (load_engine(tiny_folder, dtype=torch.float32, num_slots=2, decoder=d) for d in ("plain", "fast"))
    text = "\n".join(f"<|speaker:0|>{word}." for word in ("One", "Two", "Three"))
    whole = Request(text=text, chunk_bytes=1, max_frames=40, seed=3, ignore_end=True)
    (first, rest) = (plain._prompt(whole, plain.prepare(whole)[0], []).shape[1], plain.speak(whole))
    assert rest.batch_frames == (40, 40, 40) and rest.stop_reason == "limit"
    for most, frames, reason in ((first + 30, (30,), "full"), (first + 100, (40, None), "full"), (1, (1,), "full")):
        asked = dataclasses.replace(whole, max_positions=most)
        ours, theirs = fast.speak(asked), plain.speak(asked)
        same(ours, theirs)
        assert ours.stop_reason == reason and len(ours.batch_frames) == len(frames)
        assert all(wanted in (None, found) for wanted, found in zip(frames, ours.batch_frames, strict=True))
        assert torch.equal(ours.codes, rest.codes[:, : ours.codes.shape[1]])
        sequence = fast.spoken_sequence(asked, ours.codes.split(ours.batch_frames, dim=1))
        assert most == 1 or sequence.shape[1] == most + 1  # with the end that follows
    with pytest.raises(UserError, match="max_positions is 0, not positive"):
        fast.speak(dataclasses.replace(whole, max_positions=0))


def test_an_early_end_is_heard_one_frame_late_and_nothing_of_it_remains(tiny_folder):
    plain, fast = (load_engine(tiny_folder, dtype=torch.float32, num_slots=2, decoder=d) for d in ("plain", "fast"))
    requests = [
        *(Request(text=f"Hello {n}.", seed=n, max_frames=120) for n in range(3)),
        Request(text="<|speaker:0|>One.\n<|speaker:1|>Two.", seed=6, max_frames=120, chunk_bytes=20),
    ]
    theirs = spoken(plain, requests)
    assert {speech.stop_reason for speech in theirs} == {"end"} and len(theirs[3].batch_frames) == 2
    for ours, its in zip(spoken(fast, requests), theirs, strict=True):
        same(ours, its)
    frames = {n: [] for n in range(len(requests))}
    for event in fast.events(requests):
        if isinstance(event, Speech):
            assert torch.equal(torch.stack(frames[event.index], dim=1), event.codes)
        else:
            frames[event[0]].append(event[1])
    ignored = dataclasses.replace(requests[0], ignore_end=True)
    assert fast.speak(ignored).codes.shape[1] == 120


def test_a_run_given_up_leaves_the_engine_as_it_was(pair):
    plain, fast = pair("project", 2)
    fresh = [speech.codes for speech in spoken(plain, MIXED)]
    events = fast.events(MIXED)
    for _ in range(20):
        next(events)
    resting = fast.speak(MIXED[0])  # a second run while the first one is under way has a decoder of its own
    assert torch.equal(resting.codes, fresh[0])
    events.close()
    assert all(torch.equal(a.codes, b) for a, b in zip(spoken(fast, MIXED), fresh, strict=True))


def test_a_stream_gives_the_same_sound(tiny_folder):
    plain, fast = (load_engine(tiny_folder, dtype=torch.float32, decoder=d) for d in ("plain", "fast"))
    sounds = [torch.cat(list(engine.stream("Hi there.", seed=3, max_frames=30))) for engine in (plain, fast)]
    torch.testing.assert_close(*sounds, atol=1e-6, rtol=0)


def test_frames_are_asked_for_before_the_last_one_is_read(pair, monkeypatch):
    _, fast = pair("shared", 2)
    order = []
    launch, columns = FastDecoder.launch, fast_module.Read.columns
    monkeypatch.setattr(FastDecoder, "launch", lambda self, *n: (order.append("ask"), launch(self, *n))[1])
    monkeypatch.setattr(fast_module.Read, "columns", lambda self: (order.append("read"), columns(self))[1])
    fast.speak(Request(text="12", seed=1, max_frames=4, ignore_end=True))
    assert order == ["ask", "ask", "read", "ask", "read", "ask", "read", "read"]  # 4 frames, none in vain


@pytest.mark.parametrize(("num_slots", "many"), [(1, 1), (9, 3)])
def test_random_numbers_are_made_in_turns_and_once(pair, monkeypatch, num_slots, many):
    _, fast = pair("shared", num_slots)
    made, launch, fill = [], FastDecoder.launch, Noise.fill
    monkeypatch.setattr(FastDecoder, "launch", lambda self, *n: (made.append(0), launch(self, *n))[1])

    def noted(noise, block):
        made[-1] += 1
        fill(noise, block)

    monkeypatch.setattr(Noise, "fill", noted)
    requests = [Request(text="12", seed=n, max_frames=40, ignore_end=True) for n in range(num_slots)]
    spoken(fast, requests)
    assert made[0] == num_slots and len(made) == 40
    assert max(made[1:]) == many and sum(made) <= num_slots * (40 // AHEAD + 1)


def test_every_frame_of_a_run_has_all_slots_and_empty_ones_look_at_little(pair, monkeypatch):
    _, fast = pair("shared", 3)
    seen, replay = [], FastDecoder.replay

    def noted(self, key):
        replay(self, key)
        seen.append((key[0], self.state.positions.tolist()))

    monkeypatch.setattr(FastDecoder, "replay", noted)
    lengths = (4, 30, 7, 9)
    requests = [Request(text="12", seed=n, max_frames=f, ignore_end=True) for n, f in enumerate(lengths)]
    assert sorted(speech.codes.shape[1] for speech in spoken(fast, requests)) == sorted(lengths)
    assert {rows for rows, _ in seen} == {3}
    longest, *empty = sorted(seen[-1][1], reverse=True)  # one ended 23 frames ago, the other later
    assert longest > 40 and max(empty) < 24, seen[-1]


def test_sampling_parameters_of_all_sizes_meet_in_one_batch(pair):
    plain, fast = pair("shared", 4)
    requests = [
        Request(text="9", seed=n, max_frames=12, sampling=Sampling(temperature=t, top_p=p, top_k=k))
        for n, (t, p, k) in enumerate(itertools.product((0.3, 1.5), (0.5, 1.0), (1, 30, 33, 10_000)))
    ]
    for ours, theirs in zip(spoken(fast, requests), spoken(plain, requests), strict=True):
        same(ours, theirs)


@torch.inference_mode()
def test_teacher_forced_hidden_vectors_are_the_plain_ones(small_models):
    """Both decoders, fed the same columns, keep the same keys and values."""
    model = small_models["project"]
    prompt = cases.prompt("project", 40)
    plain, fast = Decoder(model, 1, 64, 256), FastDecoder(model, 1, 64, 256)
    plain.prefill(0, prompt)
    fast.seat(0, Noise(torch.Generator().manual_seed(0)), Sampling(), ignore_end=True)
    fast.begin(0, prompt, 0)
    fast.launch(1)
    for position in range(40, 50):
        column = cases.prompt("project", position + 1)[:, -1:].T
        plain.step(column, [position])
        fast.state.columns.copy_(column)
        fast.launch(1)
        for ours, theirs in ((fast.cache.keys, plain.cache.keys), (fast.cache.values, plain.cache.values)):
            torch.testing.assert_close(
                ours[:, :, :, : position + 1], theirs[:, :, :, : position + 1], atol=1e-5, rtol=0
            )


def test_an_unknown_decoder_is_refused(small_models):
    with pytest.raises(UserError, match="decoder 'faster'"):
        Engine(small_models["shared"], None, decoder="faster")


def test_a_gpu_gets_the_fast_decoder_unless_told():
    from s2quant.runtime.speech import decoder_for

    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    assert [decoder_for("auto", cpu), decoder_for("auto", gpu)] == ["plain", "fast"]
    assert [decoder_for("fast", cpu), decoder_for("plain", gpu)] == ["fast", "plain"]
