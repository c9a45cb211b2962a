"""Weights ahead: who asks for what, that every byte is asked for once, and that frames are the same ones."""

from dataclasses import replace

import pytest
import runtime_cases as cases
import torch
from test_runtime_fused import CHECKPOINTS, DEVICE, INSIDE, NEEDED, RESIDUAL, models

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from s2quant.runtime.kernels import ahead  # noqa: E402
from s2quant.runtime.kernels.ahead import MIB, Upcoming, chunks_of, found_ahead, found_last  # noqa: E402

MIXED = "4 bits, but w2, and an 8-bit Fast AR"


@pytest.mark.skipif(INSIDE, reason="this is the process")
def test_in_the_interpreter():
    cases.passes_in_the_interpreter(__file__)


def kernel(test):
    """Mark a test that runs in the interpreter's process, or on a GPU."""
    return test if INSIDE else NEEDED(test)


@triton.jit
def _shared_out(upcoming, out, ASKED: tl.constexpr, PARTS: tl.constexpr, TURNS: tl.constexpr, LAST: tl.constexpr):
    program = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    if LAST:
        found = found_last(upcoming, ASKED, PARTS, TURNS)
    else:
        found = found_ahead(upcoming, program, programs, ASKED, PARTS, TURNS)
    for turn in tl.static_range(TURNS):
        at = out + (turn * programs + program) * 2
        tl.store(at, found[2 * turn])
        tl.store(at + 1, found[2 * turn + 1].to(tl.int64))


