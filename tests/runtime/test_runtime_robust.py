"""Long contexts, odd numbers of slots, streams given up in the middle, two engines in one process."""

import itertools
import json

import pytest
import runtime_cases as cases
import torch
from folder_cases import link_copy
from test_runtime_engine import spoken

from s2quant.model import DualAR
from s2quant.prompt import Voice
from s2quant.runtime.decoder import Decoder
from s2quant.runtime.fast import FastDecoder
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import Request, Speech
from s2quant.sampling import Sampling

KINDS = ("plain", "fast")
LONG = 10_300


@pytest.fixture(scope="module")
def folder_of(tiny_folder, tmp_path_factory):
    """Make the tiny checkpoint with another number of positions."""

    def make(positions):
        folder = tmp_path_factory.mktemp("long") / "model"
        link_copy(tiny_folder, folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["max_seq_len"] = positions
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="module")
def long_folder(folder_of):
    return folder_of(LONG)


def long_voice(frames):
    generator = torch.Generator().manual_seed(frames)
    return Voice(text="Said for a long time.", codes=torch.randint(0, 200, (10, frames), generator=generator))


# ---- long contexts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_speech_behind_eight_thousand_positions_is_the_model_s_own(long_folder, kind):
    """Greedy speech: every code is the best of the cacheless model, fed all positions at once."""
    engine = load_engine(long_folder, dtype=torch.float32, decoder=kind)
    greedy = Sampling(temperature=1e-5, top_k=1)  # the swap of a repetition draws the best one as well
    request = Request(
        text="Go on.", voices=(long_voice(8120),), seed=1, max_frames=40, sampling=greedy, ignore_end=True
    )
    speech = engine.speak(request)
    tokens = engine.spoken_sequence(request, [speech.codes])
    assert tokens.shape[1] - 41 < 8192 < tokens.shape[1]  # the fast decoder's context grows on the way
    with torch.inference_mode():
        hidden = engine.model.slow.forward_hidden(tokens[None])[0, -42:-2]  # before each frame
        logits = engine.model.slow.constrained_logits(hidden)[:, :-1]
    chosen = logits.gather(1, speech.codes[0][:, None])[:, 0]
    assert (chosen >= logits.max(-1).values - 1e-4).all()
    assert len(speech.codes[0].unique()) > 3


@pytest.mark.parametrize(("positions", "voice_frames", "frames"), [(LONG, 8190, 90), (700, 280, 700)])
def test_both_decoders_say_the_same_far_out_and_up_to_the_last_position(
    folder_of, positions, voice_frames, frames, monkeypatch
):
    folder, ends, free = folder_of(positions), [], FastDecoder.free
    monkeypatch.setattr(FastDecoder, "free", lambda self, slot: (ends.append(self.positions[slot]), free(self, slot)))
    plain, fast = (load_engine(folder, dtype=torch.float32, num_slots=2, decoder=kind) for kind in KINDS)
    requests = [
        Request(text="Go on.", voices=(long_voice(voice_frames),), seed=1, max_frames=frames, ignore_end=True),
        Request(text="Short.", seed=2, max_frames=60, ignore_end=True),
    ]
    for ours, theirs in zip(spoken(fast, requests), spoken(plain, requests), strict=True):
        assert torch.equal(ours.codes, theirs.codes) and ours.stop_reason == theirs.stop_reason == "limit"
        length = ours.num_prompt_tokens + ours.codes.shape[1]
        assert ours.index == 1 or length == min(positions, ours.num_prompt_tokens + frames)
    assert max(ends) > (8250 if positions == LONG else 698)
    assert torch.equal(fast.speak(requests[1]).codes, plain.speak(requests[1]).codes)


# ---- odd numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [3, 5, 7])
@pytest.mark.parametrize("num_requests", [7, 11])
def test_odd_numbers_of_slots_say_what_each_says_alone(tiny_folder, num_slots, num_requests):
    plain = load_engine(tiny_folder, dtype=torch.float32, num_slots=1)
    fast = load_engine(tiny_folder, dtype=torch.float32, num_slots=num_slots, decoder="fast")
    requests = [Request(text="word " * (n % 3 + 1), seed=n, max_frames=5 + 7 * (n % 4)) for n in range(num_requests)]
    for speech in fast.generate(requests):
        assert torch.equal(speech.codes, plain.speak(requests[speech.index]).codes)
    assert fast._resting.newest.num_slots == min(num_slots, num_requests)


