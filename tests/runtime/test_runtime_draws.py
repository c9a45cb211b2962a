"""Draws of the fused frame against a draw by hand: the best 32 at once, more than 32, ties, and candidates of no use.

In Triton's interpreter here, compiled where there is a GPU.
"""

import os

import numpy as np
import pytest
import runtime_cases as cases
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from s2quant.runtime.kernels.best import best_32, shares_of  # noqa: E402
from s2quant.runtime.sampler import RAS_TEMPERATURE, RAS_TOP_P, SMALLEST_UNIFORM  # noqa: E402

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
DEVICE = "cpu" if INSIDE else "cuda"
KEPT, CODEBOOKS, DIM = 2, 3, 32
CLOSE = 1e-5  # a probability so near to top_p may be rounded to either side


@pytest.mark.skipif(INSIDE, reason="this is the process")
def test_in_the_interpreter():
    cases.passes_in_the_interpreter(__file__)


def kernel(test):
    """Mark a test that runs in the interpreter's process, or on a GPU."""
    if INSIDE:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_GPU, reason="needs a Hopper GPU, or the interpreter")(test))


@triton.jit
def _listed(x, values, sums, largest, BITS: tl.constexpr, DEVICE: tl.constexpr):
    cube = best_32(tl.load(x + tl.arange(0, 2**BITS)), BITS, DEVICE)
    value, summed, rank = shares_of(cube, largest, DEVICE)
    tl.store(values + rank, value)
    tl.store(sums + rank, summed)


@kernel
@pytest.mark.parametrize(
    ("bits", "warps", "device"),
    [(5, 1, False), (10, 4, False), (12, 8, False), (5, 1, True), (10, 4, True), (12, 8, True)],
)
def test_the_best_32_are_in_order(bits, warps, device):
    x = (8 * torch.randn(2**bits, generator=torch.Generator().manual_seed(bits))).round() / 4  # of which some are equal
    x[::5] = float("-inf")
    x = x.to(DEVICE)
    values, sums = (torch.full((32,), float("nan"), device=DEVICE) for _ in range(2))
    _listed[(1,)](x, values, sums, float(x.logsumexp(0)), BITS=bits, DEVICE=device, num_warps=warps)
    wanted = x.topk(32).values
    assert torch.equal(values, wanted)
    exact = (wanted.double() - x.double().logsumexp(0)).exp().cumsum(0)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=1e-7)


def by_hand(logits, uniform, temperature, top_p, top_k):
    """Draw one of float32 [V], rank by rank."""
    order = np.lexsort((np.arange(len(logits)), -logits.astype(np.float64)))
    wide = logits[order].astype(np.float64)
    sums = np.cumsum(np.exp(wide - wide[0]) / np.exp(wide - wide[0]).sum())
    assert top_p == 1 or np.abs(sums[:top_k] - top_p).min() > CLOSE, "a case that rounding decides"
    count = max(1, int(((sums <= top_p) & (np.arange(len(wide)) < top_k)).sum()))
    if top_p == 1:
        count = min(top_k, len(wide))
    kept = order[:count]
    waits = -np.log(np.maximum(uniform[kept].astype(np.float64), SMALLEST_UNIFORM))
    score = (logits[kept].astype(np.float64) - logits[order[0]]) / max(temperature, 1e-5) - np.log(waits)
    best = int(kept[score.argmax()])
    assert np.isfinite(logits[best])
    return best, {*kept.tolist()}