@kernel
@pytest.mark.parametrize("grid", [(1, 1, 1), (7, 1, 1), (4, 8, 2), (10, 4, 25)])
@pytest.mark.parametrize("mebibytes", [1, 3])
@pytest.mark.parametrize("last", [False, True])
def test_programs_ask_for_every_byte_once(grid, mebibytes, last):
    programs = grid[0] * grid[1] * grid[2]
    sizes = [5 * ahead.CHUNK, 16, ahead.CHUNK + 48, 1000 * 16, 30 * ahead.CHUNK]
    begins = [1 << 40, (1 << 40) + 6 * ahead.CHUNK, (1 << 47) - (1 << 20), 1 << 21, 1 << 30]
    rows = [
        (begin + at, min(ahead.CHUNK, size - at))
        for begin, size in zip(begins, sizes, strict=True)
        for at in range(0, size, ahead.CHUNK)
    ]
    asked = rows[: mebibytes * MIB // ahead.CHUNK]
    assert len(asked) < len(rows)
    table = torch.tensor(rows, dtype=torch.int64).to(DEVICE)
    arguments = Upcoming(chunks=table).arguments(mebibytes, grid)
    chunks = arguments.pop("upcoming")
    out = torch.full((arguments["TURNS"] * programs, 2), -1, dtype=torch.int64, device=DEVICE)
    _shared_out[grid](chunks, out, **arguments, LAST=last)
    found = sorted((begin, begin + size) for begin, size in out.tolist() if size)
    assert all(begin % 16 == 0 == end % 16 and begin < end for begin, end in found)
    assert (out[:, 1] >= 0).all() and merged(found) == merged(sorted((at, at + size) for at, size in asked))
    assert len(found) >= min(programs, len(asked))  # nobody takes all of it
    if last and programs > 1:  # the grid's last programs
        assert out[programs - 1, 1] and (programs < 1000 or not out[0, 1])


def merged(intervals):
    """Join intervals, given in order, that touch; those that overlap are a fault."""
    found = []
    for begin, end in intervals:
        assert not found or found[-1][1] <= begin
        if found and found[-1][1] == begin:
            found[-1][1] = end
        else:
            found.append([begin, end])
    return found


def test_a_tensor_is_cut_up_into_whole_sixteens():
    memory = torch.zeros(3 * ahead.CHUNK + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 16
    for begin, size in ((0, 3 * ahead.CHUNK), (16, 48), (4, 100), (3, 12)):
        part = memory[start + begin : start + begin + size]
        rows = chunks_of(part).tolist()
        first, last = part.data_ptr(), part.data_ptr() + size
        assert all(at % 16 == 0 == count % 16 and 0 < count <= ahead.CHUNK for at, count in rows)
        if rows:
            assert first <= rows[0][0] < first + 16 and last - 16 < sum(rows[-1]) <= last
            assert merged([(at, at + count) for at, count in rows]) == [[rows[0][0], sum(rows[-1])]]
        assert bool(rows) == (size > 12)


EVERYWHERE = {"ahead_attention": 1, "ahead_short": 2, "ahead_draws": 3, "ahead_finish": 4, "ahead_products": 1}
FEW = {"attention_kernel", "short_kernel", "embed_kernel", "semantic_kernel", "residual_kernel", "linear_kernel"}
LAUNCHES = FEW | {"many_kernel", "finish_kernel"}


@pytest.fixture
def seen(monkeypatch):
    """Note the launches in their order: the weights that products read, and what others ask for."""
    from s2quant.runtime.kernels import attention, choice, linear, many, steps

    noted = []
    monkeypatch.setattr(ahead, "CHUNK", 4096)  # so that so small weights have several

    class Noted:
        def __init__(self, launched):
            self.launched, self.name = launched, launched.__name__

        def __getitem__(self, grid):
            def launch(*values, **named):
                noted.append((self.name, grid, named))
                return self.launched[grid](*values, **named)

            return launch

    owners = {"attention_kernel": attention, "short_kernel": attention, "finish_kernel": many, "many_kernel": many}
    owners["linear_kernel"] = linear
    for name in LAUNCHES:
        owner = owners.get(name, steps)
        monkeypatch.setattr(owner, name, Noted(getattr(owner, name)))
    multiply = choice.multiply

    def noted_multiply(weight, *values, **named):
        noted.append(("product", weight, None))
        multiply(weight, *values, **named)

    monkeypatch.setattr(choice, "multiply", noted_multiply)
    return noted


def bytes_of(weight):
    """Give the places of a weight's tensors, in the order in which they are asked for."""
    parts = [part for part in (weight.first, weight.second) if part is not None]
    return [(part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts]


def after(asked, wanted):
    """Give what is left of what is wanted behind what is asked for, which has to be its beginning, byte by byte."""
    left = list(wanted)
    for begin, end in asked:
        assert left[0][0] == begin and end <= left[0][1]
        left[:1] = [] if end == left[0][1] else [(end, left[0][1])]
    return left


if INSIDE:

    @torch.inference_mode()
    @pytest.mark.parametrize(("checkpoint", "slots"), [("bf16", 1), (MIXED, 17)])
    def test_a_launch_asks_for_what_the_next_products_read(checkpoint, slots, seen, monkeypatch):
        from s2quant.runtime.kernels import shapes
        from s2quant.runtime.kernels.launch import MEASURED
        from tools.speed import frames

        monkeypatch.setitem(shapes.LEAST_STEPS, "bf16", 1)  # so that the inputs of so small a model are split too
        model = models(CHECKPOINTS[checkpoint], num_layers=2)[1]
        decoder = frames.seated(
            model, slots, 20, RESIDUAL, fused=True, graphs=False, how=replace(MEASURED, **EVERYWHERE)
        )
        seen.clear()
        decoder.replay((slots, 32, 32))
        weights = [weight for name, weight, _ in seen if name == "product"]
        assert len(weights) == 4 * 2 + 1 + 2 * (4 + 1)
        found = set()
        for number, (name, grid, named) in enumerate(seen):
            if name == "product":
                continue
            found.add(name)
            done = sum(other == "product" for other, *_ in seen[:number])
            if done == len(weights):
                assert named["ASKED"] == 0 and named["upcoming"] is None
                continue
            field = name.removesuffix("_kernel").replace("linear", "products").replace("many", "products")
            part = EVERYWHERE.get(f"ahead_{field}", EVERYWHERE["ahead_draws"])
            most = part * MIB // 4096
            rows = named["upcoming"][:most]
            assert len(rows) == most and named["ASKED"] == most * named["PARTS"]
            programs = torch.Size(grid).numel()
            if "HELPERS" in named:
                columns = grid[1] if len(grid) > 1 else 1
                assert named["HELPERS"] == 64 and grid[0] == slots + 64
                programs = 64 * columns
            assert programs * named["TURNS"] >= named["ASKED"] > programs * (named["TURNS"] - 1)
            asked = [(at, at + size) for at, size in rows.tolist() if size]
            wanted = [place for weight in weights[done:] for place in bytes_of(weight)]
            left = after(asked, wanted)
            assert len(asked) == most or not left
        assert found == (FEW if slots == 1 else LAUNCHES - {"linear_kernel"})

    @torch.inference_mode()
    def test_reading_a_prompt_asks_for_nothing(seen):
        from s2quant.runtime.cache import KVCache
        from s2quant.runtime.fused import FusedFrame
        from s2quant.runtime.kernels.launch import MEASURED
        from s2quant.runtime.prompt_graphs import PromptReader
        from tools.speed import frames

        model = models(CHECKPOINTS["bf16"], num_layers=2)[1]
        fused = FusedFrame(model, 1, RESIDUAL, 128, replace(MEASURED, **EVERYWHERE), prompt_rows=64)
        cache = KVCache(model.config.slow, 2, 128, torch.device(DEVICE), torch.bfloat16)
        reader = PromptReader(model.slow, cache, lambda count: 128, captured=False, most=64, fused=fused)
        reader.read(1, frames.forced_tokens(model.config, 8, 1), 0)
        assert {name for name, *_ in seen} >= {"product", "attention_kernel", "embed_kernel"}
        assert not any(named["ASKED"] for name, _, named in seen if name != "product")


@kernel
@torch.inference_mode()
@pytest.mark.parametrize(("checkpoint", "slots"), [("bf16", 1), (MIXED, 17)])
def test_frames_are_the_same_with_and_without(checkpoint, slots, monkeypatch):
    from s2quant.runtime.kernels import shapes
    from s2quant.runtime.kernels.launch import MEASURED
    from tools.speed import frames

    monkeypatch.setitem(shapes.LEAST_STEPS, "bf16", 1)
    model = models(CHECKPOINTS[checkpoint])[1]
    found = []
    for how in (MEASURED, replace(MEASURED, **EVERYWHERE)):
        decoder = frames.seated(model, slots, 20, RESIDUAL, fused=True, graphs=None, how=how)
        drawn = torch.stack([decoder.launch(slots).columns() for _ in range(1 if INSIDE else 20)])
        fused = decoder._fused
        assert fused is not None and (fused.order.chunks is None) == (how == MEASURED)
        found.append([drawn, fused.logits[:slots].clone(), fused.fast_logits[:slots].clone(), decoder.cache.keys])
    for without, asked in zip(*found, strict=True):
        assert torch.equal(without, asked)
