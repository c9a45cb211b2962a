"""Prompts that are read together: who is read with whom, when, and that nobody's speech is another for it.

The frame's kernels need a GPU: a reading of the same rows by plain torch stands for them here.
"""

import pytest
import torch
from test_runtime_engine import spoken
from test_runtime_fast import same
from test_runtime_prefix import speaks_twice_as_the_plain_decoder
from test_runtime_prompt_graphs import long_prompt, mixed_as_the_plain_decoder

from s2quant.errors import UserError
from s2quant.runtime import engine as engine_module
from s2quant.runtime import fast as fast_module
from s2quant.runtime import prompt_graphs as module
from s2quant.runtime.cache import _attend_step
from s2quant.runtime.fast import FastDecoder
from s2quant.runtime.loading import load_engine
from s2quant.runtime.prompt_graphs import PromptReader
from s2quant.runtime.sampler import Noise
from s2quant.runtime.speech import Request
from s2quant.sampling import Sampling


class Rows:
    """Reads rows, each with a slot and a position of its own; stands for `FusedFrame`."""

    def __init__(self, slow, prompt_rows):
        self.slow, self.prompt_rows = slow, prompt_rows

    def read(self, columns, positions, slots, cache, table, context):
        where = positions.clamp(max=cache.capacity - 1)
        seen = (torch.arange(context) <= positions[:, None])[:, None, None]

        def attend_for(layer):
            def attend(q, k, v):
                cache.keys[layer, slots, :, where], cache.values[layer, slots, :, where] = k[:, 0], v[:, 0]
                keys, values = (part[layer, slots, :, :context] for part in (cache.keys, cache.values))
                return _attend_step(q, keys, values, seen)

            return attend

        x = self.slow.embed(columns[..., None])
        self.slow.blocks(x, table[where][:, None], [attend_for(layer) for layer in range(cache.num_layers)])


@pytest.fixture
def together(monkeypatch):
    """Make fast decoders read prompts together, by pieces of 64 at most; give the pieces read: (size, slots)."""
    seen, run = [], PromptReader._run

    def make(model, *args, **named):
        decoder = FastDecoder(model, *args, **{**named, "prompt_graphs": True})
        how = (decoder.reader.context_bucket, False, None, None, Rows(model.slow, 64), True)
        decoder.reader = PromptReader(model.slow, decoder.cache, *how)
        assert decoder.reader.together
        return decoder

    def noted(self, size, context):
        seen.append((size, list(dict.fromkeys(self._slots[:size].tolist()))))
        run(self, size, context)

    monkeypatch.setattr(engine_module, "FastDecoder", make)
    monkeypatch.setattr(PromptReader, "_run", noted)
    return seen


@pytest.mark.parametrize(("case", "num_slots"), [("project", 3), ("shared", 1), ("shared", 2), ("shared", 20)])
def test_speeches_are_the_plain_decoder_s(prompt_engine, together, case, num_slots):
    """Over slots, refills, moves to another slot, and batches of text that begin while others speak."""
    mixed_as_the_plain_decoder(prompt_engine, case, num_slots)
    assert {size for size, _ in together} == {16, 64}
    assert num_slots < 3 or max(len(slots) for _, slots in together) > 1


def test_prompts_that_begin_together_are_read_in_as_few_pieces_as_hold_them(prompt_engine, together):
    fast = prompt_engine("shared", 6, lengths=(5, 8, 19, 31, 41))
    fast.decoder = "fast"
    said = [Request(text=text, seed=n, max_frames=3) for n, text in enumerate(("19", "5", "41", "31", "8", "19"))]
    spoken(fast, said)  # without the last position of each: 4 and 7; 18, 40, 30 and 18
    assert together == [(16, [1, 4]), (64, [0, 2, 3]), (64, [3, 5])]


def test_a_cache_that_grows_between_them(prompt_engine, together, monkeypatch):
    monkeypatch.setattr(fast_module, "FIRST_CONTEXT", 16)
    plain, fast = (prompt_engine("shared", 4) for _ in range(2))
    fast.decoder = "fast"
    for engine in (plain, fast):
        engine.prompts = {str(n): long_prompt("shared", n) for n in (5, 20, 31, 60, 120)}
    said = [Request(text=t, seed=n, max_frames=9, ignore_end=True) for n, t in enumerate(("20", "60", "120", "31"))]
    said += [Request(text="120|5|60", seed=7, max_frames=60), Request(text="20|31", seed=8, max_frames=30)]
    for ours, theirs in zip(spoken(fast, said), spoken(plain, said), strict=True):
        same(ours, theirs)
    assert together[:4] == [(64, [0, 1]), (64, [1, 2]), (64, [2]), (64, [2, 3])]


@pytest.mark.parametrize("prefix_bytes", [0, 2**24])
def test_prefixes_are_read_at_once_and_what_is_behind_them_together(tiny_folder, together, prefix_bytes):
    speaks_twice_as_the_plain_decoder(tiny_folder, 4, prefix_bytes)
    assert max(len(slots) for _, slots in together) > 1


