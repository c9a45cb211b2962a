"""Whole frames at the real size: random weights on the device, W4A16 as the release recipe has it, both decoders."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import expected_tensors
from s2quant.export.random import random_tensor
from s2quant.model import DualAR, module_name
from s2quant.packing import QuantizedWeight
from s2quant.quantize.plan import make_plan
from s2quant.quantize.rtn import rtn_quantize
from s2quant.recipe import load_recipe
from s2quant.runtime.decoder import Decoder
from s2quant.runtime.fast import FastDecoder
from s2quant.runtime.fused import FusedFrame
from s2quant.runtime.fused_weights import PlacedLinear
from s2quant.runtime.kernels.choice import is_many
from s2quant.runtime.kernels.launch import MEASURED, How, compile_together, measured
from s2quant.runtime.kernels.weights import Then
from s2quant.runtime.linears import make_linear
from s2quant.runtime.load import set_module
from s2quant.runtime.sampler import Noise
from s2quant.sampling import Sampling
from tools.speed.linears import Case, Job
from tools.speed.timing import replayed

FRAME_S = 2048 / 44100


def random_model(config: S2Config, device: torch.device) -> DualAR:
    """Make the bf16 model of a random checkpoint, without the checkpoint."""
    with torch.device("meta"):
        model = DualAR(config)
    for spec in expected_tensors(config).values():
        owner, _, parameter = module_name(spec.name).rpartition(".")
        weight = random_tensor(spec, config, 0, str(device)).to(torch.bfloat16)
        setattr(model.get_submodule(owner), parameter, nn.Parameter(weight, requires_grad=False))
    return model.eval()


def shared_copy(model: DualAR, dtype: torch.dtype | None = None) -> DualAR:
    """Make a second model with the same tensors, or copies in another dtype; its modules may be replaced."""
    with torch.device("meta"):
        twin = DualAR(model.config)
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        tensor = parameter if dtype is None else nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        setattr(twin.get_submodule(owner), last, tensor)
    return twin.eval()


def quantized_model(model: DualAR, recipe: Path, backend: str, device: torch.device) -> tuple[DualAR, dict[str, int]]:
    """Quantize by rounding to nearest on the device, with random act orders that w1 and w3 share."""
    plan = make_plan(load_recipe(recipe), model.config)
    twin, orders, count = shared_copy(model), {}, {"quantized": 0, "dense": 0}
    for planned in plan.modules:
        name = module_name(planned.name)
        if planned.kind != "linear":
            continue
        if planned.settings is None:
            count["dense"] += 1
            continue
        weight = model.get_submodule(name).weight
        size = weight.shape[1]
        key = name.replace(".w3", ".w1")
        order = orders.setdefault(key, torch.randperm(size, device=device))
        plain, _ = rtn_quantize(weight[:, order].float(), planned.settings, name)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(size, device=device)
        quantized = QuantizedWeight(
            **{**vars(plain), "codes": plain.codes[:, inverse].contiguous(), "g_idx": plain.g_idx[inverse].contiguous()}
        )
        set_module(twin, name, make_linear(quantized, torch.bfloat16, backend))  # type: ignore[arg-type]
        count["quantized"] += 1
    return twin, count


def seated(
    model: DualAR,
    batch: int,
    position: int,
    residual: int,
    *,
    fused: bool | None,
    graphs: bool | None,
    how: How | None = None,
) -> FastDecoder:
    """Make a decoder whose slots all stand at a position, with random keys and values before it."""
    decoder = FastDecoder(model, batch, position + 1, residual, graphs=graphs, fused=fused)
    if how is not None and decoder._fused is not None:
        decoder._fused = FusedFrame(model, batch, residual, decoder.max_positions, how)
    generator = torch.Generator(decoder.device).manual_seed(1)
    decoder.cache.keys.normal_(generator=generator)
    decoder.cache.values.normal_(generator=generator)
    for slot in range(batch):
        noise = Noise(torch.Generator(decoder.device).manual_seed(slot))
        decoder.seat(slot, noise, Sampling(), ignore_end=True)
        column = random_column(model.config, slot, decoder.device)
        decoder.state.columns[slot] = column
        decoder.positions[slot] = position
    decoder.state.positions.fill_(position)
    return decoder


def random_column(config: S2Config, seed: int, device: torch.device) -> Tensor:
    """Draw a frame, int64 [1+N]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    codes = torch.randint(0, min(1024, config.codebook_size), (config.num_codebooks,), generator=generator)
    return torch.cat([codes[:1] + config.semantic_begin_id, codes]).to(device)


class _Listed(FusedFrame):
    """A frame that lists its linears in place of multiplying; whether parts are left to attention is not kept."""

    jobs: dict[Job, None]

    def _multiply(self, linear: PlacedLinear, x: Tensor, rows: int, then: Then, finished: bool = True) -> None:
        weight = linear.weight
        case = Case(
            name="frame",
            kind=weight.kind,
            out_features=weight.out_features,
            in_features=weight.in_features,
            epilogue=then.epilogue,
            group_size=weight.group_size,
            placed=then.place is not None,
            num_squares=160 if then.squares_in is None else then.squares_in.shape[1],
        )
        self.jobs[case, rows, self._plan(linear, rows), self.how] = None


