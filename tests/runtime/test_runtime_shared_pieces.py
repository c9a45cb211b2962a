"""Prompts that share pieces, by the frame's kernels: the bits of each read alone. Triton's interpreter, or a GPU."""

import numpy as np
import pytest
import runtime_cases as cases
import torch
from test_runtime_fused import CHECKPOINTS, DEVICE, INSIDE, NEEDED, RESIDUAL, models

from s2quant.runtime.cache import KVCache
from s2quant.runtime.prompt_graphs import LEAST_MANY, LEAST_PIECE, Part, PromptReader

CAPACITY = 512 if not INSIDE else 160
MOST = 256 if not INSIDE else 128
FEW = [(9, 0), (10, 30)]  # positions that are read, positions that are there before; by the kernels of few rows
MANY = [(70, 75), (31, 40)]  # the first across position 128, where a stretch of 64 rows of two heads ends
MORE = [(17, 3), (64, 0), (200, 60), (300, 0), (18, 490), (257, 7)]
pytestmark = pytest.mark.usefixtures("wide_programs")


@pytest.mark.skipif(INSIDE, reason="this is the process")
def test_in_the_interpreter():
    cases.passes_in_the_interpreter(__file__)


def parts_of(config, sizes):
    from tools.speed import frames

    whole = [frames.forced_tokens(config, 30, CAPACITY).roll(17 * n, 1) for n in range(len(sizes))]
    return [
        Part(slot=slot, tokens=whole[slot][:, : start + count].contiguous(), start=start)
        for slot, (count, start) in enumerate(sizes)
    ]


def garbage(config, slots):
    cache = KVCache(config.slow, slots, CAPACITY, torch.device(DEVICE), torch.bfloat16)
    for n, part in enumerate((cache.keys, cache.values)):
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(n)))
    return cache


@pytest.fixture
def exact_products(monkeypatch):
    """Let the interpreter's matrix products not depend on where a row stands, as numpy's own do in their last bit."""
    if not INSIDE:
        return
    from triton.runtime import interpreter

    class Numpy:
        def __getattr__(self, name):
            return getattr(np, name)

        def matmul(self, a, b, dtype=np.float32):
            return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(dtype)

    monkeypatch.setattr(interpreter, "np", Numpy())


@torch.inference_mode()
@pytest.mark.parametrize("checkpoint", list(CHECKPOINTS)[1:] if INSIDE else list(CHECKPOINTS))
def test_prompts_that_share_pieces_have_the_bits_of_each_read_alone(checkpoint, exact_products):
    from s2quant.runtime.fused import FusedFrame

    model = models(CHECKPOINTS[checkpoint], num_layers=2)[1]
    parts = parts_of(model.config, [*FEW, *MANY, *(() if INSIDE else MORE)])
    fused, seen = FusedFrame(model, 1, RESIDUAL, CAPACITY, prompt_rows=MOST), []
    read = fused.read
    fused.read = lambda columns, *more: (seen.append(len(columns)), read(columns, *more))[1]

    def reader(most):
        cache = garbage(model.config, len(parts) + 1)
        return PromptReader(model.slow, cache, lambda count: CAPACITY, captured=False, most=most, fused=fused)

    alone, untouched = reader(MOST), reader(MOST).cache
    for part in parts:
        alone.read(part.slot, part.tokens, part.start)
    assert set(seen) >= {16, 64, 128}
    count = sum(part.count for part in parts if part.count > LEAST_PIECE)
    for most, order in ((LEAST_MANY, parts[::-1]), *(() if INSIDE else ((MOST, parts),))):
        seen.clear()
        ours = reader(most)
        ours.read_together(order)
        assert seen[:2] == [16] * 2 and len(seen) == 2 + -(-count // most) and set(seen[2:]) <= {64, 128, 256}
        padded = [[part.slot for part in order if (part.count <= LEAST_PIECE) == few][-1] for few in (True, False)]
        for mine, its, old in zip(*((c.keys, c.values) for c in (ours.cache, alone.cache, untouched)), strict=True):
            assert torch.isfinite(mine).all() and torch.equal(mine[:, -1], old[:, -1])
            for part in parts:
                slot, start, end = part.slot, part.start, part.tokens.shape[1]
                assert torch.equal(mine[:, slot, :, :end], its[:, slot, :, :end])
                assert torch.equal(mine[:, slot, :, :start], old[:, slot, :, :start])
                assert (mine[:, slot, :, start:end] != old[:, slot, :, start:end]).any(dim=-1).all()
                if slot not in padded:
                    assert torch.equal(mine[:, slot, :, end:], old[:, slot, :, end:])
    assert not fused.prompt_scratch.arrived.any()


def test_speeches_on_a_gpu_have_the_same_codes_read_together_or_one_by_one(tiny_folder):
    """By graphs, over refills and several batches of text, with a prefix that is kept and one that is not."""
    from s2quant.prompt import Voice
    from s2quant.runtime.loading import load_engine
    from s2quant.runtime.speech import Request

    voice = Voice(text="Said.", codes=torch.arange(10 * 90).view(10, 90) % 64)
    turns = "\n".join(f"<|speaker:{n % 2}|>Turn number {n}." for n in range(3))
    said = [
        Request(text=f"Hello {n}." * (1 + 9 * (n % 3)), voices=(voice,) * (n % 2), seed=n, max_frames=20 + 3 * (n % 4))
        for n in range(17)
    ]
    said += [Request(text=turns, seed=n, max_frames=20, chunk_bytes=20) for n in range(20, 24)]
    said.append(Request(text="Hello.", voices=(voice, voice), seed=30, max_frames=700))  # the cache grows
    found = []
    for together, prefix_bytes in ((False, 2**26), (True, 2**26), (True, 0)):
        engine = load_engine(
            tiny_folder, "cuda", num_slots=7, decoder="fast", prompts_together=together, prefix_bytes=prefix_bytes
        )
        for _ in range(2):  # captured, then replayed
            found.append({speech.index: speech.codes for speech in engine.generate(said)})
        reader = engine._resting.newest.reader
        assert reader.together is together and reader._graphs
    for other in found[1:]:
        assert all(torch.equal(other[index], codes) for index, codes in found[0].items())


if INSIDE:
    del test_speeches_on_a_gpu_have_the_same_codes_read_together_or_one_by_one
else:
    test_speeches_on_a_gpu_have_the_same_codes_read_together_or_one_by_one = NEEDED(
        test_speeches_on_a_gpu_have_the_same_codes_read_together_or_one_by_one
    )
    test_prompts_that_share_pieces_have_the_bits_of_each_read_alone = NEEDED(
        test_prompts_that_share_pieces_have_the_bits_of_each_read_alone
    )
