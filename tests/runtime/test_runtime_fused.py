"""Whole fused frames of a very small model against the plain decoder: in Triton's interpreter, or on a GPU."""

import os
from dataclasses import replace

import pytest
import runtime_cases as cases
import torch
from model_cases import _config, _sizes

from s2quant.checkpoint.config import S2Config
from s2quant.model import DualAR
from s2quant.runtime.cache import KVCache
from s2quant.runtime.linears import make_linear
from s2quant.runtime.load import set_module
from s2quant.runtime.prefix import read_prompt

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
DEVICE = "cpu" if INSIDE else "cuda"
NEEDED = pytest.mark.gpu(pytest.mark.skipif(not HAS_GPU, reason="needs a Hopper GPU, or the interpreter"))
RESIDUAL = 64
pytestmark = pytest.mark.usefixtures("wide_programs")


@pytest.mark.skipif(INSIDE, reason="this is the process")
def test_in_the_interpreter():
    cases.passes_in_the_interpreter(__file__)


def models(bits_of, num_layers=1):
    """Give the same model twice, its quantized linears by the reference and by our kernels."""
    sizes = (128, 4, 2, 32, 128)
    raw = _config(3, _sizes(num_layers, *sizes, True), _sizes(1, *sizes, False))
    raw["audio_decoder_config"]["tie_word_embeddings"] = False
    torch.manual_seed(0)
    dense = DualAR(S2Config.from_json(raw)).to(torch.bfloat16).eval().requires_grad_(False)
    for name, parameter in dense.named_parameters():
        scale = 1.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.copy_(noise * scale + (1.0 if parameter.ndim == 1 else 0.0) * (1 - noise))
    found = []
    for backend in ("reference", "triton"):
        model = DualAR(dense.config).to(torch.bfloat16).eval().requires_grad_(False)
        model.load_state_dict(dense.state_dict())
        linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        shared: torch.Tensor | None = None
        for number, (name, module) in enumerate(linears):
            bits = bits_of(name)
            if bits is None:
                continue
            weight = cases.quantized_weight(module.out_features, module.in_features, bits=bits, seed=number)
            if name.endswith("w3"):
                weight = type(weight)(**{**vars(weight), "g_idx": shared})
            elif name.endswith("w1"):
                shared = weight.g_idx
            set_module(model, name, make_linear(weight.to(DEVICE), torch.bfloat16, backend))
        found.append(model.to(DEVICE))
    return found


CHECKPOINTS = {
    "bf16": lambda name: None,
    "4 bits, and an 8-bit Fast AR": lambda name: 8 if name.startswith("fast") else 4,
}
MIXED = {  # a packed pair writes for a dense w2, a dense pair for a packed one
    "4 bits but w2, and a Fast AR with an 8-bit w2": lambda name: (
        (8 if name.endswith("w2") else None) if name.startswith("fast") else None if name.endswith("w2") else 4
    ),
}


# 24 slots are many rows; 12 are few, but the two tokens of each that begin the Fast AR are many
FRAMES = [
    *((checkpoint, *row) for checkpoint in CHECKPOINTS for row in ((1, {}), (12, {}), (24, {}))),
    *((checkpoint, 24, {}) for checkpoint in MIXED),
    *((checkpoint, 17, {"many_rows": False}) for checkpoint in CHECKPOINTS),  # more than 16: they would be many
]


