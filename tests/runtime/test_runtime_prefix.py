"""What prompts begin with is read once: the same bits, whatever was spoken before, on both decoders."""

import pytest
import runtime_cases as cases
import torch
from test_runtime_engine import spoken

from s2quant.prompt import Voice
from s2quant.runtime.cache import KVCache
from s2quant.runtime.decoder import Decoder
from s2quant.runtime.loading import load_engine
from s2quant.runtime.prefix import Prefix, PrefixCache, num_held, prefix_key, read_prompt
from s2quant.runtime.speech import Request

KINDS = ("plain", "fast")


def voice(number):
    generator = torch.Generator().manual_seed(number)
    return Voice(text=f"Said by {number}.", codes=torch.randint(0, 64, (10, 20 + number), generator=generator))


def requests(count=4):
    return [Request(text=f"Hello {n}.", voices=(voice(n % 2),), seed=n, max_frames=12) for n in range(count)]


def speaks_twice_as_the_plain_decoder(folder, num_slots, prefix_bytes):
    """Check the fast decoder's speech, without prefixes and, where any may be kept, with them."""
    plain, fast = (
        load_engine(folder, dtype=torch.float32, num_slots=num_slots, decoder=kind, prefix_bytes=prefix_bytes)
        for kind in KINDS
    )
    theirs = spoken(plain, requests())
    for _ in range(2):
        for ours, its in zip(spoken(fast, requests()), theirs, strict=True):
            assert torch.equal(ours.codes, its.codes)
    assert fast.prefixes.hits == (6 if prefix_bytes else 0)


@pytest.fixture
def reads(monkeypatch):
    """Note how many positions each run of the Slow AR's blocks over a prompt has."""
    from s2quant.runtime import prefix as module

    seen, read = [], module._read
    monkeypatch.setattr(module, "_read", lambda *a: (seen.append(a[3].shape[1] - a[4]), read(*a))[1])
    return seen


@pytest.fixture
def kv(monkeypatch):
    """Give the plain decoder's keys after every prefill."""
    seen, prefill = [], Decoder.prefill

    def note(self, slot, tokens, *more):
        hidden = prefill(self, slot, tokens, *more)
        seen.append((self.cache.copy(slot, tokens.shape[1]), hidden))
        return hidden

    monkeypatch.setattr(Decoder, "prefill", note)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_speech_is_the_same_with_and_without(tiny_folder, reads, kind, dtype):
    def engine(prefix_bytes):
        return load_engine(tiny_folder, dtype=dtype, num_slots=2, decoder=kind, prefix_bytes=prefix_bytes)

    without, kept = engine(0), engine(2**24)
    theirs = spoken(without, requests())
    in_all, pieces = sum(reads), len(reads)
    assert pieces == 8 and without.prefixes.hits == 0 and len(without.prefixes) == 0
    reads.clear()
    for ours, its in zip(spoken(kept, requests()), theirs, strict=True):
        assert torch.equal(ours.codes, its.codes) and ours.num_prompt_tokens == its.num_prompt_tokens
    assert len(reads) == 6 and sum(reads) < in_all and (kept.prefixes.hits, len(kept.prefixes)) == (2, 2)
    reads.clear()
    for ours, its in zip(spoken(kept, requests()), theirs, strict=True):  # from run to run
        assert torch.equal(ours.codes, its.codes)
    assert len(reads) == 4 and max(reads) < 20 and kept.prefixes.hits == 6


def test_keys_values_and_hidden_vectors_are_the_same_bits(tiny_folder, kv):
    engine = load_engine(tiny_folder, num_slots=1)  # bfloat16, where another order of sums would be seen
    engine.speak(requests()[0])
    engine.speak(requests()[0])
    engine.prefixes.clear()
    engine.speak(requests()[0])
    assert (engine.prefixes.hits, engine.prefixes.misses) == (1, 2)
    first, *others = kv
    for (keys, values), hidden in others:
        assert torch.equal(keys, first[0][0]) and torch.equal(values, first[0][1]) and torch.equal(hidden, first[1])


def test_the_prefix_is_the_system_message_and_each_voice_has_its_own(engine):
    with_voice, other, without = (engine._prefix_length(r) for r in (*requests(2), Request(text="Hi.")))
    assert other == with_voice + 1 and without < with_voice - 20
    prompts = [engine._prompt(r, r.text, []) for r in (requests()[0], requests()[2])]
    assert torch.equal(prompts[0][:, :with_voice], prompts[1][:, :with_voice])
    assert prompts[0][0, with_voice - 2] == engine.config.im_end_id
    user = engine.tokenizer.encode("<|im_start|>user\n")
    assert prompts[0][0, with_voice : with_voice + len(user)].tolist() == user


