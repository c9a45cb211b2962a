"""The engine: cached == uncached, batch == alone, endings, limits, memory, many batches of text."""

import dataclasses
import inspect
import itertools
import sys

import pytest
import runtime_cases as cases
import torch

from s2quant.errors import UserError
from s2quant.prompt import Voice
from s2quant.runtime import decoder as decoder_module
from s2quant.runtime import engine as engine_module
from s2quant.runtime.decoder import Decoder
from s2quant.runtime.engine import Engine
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import Request, Speech
from s2quant.sampling import Sampling

MIXED = [
    Request(text="5", seed=1, max_frames=9),
    Request(text="37|9|20", seed=2, max_frames=12, sampling=Sampling(temperature=1.1, top_p=0.95, top_k=40)),
    Request(text="12", seed=3, max_frames=40, sampling=Sampling(temperature=0.4, top_p=0.6, top_k=10)),
    Request(text="31", seed=4, max_frames=1),
    Request(text="16|16", seed=1, max_frames=30),
    Request(text="25", seed=-5, max_frames=25, sampling=Sampling(temperature=1e-6)),
    Request(text="9", seed=2**63, max_frames=33, sampling=Sampling(temperature=1.5, top_p=1.0, top_k=256)),
]


def spoken(engine, requests):
    speeches = sorted(engine.generate(requests), key=lambda speech: speech.index)
    assert [speech.index for speech in speeches] == list(range(len(requests)))
    return speeches


def end_after(engine, monkeypatch, frames):
    """Make im_end win at every draw after so many frames of a batch of text, and never before."""
    drawn = itertools.count()
    plain = engine.model.slow.constrained_logits

    def constrained_logits(hidden):
        logits = plain(hidden).clone()
        logits[:, -1] = 1e4 if next(drawn) % (frames + 1) == frames else -1e4
        return logits

    monkeypatch.setattr(engine.model.slow, "constrained_logits", constrained_logits)


def decoders(monkeypatch):
    """Collect the decoders that engines make."""
    found = []

    class Kept(Decoder):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(engine_module, "Decoder", Kept)
    return found


# ---- cached == uncached --------------------------------------------------------------------------------------------


def test_what_the_engine_computed_is_what_a_whole_pass_computes(engine, monkeypatch):
    hidden, fast = [], []
    plain_sample, plain_draw = Decoder.sample, decoder_module.draw

    def sample(self, vectors, *args, **options):
        hidden.append(vectors.clone())
        return plain_sample(self, vectors, *args, **options)

    def draw(logits, *args):
        fast.append(logits.clone())
        return plain_draw(logits, *args)

    monkeypatch.setattr(Decoder, "sample", sample)
    monkeypatch.setattr(decoder_module, "draw", draw)
    end_after(engine, monkeypatch, 10_000)
    request = Request(text="<|speaker:0|>Hello.\n<|speaker:1|>[laughing] Hi!", seed=0, max_frames=40)
    speech = engine.speak(request)
    assert speech.codes.shape == (10, 40) and speech.stop_reason == "limit"
    tokens = engine.spoken_sequence(request, [speech.codes])
    assert tokens.shape == (11, speech.num_prompt_tokens + 40 + 1)
    assert int(tokens[0, -1]) == engine.config.im_end_id
    with torch.no_grad():
        out = engine.model(tokens[None])
    first = speech.num_prompt_tokens - 1
    torch.testing.assert_close(torch.cat(hidden), out.hidden[0, first : first + 40], atol=1e-4, rtol=0)
    logits = engine.model.slow.head(torch.cat(hidden))
    torch.testing.assert_close(logits, out.logits[0, first : first + 40], atol=1e-4, rtol=0)
    scored = torch.stack(fast).view(40, 9, -1)  # nine draws per frame
    assert torch.equal(out.codes.T, speech.codes)
    torch.testing.assert_close(scored, out.fast_logits[:, 1:, : engine.residual_size], atol=1e-4, rtol=0)


def test_a_batch_computes_what_a_whole_pass_computes(prompt_engine, monkeypatch):
    engine = prompt_engine("project", num_slots=3)
    seen = {}
    plain = Decoder.step

    def step(self, columns, positions):
        out = plain(self, columns, positions)
        for column, position, vector in zip(columns, positions, out, strict=True):
            seen[(tuple(column.tolist()), position)] = vector.clone()
        return out

    monkeypatch.setattr(Decoder, "step", step)
    requests = [Request(text=str(n), seed=n, max_frames=n) for n in (37, 5, 9, 25, 12)]
    for request, speech in zip(requests, spoken(engine, requests), strict=True):
        prompt = engine.prompts[request.text]
        frames = torch.cat([speech.codes[:1] + cases.BEGIN, speech.codes])
        with torch.no_grad():
            hidden = engine.model.slow.forward_hidden(torch.cat([prompt, frames], dim=1)[None])[0]
        for frame, column in enumerate(frames.T[:-1].tolist()):  # the last frame is fed only if im_end follows it
            position = prompt.shape[1] + frame
            torch.testing.assert_close(seen[tuple(column), position], hidden[position], atol=1e-4, rtol=0)


