"""Prompts in padded pieces, as they run without a graph: the plain path's keys, values and codes, padding unseen."""

import pytest
import runtime_cases as cases
import torch
from test_runtime_engine import MIXED, spoken
from test_runtime_fast import same
from test_runtime_prefix import speaks_twice_as_the_plain_decoder
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError
from s2quant.model import DualAR
from s2quant.runtime import engine as engine_module
from s2quant.runtime import fast as fast_module
from s2quant.runtime import prompt_graphs as module
from s2quant.runtime.cache import KVCache
from s2quant.runtime.fast import FastDecoder
from s2quant.runtime.loading import load_engine
from s2quant.runtime.prefix import PrefixCache, read_prompt
from s2quant.runtime.prompt_graphs import PromptReader, pieces
from s2quant.runtime.speech import Request
from s2quant.sampling import Sampling

CPU = torch.device("cpu")
CAPACITY = 112


def long_prompt(case, length):
    """Give int64 [1+N, length]: the case's sequence, again and again."""
    whole = cases.prompt(case, 10_000)
    return whole.repeat(1, -(-length // whole.shape[1]))[:, :length].contiguous()


def bucket(count):
    return next(size for size in (16, 32, 64, CAPACITY) if size >= count)


@pytest.fixture
def in_pieces(monkeypatch):
    """Make fast decoders read in pieces, of 32 positions at most; give the pieces read: (size, context, start)."""
    seen, run = [], PromptReader._run
    monkeypatch.setattr(module, "MOST_PIECE", 32)
    monkeypatch.setattr(
        engine_module, "FastDecoder", lambda *args, **named: FastDecoder(*args, **{**named, "prompt_graphs": True})
    )
    monkeypatch.setattr(
        PromptReader, "_run", lambda self, *key: (seen.append((*key, int(self._positions[0]))), run(self, *key))[1]
    )
    return seen


def garbage(cache, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for part in (cache.keys, cache.values):
        part.copy_(torch.randn(part.shape, generator=generator))
    return cache


def caches(config, count, slots=3):
    return [garbage(KVCache(config.slow, slots, CAPACITY, CPU, torch.float32), n) for n in range(count)]


def test_pieces():
    assert [pieces(n, 64) for n in (1, 16, 17, 33, 64)] == [[16], [16], [64], [64], [64]]
    assert [pieces(n, 256) for n in (65, 128, 129, 300)] == [[128], [128], [256], [256, 64]]
    assert [pieces(n, 64) for n in (65, 128, 200)] == [[64, 16], [64, 64], [64, 64, 64, 16]]
    assert pieces(40, 48) == [48] and pieces(50, 48) == [48, 16] and pieces(513, 512) == [512, 16]


@torch.inference_mode()
@pytest.mark.parametrize("case", ["project", "shared"])
@pytest.mark.parametrize("start", [0, 7, 45])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33, 64, 66])
def test_keys_and_values_are_the_plain_path_s(small_models, case, start, count):
    slow, length = small_models[case].slow, start + count
    prompt, slot = long_prompt(case, length), (start + count) % 3
    plain, ours = caches(small_models[case].config, 2)
    read_prompt(slow, plain, slot, prompt)
    ours.write(slot, *plain.copy(slot, start))
    before = ours.keys.clone(), ours.values.clone()
    reader = PromptReader(slow, ours, bucket, captured=False, most=32)
    assert read_prompt(slow, ours, slot, prompt, held=start, reader=reader) is None
    for mine, its, old in ((ours.keys, plain.keys, before[0]), (ours.values, plain.values, before[1])):
        torch.testing.assert_close(mine[:, slot, :, :length], its[:, slot, :, :length], atol=2e-5, rtol=0)
        assert torch.equal(mine[:, slot, :, :start], old[:, slot, :, :start])
        written = min(start + sum(pieces(count, 32)), CAPACITY)
        assert torch.equal(mine[:, slot, :, written:], old[:, slot, :, written:])
        others = [other for other in range(3) if other != slot]
        assert torch.equal(mine[:, others], old[:, others])


@torch.inference_mode()
@pytest.mark.parametrize("end", [CAPACITY - 1, CAPACITY - 2, CAPACITY - 15, CAPACITY - 16])
def test_padding_stays_within_the_cache_and_before_no_real_position(small_models, end):
    """The padding of a piece of 32 that begins 17 positions before the end of the prompt."""
    slow, prompt = small_models["shared"].slow, long_prompt("shared", end)
    plain, ours = caches(small_models["shared"].config, 2)
    read_prompt(slow, plain, 1, prompt)
    ours.write(1, *plain.copy(1, end - 17))
    PromptReader(slow, ours, bucket, captured=False).read(1, prompt, end - 17)
    torch.testing.assert_close(ours.keys[:, 1, :, :end], plain.keys[:, 1, :, :end], atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.values[:, 1, :, :end], plain.values[:, 1, :, :end], atol=2e-5, rtol=0)
    with pytest.raises(AssertionError):  # a prompt's last position is the first frame's
        PromptReader(slow, ours, bucket, captured=False).read(1, long_prompt("shared", CAPACITY), 0)


@torch.inference_mode()
def test_a_row_does_not_depend_on_padding_nor_on_what_lies_behind(small_models):
    """The same positions in pieces of all sizes and contexts, over different remains in the cache."""
    slow, prompt = small_models["project"].slow, cases.prompt("project", 12)
    found = []
    for seed, (size, context) in enumerate([(16, 16), (16, 64), (32, 32), (64, CAPACITY)]):
        cache = garbage(KVCache(slow.config.slow, 2, CAPACITY, CPU, torch.float32), seed)
        reader = PromptReader(slow, cache, bucket, captured=False, most=size)
        reader.read(0, prompt, 0)
        reader._tokens[0, :, 12:size] = torch.tensor([(seed + 1) * 7] + [seed] * (prompt.shape[0] - 1))[:, None]
        reader._tokens[0, :, :12] = prompt
        reader._positions[:size], reader._slots[:] = torch.arange(size), 1
        reader._piece(size, context)
        found += [torch.stack([cache.keys[:, slot, :, :12], cache.values[:, slot, :, :12]]) for slot in (0, 1)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-5, rtol=0)


class Listed(TorchDispatchMode):
    """Lists operations, with the shapes of tensors and everything else as it is."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = tree_map_only(torch.Tensor, lambda t: (str(t.device), tuple(t.shape)), (args, kwargs))
        self.calls.append((str(func), repr(shapes)))
        return func(*args, **(kwargs or {}))


def test_no_operation_depends_on_a_value(small_models):
    """What a graph would replay: the same operations on the same shapes, whatever slot, start and tokens are."""
    slow, lists = small_models["shared"].slow, []
    cache = caches(small_models["shared"].config, 1)[0]
    reader = PromptReader(slow, cache, bucket, captured=False, most=32)
    reader.read(0, long_prompt("shared", 20), 0)  # makes the table
    for slot, start in ((0, 0), (2, 33), (1, 100)):
        reader._tokens[0, :, :32] = long_prompt("shared", 32).roll(start, 1)
        reader._slots.fill_(slot)
        reader._positions[:] = torch.arange(start, start + 32)
        with Listed() as listed:
            reader._piece(32, 64)
        lists.append(listed.calls)
    assert len(lists[0]) > 200 and lists[0] == lists[1] == lists[2]


def test_a_piece_asks_for_no_value():
    """On tensors without content, where a wait for a value is an error."""
    config = S2Config.from_json(cases.raw_config("shared"))
    with torch.device("meta"):
        model = DualAR(config).eval().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=False):
        state = {name: torch.empty(tensor.shape, dtype=torch.bfloat16) for name, tensor in model.named_parameters()}
        model.load_state_dict(state, assign=True)
        cache = KVCache(config.slow, 3, CAPACITY, CPU, torch.bfloat16)
        reader = PromptReader(model.slow, cache, bucket, captured=False, most=32)
        reader._table = torch.empty(CAPACITY, config.slow.head_dim // 2, 2)
        with Listed() as listed:
            reader._piece(32, 64)
        assert len(listed.calls) > 200
        with pytest.raises(DataDependentOutputException):
            int(reader._positions[0])


def mixed_as_the_plain_decoder(prompt_engine, case, num_slots):
    """Check that the fast decoder speaks as the plain one does, and again with what the first time has kept."""
    plain, fast = (prompt_engine(case, num_slots) for _ in range(2))
    fast.decoder = "fast"
    theirs = spoken(plain, MIXED)
    for _ in range(2):
        for ours, its in zip(spoken(fast, MIXED), theirs, strict=True):
            same(ours, its)


@pytest.mark.parametrize(("case", "num_slots"), [("project", 3), ("shared", 1), ("shared", 2), ("shared", 20)])
def test_speeches_are_the_plain_decoder_s(prompt_engine, in_pieces, case, num_slots):
    mixed_as_the_plain_decoder(prompt_engine, case, num_slots)
    assert {size for size, *_ in in_pieces} == {16, 32}


def test_a_cache_that_grows_and_contexts_of_many_sizes(prompt_engine, in_pieces, monkeypatch):
    monkeypatch.setattr(fast_module, "FIRST_CONTEXT", 16)
    plain, fast = (prompt_engine("shared", 2) for _ in range(2))
    fast.decoder = "fast"
    for engine in (plain, fast):
        engine.prompts = {str(n): long_prompt("shared", n) for n in (5, 31, 60, 120)}
    said = [Request(text=text, seed=n, max_frames=9, ignore_end=True) for n, text in enumerate(("5", "31", "60"))]
    said.append(Request(text="120|5|60", seed=7, max_frames=60))
    for ours, theirs in zip(spoken(fast, said), spoken(plain, said), strict=True):
        same(ours, theirs)
    assert {context for _, context, _ in in_pieces} == {16, 32, 64, 128}
    assert {start for *_, start in in_pieces} >= {0, 32, 64, 96}


def test_graphs_are_given_up_when_the_cache_grows(small_models, monkeypatch):
    monkeypatch.setattr(fast_module, "FIRST_CONTEXT", 16)
    decoder = FastDecoder(small_models["shared"], 1, 64, 256, prompt_graphs=True)
    reader = decoder.reader
    decoder.seat(0, torch.Generator().manual_seed(0), Sampling(), ignore_end=True)
    decoder.begin(0, cases.prompt("shared", 40), 0)
    assert len(reader._table) == 64
    reader._graphs[16, 64] = None
    decoder.ensure(64)
    assert reader._graphs
    decoder.ensure(65)
    assert not reader._graphs and reader._table is None
    decoder.begin(0, cases.prompt("shared", 40), 0)
    assert len(reader._table) == 128


@pytest.mark.parametrize("prefix_bytes", [0, 2**24])
def test_prefixes_that_are_kept(tiny_folder, in_pieces, prefix_bytes):
    speaks_twice_as_the_plain_decoder(tiny_folder, 2, prefix_bytes)


@torch.inference_mode()
def test_a_kept_prefix_is_the_same_bits(small_models):
    """Read and kept, or copied: what is read behind it is the same to the last bit, in bfloat16 too."""
    slow, prompt, kept = small_models["shared"].slow, long_prompt("shared", 70), PrefixCache()
    found = []
    for slot, cache in enumerate(caches(small_models["shared"].config, 3)):
        reader = PromptReader(slow, cache, bucket, captured=False, most=32)
        read_prompt(slow, cache, slot, prompt, prefix=41, prefixes=kept, reader=reader)
        found.append(cache.copy(slot, 70))
    assert (kept.hits, kept.misses) == (2, 1)
    for keys, values in found[1:]:
        assert torch.equal(keys, found[0][0]) and torch.equal(values, found[0][1])


def test_a_conversation_goes_on_in_its_slot(tiny_folder, in_pieces):
    text = "\n".join(f"<|speaker:{n % 2}|>Turn number {n}." for n in range(3))
    several = [Request(text=text, seed=n, max_frames=6 + n, chunk_bytes=20) for n in range(5)]
    plain, fast = (load_engine(tiny_folder, dtype=torch.float32, num_slots=2, decoder=d) for d in ("plain", "fast"))
    theirs = spoken(plain, several)
    assert {len(speech.batch_frames) for speech in theirs} == {3}
    for ours, its in zip(spoken(fast, several), theirs, strict=True):
        same(ours, its)
    starts = [start for *_, start in in_pieces]
    prefix = fast._prefix_length(several[0])
    assert starts.count(0) == 1 and starts.count(prefix) == len(several)  # others begin behind what is held
    assert len(starts) >= 1 + 3 * len(several) and max(starts) > 60


def test_a_long_context_is_read_the_plain_way(prompt_engine, in_pieces, monkeypatch):
    monkeypatch.setattr(fast_module, "FIRST_CONTEXT", 16)
    monkeypatch.setattr(module, "MOST_CONTEXT", 32)
    plain, fast = (prompt_engine("shared", 2, lengths=(5, 31)) for _ in range(2))
    fast.decoder = "fast"
    for engine in (plain, fast):
        engine.prompts["60"] = long_prompt("shared", 60)
    said = [Request(text=text, seed=n, max_frames=9) for n, text in enumerate(("5", "60", "31"))]
    for ours, theirs in zip(spoken(fast, said), spoken(plain, said), strict=True):
        same(ours, theirs)
    assert {start for *_, start in in_pieces} == {0} and len(in_pieces) == 2


def test_on_a_cpu_it_is_off_unless_asked_for(small_models, tiny_folder, prompt_engine):
    assert module.PROMPT_GRAPHS and FastDecoder(small_models["shared"], 1, 16, 256).reader is None
    for asked in (None, True):
        engine = load_engine(tiny_folder, dtype=torch.float32, decoder="fast", prompt_graphs=asked)
        engine.speak(Request(text="Hi.", max_frames=2))
        assert (engine._resting.newest.reader is not None) == bool(asked)
    with pytest.raises(UserError, match="prompt graphs and the plain decoder"):
        prompt_engine(prompt_graphs=True)