@torch.inference_mode()
def test_two_pieces_are_one_up_to_rounding(small_models):
    slow, prompt = small_models["project"].slow, cases.prompt("project", 40)
    caches = [KVCache(slow.config.slow, 1, 40, torch.device("cpu"), torch.float32) for _ in range(2)]
    whole = read_prompt(slow, caches[0], 0, prompt)
    rest = read_prompt(slow, caches[1], 0, prompt, prefix=25)
    assert rest.shape[1] == 15
    torch.testing.assert_close(rest, whole[:, 25:], atol=2e-5, rtol=0)
    torch.testing.assert_close(caches[1].keys, caches[0].keys, atol=2e-5, rtol=0)
    for length, prefix, held in ((30, 0, 30), (25, 40, 25), (0, 25, 0)):
        cache = KVCache(slow.config.slow, 1, 40, torch.device("cpu"), torch.float32)
        cache.write(0, *caches[0].copy(0, held))
        out = read_prompt(slow, cache, 0, prompt, held=length, prefix=prefix)
        torch.testing.assert_close(out[:, -1], whole[:, -1], atol=2e-5, rtol=0)
    assert read_prompt(slow, caches[0], 0, prompt, held=40) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_in_its_slot(tiny_folder, reads, kind):
    text = "\n".join(f"<|speaker:{n % 2}|>Turn number {n}." for n in range(3))
    request = Request(text=text, seed=6, max_frames=30, chunk_bytes=20)
    engine = load_engine(tiny_folder, dtype=torch.float32, num_slots=2, decoder=kind)
    speech = engine.speak(request)
    assert len(speech.batch_frames) == 3
    prefix, first, *later = reads
    assert prefix == engine._prefix_length(request) and len(later) == 2 and max(later) < first + 8
    history = engine.spoken_sequence(request, speech.codes.split(list(speech.batch_frames), dim=1))
    assert history.shape[1] > prefix + first + sum(later)  # the frames were not read again


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_read_anew_says_the_same(tiny_folder, monkeypatch, kind):
    from s2quant.runtime import slots

    text = "\n".join(f"<|speaker:{n % 2}|>Turn number {n}." for n in range(3))
    several = [Request(text=text, seed=n, max_frames=6 + n, chunk_bytes=20) for n in range(5)]
    engine = load_engine(tiny_folder, dtype=torch.float32, num_slots=2, decoder=kind)
    ours = spoken(engine, several)
    assert {len(speech.batch_frames) for speech in ours} == {3} and "limit" in {s.stop_reason for s in ours}
    monkeypatch.setattr(slots, "num_held", lambda held, tokens: 0)
    for one, other in zip(ours, spoken(engine, several), strict=True):
        assert torch.equal(one.codes, other.codes)


def test_what_a_slot_holds():
    tokens = torch.arange(22).view(2, 11)
    assert num_held(None, tokens) == 0
    assert num_held(tokens[:, :7], tokens) == 7
    assert num_held(tokens, tokens) == 10 == num_held(torch.cat([tokens, tokens], dim=1), tokens)
    other = tokens.clone()
    other[1, 4] = 99  # a code, not a token id
    assert num_held(other, tokens) == 4


def prefix(positions):
    return Prefix(keys=torch.zeros(1, 1, positions, 1), values=torch.zeros(1, 1, positions, 1))


def test_the_longest_unused_is_given_up_and_the_bound_holds():
    cache = PrefixCache(8 * 10)
    cache.keep("a", prefix(4))
    cache.keep("b", prefix(4))
    cache.keep("a", prefix(4))  # kept already: counted once
    assert cache.num_bytes == 64 and cache.find("a") is not None
    cache.keep("c", prefix(5))
    assert cache.find("b") is None and cache.find("a") is not None and cache.find("c") is not None
    assert cache.num_bytes == 72
    cache.keep("d", prefix(11))  # larger than the bound alone
    assert len(cache) == 2 and cache.find("d") is None
    cache.keep("e", prefix(10))
    assert len(cache) == 1 and cache.num_bytes == 80
    cache.clear()
    assert len(cache) == 0 and cache.num_bytes == 0


def test_a_key_says_everything_that_matters():
    cpu, tokens = torch.device("cpu"), torch.arange(6).view(2, 3)
    keys = {prefix_key(t, d, cpu) for t in (tokens, tokens.view(3, 2), tokens + 1) for d in (torch.float32, torch.half)}
    assert len(keys) == 6
    assert prefix_key(tokens.T.contiguous().T, torch.half, cpu) == prefix_key(tokens, torch.half, cpu)


def test_another_model_begins_anew(small_models):
    cache, models = PrefixCache(1000), [m.slow for m in small_models.values()]
    cache.belong_to(models[0])
    cache.keep("a", prefix(4))
    cache.belong_to(models[0])
    assert len(cache) == 1
    cache.belong_to(models[1])
    assert len(cache) == 0