@pytest.mark.parametrize(("checkpoint", "slots", "off"), FRAMES, ids=str)
def test_frames_are_the_plain_decoder_s(checkpoint, slots, off, monkeypatch):
    if INSIDE and "many_rows" in off and checkpoint != "bf16":
        pytest.skip("ten seconds in the interpreter; packed products of 17 rows: test_runtime_kernels.py")
    from s2quant.runtime.kernels import shapes
    from s2quant.runtime.kernels.launch import MEASURED
    from tools.speed import frames

    how = replace(MEASURED, **off) if off else None  # None: as the decoder launches by itself
    monkeypatch.setitem(shapes.LEAST_STEPS, "bf16", 1)  # so that the inputs of so small a model are split too
    plain, packed = models((CHECKPOINTS | MIXED)[checkpoint])
    tokens = frames.forced_tokens(plain.config, 6, 1)
    logits, hidden = frames.plain_logits(plain, tokens, 6)
    fused, drawn, last = frames.fused_logits(packed, tokens, 6, RESIDUAL, slots, how)
    plain_last = frames.fast_last_logits(plain, hidden, drawn[:, 1:].to(DEVICE), RESIDUAL)
    for ours, theirs in ((fused, logits), (last, plain_last)):
        assert torch.isfinite(ours).all() and ours.shape == theirs.shape
        assert float((ours - theirs).norm() / theirs.norm()) < 0.03
    assert (drawn[:, 2:] < RESIDUAL).all() and (drawn >= 0).all()


def test_attention_that_adds_parts_up_draws_the_same_frames(monkeypatch):
    """The same bits, but on a GPU, where layouts decide in which order squares are added up."""
    from s2quant.runtime.kernels import shapes
    from s2quant.runtime.kernels.attended import Parts
    from s2quant.runtime.kernels.launch import MEASURED
    from tools.speed import frames

    counts: list[int] = []
    made = Parts.of.__func__

    def of(cls, *values):
        parts = made(cls, *values)
        counts.append(0 if parts is None else parts.count)
        return parts

    monkeypatch.setattr(Parts, "of", classmethod(of))
    monkeypatch.setitem(shapes.LEAST_STEPS, "bf16", 1)
    model = models(CHECKPOINTS["bf16"])[1]
    tokens = frames.forced_tokens(model.config, 6, 1)
    found = [
        frames.fused_logits(model, tokens, 6, RESIDUAL, 20, replace(MEASURED, attention_adds=adds))
        for adds in (True, False)
    ]
    assert counts and set(counts) == {2}
    for ours, theirs in zip(*found, strict=True):
        if INSIDE:
            assert torch.equal(ours, theirs)
        assert float((ours.float() - theirs.float()).norm()) <= 0.01 * float(theirs.float().norm())


@pytest.mark.parametrize("checkpoint", list(CHECKPOINTS))
def test_a_frame_is_launched_as_was_fastest_for_so_many_slots(checkpoint):
    from s2quant.runtime.fast import FastDecoder

    decoder = FastDecoder(models(CHECKPOINTS[checkpoint])[1], 33, 16, RESIDUAL, graphs=False, fused=True)
    frame = decoder._fused
    assert frame is not None
    seen: list[tuple[int, bool, int]] = []
    frame._embed = lambda columns, rows: (seen.append((rows, frame.how.early, frame.how.attention_warps)), 1 / 0)
    for batch in (1, 32, 33):
        with pytest.raises(ZeroDivisionError):
            decoder.replay((batch, 16, 32))
    assert seen == [(1, True, 2), (32, True, 2), (33, True, 4)]


@torch.inference_mode()
@pytest.mark.parametrize("checkpoint", list(CHECKPOINTS))
def test_prompts_in_padded_pieces_are_the_whole_prompt_s(checkpoint):
    """The piece that a graph would replay, of 16, 32 and 64 rows, with the same numbers behind every real position."""
    from s2quant.runtime.fused import FusedFrame
    from s2quant.runtime.prompt_graphs import PromptReader
    from s2quant.runtime.triton_linear import PairedFeedForward
    from tools.speed import frames

    model = models(CHECKPOINTS[checkpoint])[1]
    FusedFrame(model, 1, RESIDUAL, 128)  # as in a fast decoder: w1 and w3 are one pair
    assert isinstance(model.slow.layers[0].feed_forward, PairedFeedForward) == (checkpoint != "bf16")
    prompt, device = frames.forced_tokens(model.config, 30, 60), torch.device(DEVICE)
    for length, start in ((9, 0), (30, 4), (89, 32)):
        plain, ours = (KVCache(model.config.slow, 2, 128, device, torch.bfloat16) for _ in range(2))
        read_prompt(model.slow, plain, 1, prompt[:, :length])
        ours.write(1, *plain.copy(1, start))
        PromptReader(model.slow, ours, lambda count: 128, captured=False, most=64).read(1, prompt[:, :length], start)
        for mine, its in zip(ours.copy(1, length), plain.copy(1, length), strict=True):
            assert torch.isfinite(mine).all() and float((mine - its).norm() / its.norm()) < 0.01