# ---- batch == alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "slots"), [("project", [3]), ("shared", [1, 2, 20])])
def test_speech_does_not_depend_on_its_neighbours(prompt_engine, case, slots):
    alone = [prompt_engine(case, num_slots=1).speak(request) for request in MIXED]
    assert len({speech.codes.shape[1] for speech in alone}) > 4
    for num_slots in slots:
        for speech, single in zip(spoken(prompt_engine(case, num_slots), MIXED), alone, strict=True):
            assert torch.equal(speech.codes, single.codes), (num_slots, speech.index)
            assert speech.batch_frames == single.batch_frames and speech.stop_reason == single.stop_reason
            assert speech.num_prompt_tokens == single.num_prompt_tokens


def test_texts_and_voices_in_a_batch_are_what_they_are_alone(engine):
    voice = Voice(text="A reference.", codes=torch.arange(10 * 7).view(10, 7))
    requests = [
        Request(text="Hello there.", seed=5, max_frames=20),
        Request(
            text="<|speaker:0|>One.\n<|speaker:1|>Two.", voices=(voice, voice), seed=6, max_frames=9, chunk_bytes=20
        ),
        Request(text="[whisper] Hm.", voices=(voice,), seed=5, max_frames=14),
        Request(text="One. Two. Three.", seed=8, max_frames=5, chunk_bytes=6, split_sentences=True),
        Request(text="A", seed=9, max_frames=25),
        Request(text="Hello there.", seed=5, max_frames=20),
    ]
    together = spoken(engine, requests)
    for request, speech in zip(requests, together, strict=True):
        assert torch.equal(speech.codes, engine.speak(request).codes)
    assert torch.equal(together[0].codes, together[5].codes)
    assert len(together[1].batch_frames) == 2 and len(together[3].batch_frames) == 3


def test_the_seed_makes_the_speech(prompt_engine):
    engine = prompt_engine()
    a, b, c = (engine.speak(Request(text="12", seed=seed, max_frames=12)).codes for seed in (7, 7, 8))
    assert torch.equal(a, b)
    assert a.shape != c.shape or not torch.equal(a, c)


# ---- endings -------------------------------------------------------------------------------------------------------


def test_an_end_at_the_first_token_is_an_empty_speech(engine, monkeypatch):
    end_after(engine, monkeypatch, 0)
    speech = engine.speak(Request(text="Hello.", max_frames=5))
    assert speech.codes.shape == (10, 0) and speech.codes.dtype == torch.int64
    assert speech.stop_reason == "end" and speech.batch_frames == (0,)
    assert engine.decode(speech.codes).shape == (0,)
    assert len(spoken(engine, [Request(text="Hello.")] * 6)) == 6


def test_empty_turns_stay_in_the_conversation(engine, monkeypatch):
    end_after(engine, monkeypatch, 0)
    request = Request(text="<|speaker:0|>One.\n<|speaker:0|>Two.\n<|speaker:0|>Three.", chunk_bytes=1)
    speech = engine.speak(request)
    assert speech.batch_frames == (0, 0, 0) and speech.stop_reason == "end"
    empty = torch.zeros(10, 0, dtype=torch.int64)
    assert engine.spoken_sequence(request, [empty] * 3).shape[0] == 11


def test_hundreds_of_empty_batches_do_not_nest(prompt_engine, monkeypatch):
    engine = prompt_engine()
    end_after(engine, monkeypatch, 0)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert engine.speak(Request(text="|".join(["5"] * 150))).batch_frames == (0,) * 150
    finally:
        sys.setrecursionlimit(limit)


def test_the_end_is_no_frame(prompt_engine, monkeypatch):
    engine = prompt_engine()
    end_after(engine, monkeypatch, 6)
    speech = engine.speak(Request(text="9|12", max_frames=50))
    assert speech.batch_frames == (6, 6) and speech.stop_reason == "end" and speech.codes.shape == (4, 12)


def test_an_end_right_after_the_limit_is_not_seen(prompt_engine, monkeypatch):
    engine = prompt_engine()
    end_after(engine, monkeypatch, 6)
    assert engine.speak(Request(text="9", max_frames=6)).stop_reason == "limit"


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_the_limit_keeps_the_last_real_frame(prompt_engine, monkeypatch, limit):
    engine = prompt_engine()
    end_after(engine, monkeypatch, 1000)
    longer = engine.speak(Request(text="20", seed=3, max_frames=limit + 1))
    speech = engine.speak(Request(text="20", seed=3, max_frames=limit))
    assert speech.codes.shape == (4, limit) and speech.stop_reason == "limit"
    assert torch.equal(speech.codes, longer.codes[:, :limit])