def test_an_odd_number_of_slots_is_the_size_of_every_frame(tiny_folder, monkeypatch):
    keys, replay = set(), FastDecoder.replay
    monkeypatch.setattr(FastDecoder, "replay", lambda self, key: (keys.add(key[0]), replay(self, key))[1])
    engine = load_engine(tiny_folder, dtype=torch.float32, num_slots=7, decoder="fast")
    list(engine.generate([Request(text="Hi.", seed=n, max_frames=3 + 2 * n, ignore_end=True) for n in range(7)]))
    assert keys == {7}
    fast = engine._resting.newest
    for count in (1, 2, 3, 5):
        fast.launch(count)
    assert keys == {1, 2, 4, 7}  # doubling, the number of slots last


# ---- given up ------------------------------------------------------------------------------------------------------

SEVERAL = [Request(text=f"Hello {n}.", voices=(long_voice(30),), seed=n, max_frames=40 + n) for n in range(5)]


@pytest.fixture(scope="module")
def fresh(tiny_folder):
    engine = load_engine(tiny_folder, dtype=torch.float32, num_slots=3)
    return {speech.index: speech.codes for speech in engine.generate(SEVERAL)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [0, 2, 11])
@pytest.mark.parametrize("how", ["events", "stream", "generate"])
def test_a_run_given_up_leaves_nothing_behind(tiny_folder, fresh, kind, after, how):
    engine = load_engine(tiny_folder, dtype=torch.float32, num_slots=3, decoder=kind)
    calls = {"events": engine.events, "stream": engine.stream_requests, "generate": engine.generate}
    run = calls[how](SEVERAL)
    assert len(list(itertools.islice(run, after))) == min(after, 5 if how == "generate" else after)
    run.close()
    assert list(run) == []
    for _ in range(2):
        for speech in engine.generate(SEVERAL):
            assert torch.equal(speech.codes, fresh[speech.index])
    sound = torch.cat([chunk.audio for chunk in engine.stream_requests(SEVERAL) if chunk.index == 2])
    torch.testing.assert_close(sound, engine.decode(fresh[2]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_forgotten_without_being_closed(tiny_folder, kind):
    engine = load_engine(tiny_folder, dtype=torch.float32, num_slots=2, decoder=kind)
    fresh = engine.speak(SEVERAL[0]).codes
    for after in range(4):
        run = engine.stream_requests(SEVERAL[1:])
        for _ in range(after):
            next(run)
        del run
        assert torch.equal(engine.speak(SEVERAL[0]).codes, fresh)


def test_an_error_of_the_listener_s_own_ends_the_run(tiny_folder):
    engine = load_engine(tiny_folder, dtype=torch.float32, num_slots=2, decoder="fast")
    fresh = engine.speak(SEVERAL[0]).codes

    def listen():
        for number, _ in enumerate(engine.events(SEVERAL)):
            if number == 9:
                raise ValueError("the player is gone")

    with pytest.raises(ValueError, match="the player is gone"):
        listen()
    assert torch.equal(engine.speak(SEVERAL[0]).codes, fresh)


# ---- two engines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", itertools.product(KINDS, KINDS), ids="-".join)
def test_two_engines_speak_in_turns(tiny_folder, tiny_quantized, kinds):
    """Two checkpoints in one process, their frames interleaved: each says what it says alone."""

    def engines():
        folders = zip((tiny_folder, tiny_quantized), kinds, strict=True)
        return [load_engine(folder, dtype=torch.float32, num_slots=2, decoder=kind) for folder, kind in folders]

    alone = [{s.index: s.codes for s in engine.generate(SEVERAL)} for engine in engines()]
    assert not torch.equal(alone[0][0], alone[1][0])
    found = [{}, {}]
    for events in itertools.zip_longest(*(engine.events(SEVERAL) for engine in engines())):
        for place, event in enumerate(events):
            if isinstance(event, Speech):
                found[place][event.index] = event.codes
    for place in range(2):
        assert all(torch.equal(found[place][n], alone[place][n]) for n in alone[place])


def test_two_engines_of_one_model_share_nothing_else(small_models):
    """One model, two decoders in turns: neither writes into the other's cache."""
    model: DualAR = small_models["shared"]
    prompt = cases.prompt("shared", 20)
    with torch.inference_mode():
        first, second = Decoder(model, 1, 64, 256), Decoder(model, 1, 64, 256)
        first.prefill(0, prompt)
        before = first.cache.copy(0, 20)
        second.prefill(0, cases.prompt("shared", 31))
        assert all(torch.equal(a, b) for a, b in zip(before, first.cache.copy(0, 20), strict=True))