def made(size, kind, generator):
    """Give float32 [size] logits."""
    noise = torch.randn(size, generator=generator)
    if kind == "ties":  # seven values, so that ties lie across every limit
        return (1.2 * noise).round().clamp(-3, 3)
    if kind == "flat":
        return torch.zeros(size)
    if kind == "few":  # five that can be drawn
        return torch.where(torch.arange(size) % (size // 5) == 3, noise, float("-inf"))
    if kind == "pairs":
        return noise[torch.arange(size) // 2]
    return {"wide": 4.0, "narrow": 0.3}[kind] * noise


SAMPLINGS = [  # temperature, top_p, top_k
    (0.8, 0.8123, 30), (1.0, 1.0, 1), (1.3, 1.0, 31), (1.0, 1.0, 32), (2.0, 1.0, 33), (1.5, 0.9678, 45),
    (1e-6, 1.0, 20), (1.0, 1e-3, 30), (1.7, 0.7777, 5000), (0.7, 0.3456, 3),
]  # fmt: skip
KINDS = ("wide", "narrow", "ties", "flat", "few", "pairs")


def situations(size, every):
    """Give a row for each kind of logits and each sampling (or every so many of them)."""
    generator = torch.Generator().manual_seed(size)
    pairs = [(kind, sampling) for kind in KINDS for sampling in SAMPLINGS][::every]
    logits = torch.stack([made(size, kind, generator) for kind, _ in pairs])
    return logits, [sampling for _, sampling in pairs], generator


def on_device(samplings):
    values = torch.tensor(samplings, dtype=torch.float64)
    return [values[:, 0].float().to(DEVICE), values[:, 1].float().to(DEVICE), values[:, 2].long().to(DEVICE)]


def vectors(rows):
    hidden = torch.full((rows, DIM), float("nan"), device=DEVICE)
    return hidden, hidden.bfloat16(), torch.full((rows, 1), float("nan"), device=DEVICE)


def residual(logits, uniform, samplings, best_first, warps):
    """Draw the second residual code, int64 [B]."""
    from s2quant.runtime.kernels import steps
    from s2quant.runtime.kernels.launch import How

    batch, size = logits.shape
    columns = torch.zeros(batch, 1 + CODEBOOKS, dtype=torch.int64, device=DEVICE)
    state = [torch.zeros(batch, dtype=dtype, device=DEVICE) for dtype in (torch.bool, torch.int64, torch.int64)]
    weights = torch.ones(size, DIM, dtype=torch.bfloat16, device=DEVICE)
    steps.residual_kernel[(batch,)](
        logits.to(DEVICE), uniform.to(DEVICE), *on_device(samplings), *state, columns, weights, weights[0], weights[0],
        *vectors(batch), 2,
        R=size, KEPT=KEPT, NOISE=uniform[0, 0].numel(), BEFORE=0, CODEBOOKS=CODEBOOKS, LAST=False, D_BLOCK=DIM,
        **steps.draw_arguments(size, How(best_first=best_first), warps), **steps.vector_arguments(DIM, None),
        **steps.options(False, warps),
    )  # fmt: skip
    return columns[:, 3].cpu()


@kernel
@pytest.mark.parametrize("best_first", [True, False])
@pytest.mark.parametrize(("size", "every", "warps"), [(64, 1, 1), (1000, 7, 4), (1024, 9, 4), (20, 3, 1), (200, 11, 4)])
def test_a_residual_draw_is_the_one_by_hand(size, every, warps, best_first):
    logits, samplings, generator = situations(size, every)
    uniform = torch.rand(len(logits), KEPT, CODEBOOKS - 1, size, generator=generator)
    drawn = residual(logits, uniform, samplings, best_first, warps)
    kept = []
    for row, sampling in enumerate(samplings):
        wanted, survivors = by_hand(logits[row].numpy(), uniform[row, 0, 1].numpy(), *sampling)
        assert int(drawn[row]) == wanted, (row, sampling)
        kept.append(len(survivors))
    assert min(kept) <= 3 and (size < 40 or max(kept) > 32)


def semantic(logits, uniform, samplings, ignored, windows, best_first, warps):
    """Draw semantic codes, int64 [B]; the end is the last."""
    from s2quant.runtime.kernels import steps
    from s2quant.runtime.kernels.launch import How

    batch, size = logits.shape
    columns = torch.zeros(batch, 1 + CODEBOOKS, dtype=torch.int64, device=DEVICE)
    first, draws = (torch.zeros(batch, dtype=dtype, device=DEVICE) for dtype in (torch.bool, torch.int64))
    weights = torch.ones(size, DIM, dtype=torch.bfloat16, device=DEVICE)
    slow, squares = torch.ones(batch, DIM, device=DEVICE), torch.ones(batch, 4, device=DEVICE)
    steps.semantic_kernel[(batch, 2)](
        logits.to(DEVICE), uniform.to(DEVICE), *on_device(samplings), ignored.to(DEVICE), windows.to(DEVICE), first,
        draws, columns, slow, squares, weights[0], 1e-6, weights, weights[0], weights[0], *vectors(2 * batch), 4, batch,
        1000, 1000 + size - 1,
        C=size, KEPT=KEPT, NOISE=uniform[0, 0].numel(), COLUMN=1 + CODEBOOKS, D_BLOCK=DIM, MAX_SQUARES=4,
        **steps.draw_arguments(size - 1, How(best_first=best_first), warps), **steps.swap_arguments(),
        **steps.vector_arguments(DIM, None), **steps.options(False, warps),
    )  # fmt: skip
    return columns[:, 0].cpu() - 1000


@kernel
@pytest.mark.parametrize("best_first", [True, False])
@pytest.mark.parametrize(("size", "every", "warps"), [(65, 1, 1), (42, 3, 1), (4097, 13, 8), (303, 13, 8)])
def test_a_semantic_draw_is_the_one_by_hand(size, every, warps, best_first):
    logits, samplings, generator = situations(size, every)
    end = size - 1
    rows = torch.arange(len(logits))
    best = logits[:, :end].max(-1).values
    ranked = logits[:, :end].sort(-1, descending=True).values
    places = [best + 1, best, ranked[:, 2] + 1e-3, ranked[:, 31], ranked[:, 35], torch.full_like(best, float("-inf"))]
    logits[:, end] = torch.stack(places)[rows % len(places), rows]
    ignored = rows % 4 == 3
    uniform = torch.rand(len(logits), KEPT, 2, size, generator=generator)
    seen = logits.masked_fill((rows % 4 == 3)[:, None] & (torch.arange(size) == end), float("-inf")).numpy()
    wanted, swapped, ended = [], 0, 0
    windows = torch.full((len(logits), 10), -1)
    for row, sampling in enumerate(samplings):
        normal, _ = by_hand(seen[row], uniform[row, 0, 0].numpy(), *sampling)
        if row % 2:
            windows[row, row % 10] = normal
        if row % 2 and normal != end:
            hot = (RAS_TEMPERATURE, RAS_TOP_P, sampling[2])
            again, _ = by_hand(seen[row], uniform[row, 0, 1].numpy(), *hot)
            swapped += again != normal
            normal = again
        ended += normal == end
        wanted.append(normal)
    assert swapped and ended
    drawn = semantic(logits, uniform, samplings, ignored, windows, best_first, warps)
    assert drawn.tolist() == wanted


@pytest.mark.parametrize(
    ("candidates", "warps", "bits"), [(4096, 8, 12), (1024, 4, 10), (1000, 4, 10), (300, 8, 10), (5, 1, 7)]
)
def test_a_draw_has_no_more_candidates_than_it_needs(candidates, warps, bits):
    steps = pytest.importorskip("s2quant.runtime.kernels.steps")
    from s2quant.runtime.kernels.launch import How

    assert steps.draw_arguments(candidates, How(), warps)["BITS"] == bits