def test_one_batch_at_its_limit_marks_the_whole_speech(prompt_engine, monkeypatch):
    engine = prompt_engine()
    end_after(engine, monkeypatch, 3)
    assert engine.speak(Request(text="9|12", max_frames=4)).stop_reason == "end"
    drawn = engine.speak(Request(text="9|12", max_frames=2))
    assert drawn.stop_reason == "limit" and drawn.batch_frames[0] == 2


def test_speech_stops_where_the_model_s_positions_do(prompt_engine, monkeypatch):
    engine = prompt_engine(lengths=(38,))
    end_after(engine, monkeypatch, 10_000)
    engine.prompts["long"] = cases.prompt("shared", 38).repeat(1, 13)  # 494 of 512 positions
    speech = engine.speak(Request(text="long", max_frames=1000))
    assert speech.codes.shape == (4, 18) and speech.stop_reason == "limit"


def test_a_conversation_that_fills_the_model_is_told_and_spoils_no_neighbour(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "prompt_budget", lambda config: 75)
    text = "\n".join(f"<|speaker:0|>{word}." for word in ("One", "Two", "Three", "Four"))
    requests = [Request(text=text, chunk_bytes=1, max_frames=12, seed=1), Request(text="Hello.", max_frames=6, seed=2)]
    full, other = spoken(engine, requests)
    assert full.stop_reason == "full" and 1 <= len(full.batch_frames) < 4
    assert full.codes.shape[1] == sum(full.batch_frames)
    assert other.stop_reason in ("end", "limit")
    sequence = engine.spoken_sequence(requests[0], full.codes.split(full.batch_frames, dim=1))
    assert sequence.shape[1] <= 75 + 12 + 1


# ---- residual codes ------------------------------------------------------------------------------------------------


def test_residual_codes_above_the_codec_s_are_never_drawn(engine):
    assert engine.config.codebook_size == 4096 and engine.residual_size == 1024
    codes = engine.speak(Request(text="Hi.", max_frames=30, sampling=Sampling(top_p=1.0, top_k=4096))).codes
    assert codes.shape[1] > 10 and int(codes[1:].max()) < 1024 and int(codes[1:].max()) > 900
    assert int(codes[0].max()) >= 1024
    assert Engine(engine.model, engine.tokenizer).residual_size == 1024


# ---- memory --------------------------------------------------------------------------------------------------------


def test_the_cache_has_the_size_of_the_request(prompt_engine, monkeypatch):
    found = decoders(monkeypatch)
    engine = prompt_engine("shared", num_slots=8)
    engine.speak(Request(text="20", max_frames=30))
    slow = engine.config.slow
    per_position = 2 * slow.n_layer * slow.n_local_heads * slow.head_dim * 4
    assert found[0].cache.num_bytes == per_position * (20 + 30)
    assert found[0].fast_cache.capacity == engine.config.num_codebooks
    spoken(
        engine, [Request(text="20", max_frames=3), Request(text="31", max_frames=5), Request(text="5", max_frames=9)]
    )
    assert found[1].cache.num_bytes == per_position * 3 * (31 + 5)


def test_growing_keeps_what_is_there(prompt_engine, monkeypatch):
    found = decoders(monkeypatch)
    engine = prompt_engine("project", num_slots=2)
    requests = [Request(text="5", seed=1, max_frames=30), Request(text="5", seed=2, max_frames=4)]
    requests += [Request(text="37", seed=3, max_frames=60), Request(text="9", seed=4, max_frames=2)]
    end_after(engine, monkeypatch, 10_000)
    together = spoken(engine, requests)
    assert found[0].cache.capacity == 37 + 60
    for request, speech in zip(requests, together, strict=True):
        assert torch.equal(speech.codes, engine.speak(request).codes)


# ---- events and requests -------------------------------------------------------------------------------------------


def test_frames_come_in_order_and_before_their_speech(prompt_engine):
    engine = prompt_engine("shared", num_slots=3)
    frames = {index: [] for index in range(len(MIXED))}
    ended = {}
    for event in engine.events(MIXED):
        if isinstance(event, Speech):
            ended[event.index] = event
            continue
        index, frame = event
        assert index not in ended
        frames[index].append(frame.clone())
    assert sorted(ended) == sorted(frames)
    for index, speech in ended.items():
        assert torch.equal(torch.stack(frames[index], dim=1), speech.codes)