@torch.inference_mode()
def listed(model: DualAR, batch: int, position: int, residual: int, how: How = MEASURED) -> list[Job]:
    """List the linears that a frame launches, to be compiled in parallel; its other kernels are, now, side by side."""
    decoder = seated(model, batch, position, residual, fused=True, graphs=False)
    frame = _Listed(model, batch, residual, decoder.max_positions, how)
    frame.jobs = {}
    context = decoder._context_bucket(position + 1)

    def run() -> None:
        frame.run(decoder.state, (decoder.cache, decoder.fast_cache), decoder._table, batch, context)

    compile_together(run)
    run()
    return list(frame.jobs)


def frame_times(
    model: DualAR,
    batch: int,
    position: int,
    residual: int,
    fused: bool | None,
    how: How | None = None,
    *,
    alone: bool = False,
) -> dict[str, Any]:
    """Time frames of one batch size: replayed alone, and (unless that is all) as the engine asks for them."""
    cuda = next(model.parameters()).device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    decoder = seated(model, batch, position, residual, fused=fused, graphs=None, how=how)
    decoder.launch(batch).columns()
    ready_s = time.perf_counter() - started
    if cuda:
        graph = next(iter(decoder._graphs.values()))
        replayed(graph, 20)  # so that clocks are up
        frame_s = replayed(graph, 40)
        if alone:
            return {"ms": 1e3 * frame_s}
    count = 24 if cuda else 1
    decoder.state.positions.fill_(position)
    decoder.positions = [position] * batch
    started = time.perf_counter()
    reads = [decoder.launch(batch)]
    for _ in range(count):
        reads.append(decoder.launch(batch))
        reads.pop(0).columns()
    reads.pop(0).columns()
    loop_s = (time.perf_counter() - started) / (count + 1)
    if not cuda:
        frame_s = loop_s
    return {
        "batch": batch,
        "fused": decoder.fused_obstacle is None and decoder._fused is not None,
        "ready_s": ready_s,
        "ms": 1e3 * frame_s,
        "ms_loop": 1e3 * loop_s,
        "audio_s_per_s": batch * FRAME_S / frame_s,
        "audio_s_per_s_loop": batch * FRAME_S / loop_s,
        "rtf": frame_s / FRAME_S,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def profiled(model: DualAR, batch: int, how: How) -> list[tuple[str, float, float]]:
    """Profile frames: kernel, launches per frame, microseconds per frame; the 25 that take the most."""
    decoder = seated(model, batch, 480, 1024, fused=True, graphs=None, how=how)
    decoder.launch(batch).columns()
    graph = next(iter(decoder._graphs.values()))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)[:25]
    return [(event.key[:60], event.count / 3, event.device_time_total / 3) for event in rows]


# ---- exactness ------------------------------------------------------------------------------------------------


def forced_tokens(config: S2Config, prompt: int, frames: int) -> Tensor:
    """Draw a text and frames, int64 [1+N, T]."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.zeros(1 + config.num_codebooks, prompt + frames, dtype=torch.int64)
    tokens[0, :prompt] = torch.randint(0, min(1000, config.semantic_begin_id), (prompt,), generator=generator)
    columns = [random_column(config, number, torch.device("cpu")) for number in range(frames)]
    tokens[:, prompt:] = torch.stack(columns, dim=1)
    return tokens


@torch.inference_mode()
def plain_logits(model: DualAR, tokens: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Feed the plain decoder; float32 logits [F, C] and the hidden vectors [F, D] they come from."""
    device = next(model.parameters()).device
    decoder = Decoder(model, 1, tokens.shape[1], 1024)
    hidden = [decoder.prefill(0, tokens[:, :prompt])]
    for position in range(prompt, tokens.shape[1] - 1):
        hidden.append(decoder.step(tokens[:, position][None].to(device), [position]))
    stacked = torch.cat(hidden)
    return model.slow.constrained_logits(stacked).float(), stacked


@torch.inference_mode()
def fused_logits(
    model: DualAR, tokens: Tensor, prompt: int, residual: int, slots: int = 1, how: How | None = MEASURED
) -> tuple[Tensor, Tensor, Tensor]:
    """Feed the fused decoder; of the last of slots that all hear the same: float32 logits [F, C], columns drawn
    [F, 1+N], logits of the last codebook [F, R]."""
    decoder = FastDecoder(model, slots, tokens.shape[1], residual, graphs=None, fused=True)
    if how is not None:  # else as the decoder itself launches
        decoder._fused = FusedFrame(model, slots, residual, decoder.max_positions, how)
    decoder.seat(0, Noise(torch.Generator(decoder.device).manual_seed(3)), Sampling(), ignore_end=False)
    decoder.begin(0, tokens[:, :prompt], 0)
    for slot in range(1, slots):
        decoder.move(0, slot)
    fused = decoder._fused
    assert fused is not None
    logits, drawn, last = [], [], []
    for position in range(prompt, tokens.shape[1]):
        read = decoder.launch(slots)
        logits.append(fused.logits[slots - 1 : slots].clone())
        last.append(fused.fast_logits[slots - 1 : slots].clone())
        drawn.append(read.columns()[-1:])
        decoder.state.columns[:slots] = tokens[:, position].to(decoder.device)
    return torch.cat(logits), torch.cat(drawn), torch.cat(last)