@torch.inference_mode()
@pytest.mark.parametrize("checkpoint", list(CHECKPOINTS))
def test_prompts_by_the_frame_s_kernels_are_the_whole_prompt_s(checkpoint):
    """Pieces of few and of many rows, against float32 as near as the plain reading is."""
    from s2quant.runtime.fused import FusedFrame
    from s2quant.runtime.prompt_graphs import PromptReader
    from tools.speed import frames

    exact, model = models(CHECKPOINTS[checkpoint], num_layers=2)
    exact.float()
    fused, seen = FusedFrame(model, 1, RESIDUAL, 128, prompt_rows=64 if INSIDE else 128), []
    read = fused.read
    fused.read = lambda columns, *more: (seen.append(len(columns)), read(columns, *more))[1]
    prompt, device = frames.forced_tokens(model.config, 30, 100), torch.device(DEVICE)
    cases_here = [(9, 0, [16]), (34, 4, [64]), (127, 120, [16])]  # the last reaches beyond the cache's end
    if not INSIDE:
        cases_here += [(120, 0, [128]), (97, 30, [128])]
    for length, start, rows in cases_here:
        plain, ours = (KVCache(model.config.slow, 2, 128, device, torch.bfloat16) for _ in range(2))
        wide = KVCache(model.config.slow, 2, 128, device, torch.float32)
        read_prompt(model.slow, plain, 1, prompt[:, :length])
        read_prompt(exact.slow, wide, 1, prompt[:, :length])
        ours.write(1, *plain.copy(1, start))
        seen.clear()
        reader = PromptReader(model.slow, ours, lambda count: 128, captured=False, fused=fused)
        reader.read(1, prompt[:, :length], start)
        assert seen == rows
        for mine, its, true in zip(*(cache.copy(1, length) for cache in (ours, plain, wide)), strict=True):
            assert torch.isfinite(mine).all() and torch.equal(mine[:, :, :start], its[:, :, :start])
            off, plainly = (float((cache - true).norm()) for cache in (mine, its))
            assert off < (1.5 if INSIDE else 1.1) * plainly < 0.02 * float(true.norm())  # the interpreter only cuts off
        assert not ours.keys[:, 0].any() and not ours.values[:, 0].any()
    state, context = fused.scratch[0], fused.prompt_scratch
    assert not state.arrived.any() and not context.arrived.any()


if not INSIDE:
    test_prompts_by_the_frame_s_kernels_are_the_whole_prompt_s = NEEDED(
        test_prompts_by_the_frame_s_kernels_are_the_whole_prompt_s
    )
    test_prompts_in_padded_pieces_are_the_whole_prompt_s = NEEDED(test_prompts_in_padded_pieces_are_the_whole_prompt_s)
    test_a_frame_is_launched_as_was_fastest_for_so_many_slots = NEEDED(
        test_a_frame_is_launched_as_was_fastest_for_so_many_slots
    )
    test_attention_that_adds_parts_up_draws_the_same_frames = NEEDED(
        test_attention_that_adds_parts_up_draws_the_same_frames
    )
    test_frames_are_the_plain_decoder_s = NEEDED(test_frames_are_the_plain_decoder_s)