def test_short_speeches_are_given_before_long_ones_have_ended(prompt_engine, monkeypatch):
    engine = prompt_engine("shared", num_slots=2)
    end_after(engine, monkeypatch, 10_000)
    requests = [Request(text="9", max_frames=60)] + [Request(text="9", max_frames=n) for n in (3, 4, 5)]
    assert [speech.index for speech in engine.generate(requests)] == [1, 2, 3, 0]


def test_speech_is_made_while_it_is_asked_for_and_a_closed_run_stops(prompt_engine, monkeypatch):
    engine = prompt_engine("shared", num_slots=1)
    steps = []
    plain = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args: steps.append(1) or plain(self, *args))
    run = engine.generate([Request(text="9", max_frames=5, seed=4)] * 3)
    assert not steps
    next(run)
    done = len(steps)
    assert 0 < done <= 5
    run.close()
    assert len(steps) == done and list(run) == []
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_the_caller_is_left_with_gradients_and_ordinary_tensors(engine):
    speech = engine.speak(Request(text="Hi.", max_frames=4))
    assert not speech.codes.is_inference()
    speech.codes[0] += 1  # an inference tensor refuses this
    chunks = engine.stream("Hi.", max_frames=9)
    for chunk in chunks:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not chunk.is_inference()
        chunk *= 0.5
        weight = torch.ones(1, requires_grad=True)
        (weight * chunk.sum()).backward()
        assert weight.grad is not None
    sound = engine.decode(engine.speak(Request(text="Hi.", max_frames=2)).codes)
    sound *= 0.5


def test_no_requests_no_speeches(prompt_engine):
    assert list(prompt_engine().generate([])) == []


def test_no_slots_is_refused(prompt_engine):
    with pytest.raises(UserError, match="0 slots"):
        prompt_engine(num_slots=0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(text="Hi", max_frames=0), "max_frames is 0"),
        (Request(text="Hi", seed=2**64), "seed is"),
        (Request(text="Hi", sampling=Sampling(temperature=0.0)), "temperature"),
        (Request(text="Hi", sampling=Sampling(top_p=1.5)), "top_p"),
        (Request(text="Hi", sampling=Sampling(top_k=0)), "top_k"),
        (Request(text=""), "text"),
        (Request(text="<|im_end|>"), "im_end"),
        (Request(text="Hi", voices=(Voice(text="a", codes=torch.zeros(9, 3, dtype=torch.int64)),)), "voice 0"),
        (Request(text="word " * 3000), "positions"),
    ],
    ids=["frames", "seed", "temperature", "top_p", "top_k", "empty", "control", "voice", "long"],
)
def test_a_request_that_cannot_be_spoken_is_refused_before_any_is(engine, monkeypatch, request_, message):
    monkeypatch.setattr(Decoder, "prefill", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(UserError, match=message):
        engine.generate([Request(text="Fine."), request_])
    with pytest.raises(UserError, match=message):
        engine.stream_request(request_)


def test_all_faults_of_a_request_are_listed(engine):
    request = Request(text="Hi", max_frames=-1, sampling=Sampling(temperature=-1.0, top_p=2.0, top_k=0))
    with pytest.raises(UserError) as error:
        engine.prepare(request)
    assert all(word in str(error.value) for word in ("temperature", "top_p", "top_k", "max_frames"))


def test_a_prompt_without_frames_can_be_looked_at(engine):
    request = Request(text="Hello.")
    speech = engine.speak(Request(text="Hello.", max_frames=1))
    assert engine.spoken_sequence(request, ()).shape == (11, speech.num_prompt_tokens)


def test_a_second_batch_hears_the_first(engine, monkeypatch):
    prompts = []
    plain = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self, n, t, *a: prompts.append(t.clone()) or plain(self, n, t, *a))
    speech = engine.speak(Request(text="<|speaker:0|>One.\n<|speaker:1|>Two.", chunk_bytes=1, max_frames=6, seed=2))
    first, second = prompts
    frames = (second[0] >= engine.config.semantic_begin_id) & (second[0] <= engine.config.semantic_end_id)
    assert torch.equal(second[1:, frames], speech.codes[:, : speech.batch_frames[0]])
    assert speech.num_prompt_tokens == first.shape[1] + second.shape[1]


def test_an_ignored_end_is_never_drawn_and_disturbs_no_neighbour(tiny_folder):
    engine = load_engine(tiny_folder, dtype=torch.float32, num_slots=2)
    plain = [Request(text="Hello there.", seed=seed, max_frames=120) for seed in (1, 2)]
    alone = {speech.index: speech for speech in engine.generate(plain)}
    assert {speech.stop_reason for speech in alone.values()} == {"end"}
    mixed = {s.index: s for s in engine.generate([plain[0], dataclasses.replace(plain[1], ignore_end=True)])}
    assert torch.equal(mixed[0].codes, alone[0].codes)
    assert mixed[1].codes.shape[1] == 120
    assert mixed[1].stop_reason == "limit"