@torch.inference_mode()
def fast_last_logits(model: DualAR, hidden: Tensor, codes: Tensor, residual: int) -> Tensor:
    """Score the last code of whole frames with the plain Fast AR, float32 [F, R]."""
    return model.fast(hidden, codes)[:, -1, :residual].float()


def exactness(models: dict[str, DualAR], prompt: int, frames: int, residual: int) -> dict[str, Any]:
    """Compare, over forced frames, the fused bf16 frame and the plain bf16 decoder with float32."""
    model = models["bf16"]
    tokens = forced_tokens(model.config, prompt, frames)
    wide = shared_copy(model, torch.float32)
    exact, exact_hidden = plain_logits(wide, tokens, prompt)
    plain, plain_hidden = plain_logits(model, tokens, prompt)
    fused, drawn, last = fused_logits(model, tokens, prompt, residual)
    codes = drawn[:, 1:].to(fused.device)
    fast_exact = fast_last_logits(wide, exact_hidden, codes, residual)
    fast_plain = fast_last_logits(model, plain_hidden, codes, residual)
    found = {
        "frames": frames,
        "slow": _compared(exact, plain, fused),
        "last_codebook": _compared(fast_exact, fast_plain, last),
    }
    del wide
    for name in models:
        if name == "bf16":
            continue
        packed = models[name]
        plain_packed, packed_hidden = plain_logits(packed, tokens, prompt)
        fused_packed, drawn, last = fused_logits(packed, tokens, prompt, residual)
        plain_last = fast_last_logits(packed, packed_hidden, drawn[:, 1:].to(fused.device), residual)
        found[f"{name}_fused_vs_plain"] = _compared(plain_packed, plain_packed, fused_packed)
        found[f"{name}_last_codebook_fused_vs_plain"] = _compared(plain_last, plain_last, last)
    return found


def many_slots(models: dict[str, DualAR], prompt: int, frames: int, residual: int, slots: int) -> dict[str, Any]:
    """Compare a slot of many, over forced frames, with the plain decoder of the same model."""
    found: dict[str, Any] = {"slots": slots, "frames": frames}
    for name, model in models.items():
        tokens = forced_tokens(model.config, prompt, frames)
        plain, hidden = plain_logits(model, tokens, prompt)
        fused, drawn, last = fused_logits(model, tokens, prompt, residual, slots)
        plain_last = fast_last_logits(model, hidden, drawn[:, 1:].to(fused.device), residual)
        found[f"{name}_fused_vs_plain"] = _compared(plain, plain, fused)
        found[f"{name}_last_codebook_fused_vs_plain"] = _compared(plain_last, plain_last, last)
    return found


def _compared(exact: Tensor, plain: Tensor, fused: Tensor) -> dict[str, float]:
    def error(logits: Tensor) -> float:
        return float((logits - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    def agreement(a: Tensor, b: Tensor) -> float:
        return float((a.argmax(-1) == b.argmax(-1)).float().mean())

    return {
        "error_plain": error(plain),
        "error_fused": error(fused),
        "worst_plain": float((plain - exact).abs().max()),
        "worst_fused": float((fused - exact).abs().max()),
        "argmax_plain": agreement(plain, exact),
        "argmax_fused": agreement(fused, exact),
        "argmax_fused_plain": agreement(fused, plain),
    }


def graph_is_eager(model: DualAR, batch: int, position: int, residual: int, frames: int) -> dict[str, Any]:
    """Draw the same frames with and without a graph, and one of few rows alone: how many columns differ.

    A row of many is multiplied by another kernel than a row alone, so its numbers are equal up to rounding only.
    """
    drawn = []
    for graphs in (False, None):
        decoder = seated(model, batch, position, residual, fused=True, graphs=graphs, how=measured(batch))
        drawn.append(torch.stack([decoder.launch(batch).columns() for _ in range(frames)]))
    differ = int((drawn[0] != drawn[1]).any(-1).sum())
    found = {"batch": batch, "columns": math.prod(drawn[0].shape[:2]), "differ_graph_eager": differ}
    if is_many(batch, MEASURED):
        return found
    alone = seated(model, 1, position, residual, fused=True, graphs=None, how=MEASURED)
    keys = seated(model, batch, position, residual, fused=False, graphs=False)
    alone.cache.keys[:, :1], alone.cache.values[:, :1] = keys.cache.keys[:, :1], keys.cache.values[:, :1]
    single = torch.stack([alone.launch(1).columns() for _ in range(frames)])
    return found | {"differ_alone": int((drawn[1][:, :1] != single).any(-1).sum()), "alone_of": frames}