def test_a_conversation_goes_on_in_its_slot(tiny_folder, together):
    text = "\n".join(f"<|speaker:{n % 2}|>Turn number {n}." for n in range(3))
    several = [Request(text=text, seed=n, max_frames=6 + n // 3, chunk_bytes=20) for n in range(7)]
    plain, fast = (load_engine(tiny_folder, dtype=torch.float32, num_slots=3, decoder=d) for d in ("plain", "fast"))
    theirs = spoken(plain, several)
    assert {len(speech.batch_frames) for speech in theirs} == {3}
    for ours, its in zip(spoken(fast, several), theirs, strict=True):
        same(ours, its)
    alone = [fast.speak(request) for request in several]
    for ours, its in zip(alone, theirs, strict=True):  # and with nobody beside it
        assert torch.equal(ours.codes, its.codes)


def test_what_waits_is_read_before_it_is_looked_at(small_models, together):
    """Moved, begun anew, or advanced: the same keys as read at once."""
    model, prompts = small_models["shared"], [long_prompt("shared", length) for length in (20, 33, 50)]

    def decoder_for():
        decoder = engine_module.FastDecoder(model, 3, 64, 256)
        for slot in range(3):
            decoder.seat(slot, Noise(torch.Generator().manual_seed(slot)), Sampling(), ignore_end=True)
        return decoder

    def keys(decoder, slot, length):
        return decoder.cache.copy(slot, length - 1)[0]

    usual, ours = decoder_for(), decoder_for()
    usual.reader.together = False
    for decoder in (usual, ours):
        decoder.begin(0, prompts[0], 0)
        decoder.begin(2, prompts[1], 0)
    assert together == [(64, [0]), (64, [2])] and ours.reader.waits(0) and ours.reader.waits(2)
    assert not ours.cache.keys.any()
    ours.move(2, 1)
    usual.move(2, 1)
    assert together[2:] == [(64, [0, 2])] and not ours.reader.waits(0)
    torch.testing.assert_close(keys(ours, 1, 33), keys(usual, 1, 33), atol=2e-5, rtol=0)
    drawn = []
    for decoder in (usual, ours):
        decoder.begin(0, prompts[2], 0)  # a run that is given up
        decoder.begin(0, prompts[1], 0)
        decoder.begin(1, prompts[2], 0, held=20)
        decoder.begin(2, prompts[0], 0)
        drawn.append(decoder.launch(3).columns())
        assert not decoder.reader.waits(0)
    assert torch.equal(*drawn)
    for slot, length in ((0, 33), (1, 50), (2, 20)):
        torch.testing.assert_close(keys(ours, slot, length), keys(usual, slot, length), atol=2e-5, rtol=0)
    assert [slots for _, slots in together[-2:]] == [[0, 1, 2], [2]]


def test_it_is_refused_where_it_cannot_be_done(tiny_folder, prompt_engine, monkeypatch):
    with pytest.raises(UserError, match="prompts together: they are not read in pieces by the frame's kernels"):
        prompt_engine(prompts_together=True)
    with pytest.raises(UserError, match="prompts together: "):  # no GPU, or a model in float32
        load_engine(tiny_folder, dtype=torch.float32, decoder="fast", prompt_graphs=True, prompts_together=True)
    assert not prompt_engine().prompts_together
    monkeypatch.setattr(module, "frame_obstacle", lambda model, residual_size: None)

    def found(pieces, asked):
        how = {"decoder": "fast", "prompt_graphs": pieces, "prompts_together": asked}
        return load_engine(tiny_folder, dtype=torch.float32, **how).prompts_together

    assert [found(*how) for how in ((False, None), (True, None), (True, False))] == [False, True, False]
    monkeypatch.setattr(module, "PROMPTS_TOGETHER", False)
    assert [found(*how) for how in ((True, None), (True, True))] == [False, True]


def test_long_prompts_are_read_alone_and_their_ends_by_torch(prompt_engine, together, monkeypatch):
    """Kernels as far as whole pieces reach, then torch's operations; the speech is the plain decoder's."""
    monkeypatch.setattr(module, "KERNEL_CONTEXT", 64)
    monkeypatch.setattr(fast_module, "FIRST_CONTEXT", 32)
    plain, fast = (prompt_engine("shared", 4) for _ in range(2))
    fast.decoder = "fast"
    for engine in (plain, fast):
        engine.prompts = {str(n): long_prompt("shared", n) for n in (20, 31, 70, 120)}
    contexts, read = [], Rows.read
    monkeypatch.setattr(Rows, "read", lambda self, *given: (contexts.append(given[-1]), read(self, *given))[1])
    said = [Request(text=text, seed=n, max_frames=3) for n, text in enumerate(("20", "120", "70", "31"))]
    for ours, theirs in zip(spoken(fast, said), spoken(plain, said), strict=True):
        same(ours, theirs)
    assert together == [(64, [1]), (64, [1]), (64, [2]), (16, [2]), (64, [0, 3])]
    assert contexts == [64, 64, 32]
