"""The Triton kernels against plain PyTorch: in Triton's interpreter here, compiled where there is a GPU.

Whether triton interprets is decided when it is imported, so the tests of the interpreter run in a process of their own.
"""

import os

import pytest
import runtime_cases as cases
import torch
from layout_cases import matrix_of
from torch.nn import functional as F

from s2quant.layers import apply_rotary, rotary_table
from s2quant.runtime.kernels.layout import pack, pair
from s2quant.runtime.sampler import SamplingRows, draw, draw_semantic, noise_size, split_noise
from s2quant.sampling import Sampling

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
DEVICE = "cpu" if INSIDE else "cuda"


def kernel(test):
    """Mark a test that runs in the interpreter's process, or on a GPU."""
    if INSIDE:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_GPU, reason="needs a Hopper GPU, or the interpreter")(test))


@pytest.mark.skipif(INSIDE, reason="this is the process")
def test_in_the_interpreter():
    cases.passes_in_the_interpreter(__file__)


def relative(ours, exact):
    return float((ours.double().cpu() - exact.double().cpu()).norm() / exact.double().cpu().norm())


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def weight_of(kind, out_features, in_features, gated, group_size=32):
    """Give a kernel weight and the matrices it stands for, inputs in its order."""
    from s2quant.runtime.kernels.weights import Weight

    bits = 8 if kind == "w8" else 4
    first, second = (
        cases.quantized_weight(out_features, in_features, group_size, bits=bits, seed=seed) for seed in (1, 2)
    )
    second = type(second)(**{**vars(second), "g_idx": first.g_idx})
    packed = [pack(part.to(DEVICE)) for part in (first, second)]
    matrices = [matrix_of(part) for part in packed][: 2 if gated else 1]
    rows = out_features * (2 if gated else 1)
    if kind != "bf16":
        return Weight.of(pair(*packed) if gated else packed[0], gated), matrices
    stored = [matrix.bfloat16() for matrix in matrices]
    made = Weight(
        kind="bf16", first=stored[0], second=stored[1] if gated else None, out_features=rows, in_features=in_features,
        gated=gated,
    )  # fmt: skip
    return made, [matrix.float() for matrix in stored]


def x_of(rows, in_features):
    from s2quant.runtime.kernels.linear import padded_rows

    x = torch.zeros(padded_rows(rows), in_features, dtype=torch.bfloat16)
    x[:rows] = randn(rows, in_features, seed=rows)
    return x.to(DEVICE)


def shape_of(weight, rows, tiles=1, columns=8, warps=2):
    from s2quant.runtime.kernels.weights import Shape

    return Shape(warps=warps, tiles=tiles, depth=2, columns=columns)


def how_of(**off):
    from s2quant.runtime.kernels.launch import How

    return How(**off)


HOWS = [(4, {}), (2, {}), (2, {"loads_first": False}), (2, {"flat": False}), (2, {"flat": False, "loads_first": False})]
HOWS += [(1, {})] if INSIDE else []  # as the rule has it for whole frames of a very small model


@kernel
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("kind", ["w4", "w8", "bf16"])
@pytest.mark.parametrize(("rows", "tiles", "columns"), [(1, 1, 8), (3, 2, 8), (9, 1, 8), (17, 2, 2)])
def test_a_product_is_stored_scaled(flat, kind, rows, tiles, columns):
    from s2quant.runtime.kernels.linear import linear
    from s2quant.runtime.kernels.weights import Then

    weight, (matrix,) = weight_of(kind, 64, 256, False)
    squares = (torch.rand(rows, 37) * 100).to(DEVICE)
    out = poisoned(rows, 64)
    then = Then(epilogue="store", out=out, squares_in=squares, eps=1e-6)
    shape = shape_of(weight, rows, tiles, columns, warps=4 if rows == 1 else 1 if INSIDE and rows == 3 else 2)
    linear(weight, x_of(rows, 256), rows, then, shape, how_of(flat=flat))
    scale = (squares.double().sum(1) / 256 + 1e-6).rsqrt()[:, None]
    assert relative(out, x_of(rows, 256)[:rows].double() @ matrix.double().T * scale) < 1e-5


@kernel
@pytest.mark.parametrize("kind", ["w4", "w8"])
@pytest.mark.parametrize("group_size", [64, 128])
def test_larger_groups(kind, group_size):
    from s2quant.runtime.kernels.linear import linear
    from s2quant.runtime.kernels.weights import Then

    weight, (matrix,) = weight_of(kind, 32, 256, False, group_size)
    out = poisoned(2, 32)
    linear(weight, x_of(2, 256), 2, Then(epilogue="store", out=out), shape_of(weight, 2))
    assert relative(out, x_of(2, 256)[:2].double() @ matrix.double().T) < 1e-5


@kernel
@pytest.mark.parametrize("kind", ["w4", "w8", "bf16"])
@pytest.mark.parametrize(("warps", "off"), HOWS)
@pytest.mark.parametrize("tiles", [1, 2])
def test_a_pair_is_gated_and_put_in_the_next_linear_s_order(kind, warps, off, tiles):
    from s2quant.runtime.kernels.linear import linear
    from s2quant.runtime.kernels.weights import Then

    rows, out_features = 3, 32
    weight, (first, second) = weight_of(kind, out_features, 128, True)
    place = torch.randperm(out_features, generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
    out = poisoned(rows, out_features, dtype=torch.bfloat16)
    x = x_of(rows, 128)
    linear(
        weight,
        x,
        rows,
        Then(epilogue="gate", out=out, place=place),
        shape_of(weight, rows, tiles, warps=warps),
        how_of(**off),
    )
    wide = x[:rows].double()
    assert relative(out[:, place.long()], F.silu(wide @ first.double().T) * (wide @ second.double().T)) < 6e-3


@kernel
@pytest.mark.parametrize("kind", ["w4", "w8", "bf16"])
@pytest.mark.parametrize(("warps", "off"), HOWS)
def test_a_residual_prepares_the_next_norm(kind, warps, off):
    from s2quant.runtime.kernels.linear import linear
    from s2quant.runtime.kernels.weights import Then

    rows, out_features = 5 if INSIDE else 2, 48  # five: also of two and of one warp, which hold four and two at once
    weight, (matrix,) = weight_of(kind, out_features, 256, False)
    hidden, norm = randn(rows, out_features).to(DEVICE), randn(out_features, seed=1).bfloat16().to(DEVICE)
    before, x = hidden.double(), x_of(rows, 256)
    place = torch.randperm(out_features, generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
    out, squares = poisoned(rows, out_features, dtype=torch.bfloat16), poisoned(rows, 3)
    then = Then(epilogue="residual", out=out, place=place, hidden=hidden, norm=norm, squares_out=squares)
    linear(weight, x, rows, then, shape_of(weight, rows, warps=warps), how_of(**off))
    exact = before + x[:rows].double() @ matrix.double().T
    assert relative(hidden, exact) < 1e-6
    assert relative(squares.sum(1), exact.square().sum(1)) < 1e-6
    assert relative(out[:, place.long()], exact * norm.double()) < 6e-3


@kernel
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("positions", "capacity", "flat"),
    [
        *(([0, 5, 63], 64, True), ([64, 200, 130], 256, True), ([1100, 64, 1023], 2048, True)),
        *(([0, 9, 15], 16, True), ([0, 9, 15], 16, False)),
        ([*range(60, 131), *range(240, 300)], 320, True),  # so many that stretches are of 256 positions
    ],
)
def test_attention_over_what_is_live(norm, positions, capacity, flat):
    from s2quant.runtime.kernels.attended import Layer, Scratch
    from s2quant.runtime.kernels.attention import attention, num_splits

    if INSIDE and len(positions) > 100 and not norm:
        pytest.skip("ten seconds in the interpreter; with norms it is run")
    heads, kv_heads, width, batch = 4, 2, 32, len(positions)
    qkv = randn(batch, (heads + 2 * kv_heads) * width)
    keys, values = (randn(batch + 1, kv_heads, capacity, width, seed=n).bfloat16() for n in (1, 2))
    norms = [randn(width, seed=n).bfloat16() for n in (3, 4)] if norm else [None, None]
    place = torch.randperm(heads * width, generator=torch.Generator().manual_seed(3)).int()
    table, where = rotary_table(capacity, width, 1e6), torch.tensor(positions)
    ours = [tensor.clone().to(DEVICE) for tensor in (keys, values)]
    layer = Layer(
        keys=ours[0], values=ours[1], eps=1e-6, table=table.to(DEVICE), place=place.to(DEVICE),
        q_norm=None if norms[0] is None else norms[0].to(DEVICE),
        k_norm=None if norms[1] is None else norms[1].to(DEVICE),
    )  # fmt: skip
    out = poisoned(batch, heads * width, dtype=torch.bfloat16)
    scratch = Scratch.make(batch, heads, kv_heads, width, num_splits(capacity), torch.device(DEVICE))
    for _ in range(2):  # the second time on the scratch as the first left it
        attention(
            layer, qkv.to(DEVICE), where.to(DEVICE), out, scratch, batch=batch, first_row=0, context=capacity,
            how=how_of(flat=flat),
        )  # fmt: skip
    q, k, v = qkv.view(batch, 1, -1, width).split([heads, kv_heads, kv_heads], dim=2)
    if norm:
        q, k = (F.rms_norm(x, (width,), w.float(), 1e-6) for x, w in zip((q, k), norms, strict=True))
    q, k = apply_rotary(q, table[where][:, None]), apply_rotary(k, table[where][:, None])
    for row, position in enumerate(positions):
        keys[row, :, position], values[row, :, position] = k[row, 0].bfloat16(), v[row, 0].bfloat16()
        live = [part[row, :, : position + 1].double().repeat_interleave(2, dim=0) for part in (keys, values)]
        exact = F.scaled_dot_product_attention(q[row, 0, :, None].double(), *live)[:, 0].flatten()
        assert relative(out[row][place.long().to(DEVICE)], exact) < 2e-2
    for mine, theirs in zip(ours, (keys, values), strict=True):
        torch.testing.assert_close(mine.cpu().float(), theirs.float(), atol=0.02, rtol=0.01)
        assert torch.equal(mine[batch].cpu(), theirs[batch])
    assert not scratch.arrived.any()


@kernel
@pytest.mark.parametrize(
    ("positions", "capacity", "flat"), [([64, 200, 130], 256, True), ([0, 9, 15], 16, True), ([0, 9, 15], 16, False)]
)
@pytest.mark.parametrize("num_squares", [1, 40])
def test_attention_adds_up_what_a_product_left(positions, capacity, flat, num_squares):
    """Five parts of more rows than are attended from, against their sum, scaled, in one piece."""
    from s2quant.runtime.kernels.attended import Layer, Parts, Scratch
    from s2quant.runtime.kernels.attention import attention, num_splits

    heads, kv_heads, width, batch, first_row = 4, 2, 32, len(positions), 2
    features, rows, count, eps = (heads + 2 * kv_heads) * width, batch + first_row, 5, 1e-5
    parts, squares = randn(count, rows, features), 50 * torch.rand(rows, num_squares)
    whole = torch.zeros(rows, features)
    for part in parts:
        whole += part
    whole *= (squares.sum(1) / 96 + eps).rsqrt()[:, None]
    norms = [randn(width, seed=n).bfloat16().to(DEVICE) for n in (3, 4)]
    found = []
    for qkv, left in (
        (whole, None),
        (parts, Parts(count=count, num_rows=rows, squares_in=squares.to(DEVICE), eps=eps, in_features=96)),
    ):
        keys, values = (randn(batch, kv_heads, capacity, width, seed=n).bfloat16().to(DEVICE) for n in (1, 2))
        layer = Layer(
            keys=keys, values=values, eps=1e-6, table=rotary_table(capacity, width, 1e6).to(DEVICE), place=None,
            q_norm=norms[0], k_norm=norms[1],
        )  # fmt: skip
        out = poisoned(rows, heads * width, dtype=torch.bfloat16)
        scratch = Scratch.make(batch, heads, kv_heads, width, num_splits(capacity), torch.device(DEVICE))
        attention(
            layer, qkv.to(DEVICE), torch.tensor(positions).to(DEVICE), out, scratch, batch=batch, first_row=first_row,
            context=capacity, how=how_of(flat=flat), parts=left,
        )  # fmt: skip
        assert torch.isnan(out[:first_row]).all()
        found.append([out[first_row:], keys, values])
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < 4e-3
    untouched = randn(batch, kv_heads, capacity, width, seed=1).bfloat16().to(DEVICE)
    assert all(not torch.equal(found[1][1][n], untouched[n]) for n in range(batch))


@kernel
def test_many_rows_have_long_stretches():
    from s2quant.runtime.kernels.attention import least_stretch, num_splits

    rows = (1, 64, 127, 128, 256, 512, 4096)
    assert [least_stretch(n, how_of()) for n in rows] == [64, 64, 64, 128, 256, 512, 512]
    assert least_stretch(512, how_of(long_stretches=False)) == 64
    for context in (48, 64, 500, 1024, 1500, 4096, 9000):
        most = [num_splits(context, least) for least in (64, 128, 256, 512)]
        assert most == sorted(most, reverse=True) and most[0] == num_splits(context)
        for least in (64, 128, 256, 512):  # the last program of every row exists
            for last in (context - 1, min(context, 1024) - 1, min(context, 4096) - 1):
                stretch = max(64 if last < 1024 else 128 if last < 4096 else 512, least)
                assert last // stretch < num_splits(context, least)


SAMPLINGS = [
    Sampling(temperature=0.8, top_p=0.8, top_k=30), Sampling(temperature=1.5, top_p=0.97, top_k=60),
    Sampling(temperature=1e-6, top_p=0.9, top_k=5), Sampling(temperature=0.7, top_p=0.5, top_k=1),
]  # fmt: skip


def drawn_state(batch, candidates, size, kept=2, codebooks=3):
    generator = torch.Generator().manual_seed(batch + candidates)
    width = noise_size(candidates - 1, codebooks - 1, size)
    return {
        "noise": torch.rand(batch, kept, width, generator=generator),
        "draws": torch.arange(batch) + 1,
        "positions": torch.arange(batch) * 7,
    }


@kernel
@pytest.mark.parametrize("last", [False, True])
def test_the_residual_draw_is_the_sampler_s(last):
    from s2quant.runtime.kernels import steps
    from s2quant.runtime.kernels.launch import How

    batch, size, codebooks, dim = 8, 64, 3, 32
    samplings = [SAMPLINGS[row % len(SAMPLINGS)] for row in range(batch)]
    rows = SamplingRows.of(samplings, torch.device("cpu"))
    state = drawn_state(batch, 10, size, codebooks=codebooks)
    logits = 2 * randn(batch, size)
    columns = torch.zeros(batch, 1 + codebooks, dtype=torch.int64, device=DEVICE)
    first = torch.ones(batch, dtype=torch.bool, device=DEVICE)
    moved = {name: tensor.clone().to(DEVICE) for name, tensor in state.items()}
    embeddings, norm = randn(size, dim, seed=5).bfloat16(), randn(dim, seed=6).bfloat16()
    place = torch.randperm(dim, generator=torch.Generator().manual_seed(7)).int().to(DEVICE)
    hidden, out, squares = poisoned(batch, dim), poisoned(batch, dim, dtype=torch.bfloat16), poisoned(batch, 1)
    steps.residual_kernel[(batch,)](
        logits.to(DEVICE), moved["noise"], rows.temperature.to(DEVICE), rows.top_p.to(DEVICE),
        rows.top_k.to(DEVICE), first, moved["draws"], moved["positions"], columns, embeddings.to(DEVICE),
        norm.to(DEVICE), place, hidden, out, squares, 2,
        R=size, KEPT=2, NOISE=moved["noise"].shape[2], BEFORE=20, CODEBOOKS=codebooks, LAST=last, D_BLOCK=32,
        **steps.draw_arguments(size, How(), 1),
        **steps.vector_arguments(dim, place), **steps.options(False, 1),
    )  # fmt: skip
    noise = split_noise(state["noise"], 9, size)[1][torch.arange(batch), state["draws"] % 2, 1]
    wanted = draw(logits, rows, noise)
    assert torch.equal(columns[:, 3].cpu(), wanted)
    if last:
        assert torch.equal(moved["positions"].cpu(), state["positions"] + 1) and not first.any()
        assert torch.equal(moved["draws"].cpu(), state["draws"] + 1)
        return
    assert torch.equal(hidden.cpu(), embeddings[wanted].float()) and first.all()
    assert relative(squares[:, 0], embeddings[wanted].double().square().sum(1)) < 1e-6
    assert relative(out[:, place.long()], embeddings[wanted].double() * norm.double()) < 6e-3


@kernel
def test_the_semantic_draw_is_the_sampler_s():
    from s2quant.runtime.kernels import steps
    from s2quant.runtime.kernels.launch import How

    batch, semantic, codebooks, dim, kept = 24, 60, 3, 32, 2
    samplings = [SAMPLINGS[row % len(SAMPLINGS)] for row in range(batch)]
    ignored = [row % 3 == 0 for row in range(batch)]
    rows = SamplingRows.of(samplings, torch.device("cpu"), ignored)
    state = drawn_state(batch, semantic + 1, 8, kept, codebooks)
    logits = 2 * randn(batch, semantic + 1)
    logits[:, semantic] += 3
    generator = torch.Generator().manual_seed(4)
    windows = torch.randint(-1, semantic + 1, (batch, 10), generator=generator)
    windows[::2] = logits[::2].topk(10).indices  # so that many draws are repetitions
    first = torch.arange(batch) % 5 == 0
    columns = torch.zeros(batch, 1 + codebooks, dtype=torch.int64, device=DEVICE)
    slow, slow_norm, norm = randn(batch, dim, seed=1), randn(dim, seed=2).bfloat16(), randn(dim, seed=3).bfloat16()
    embeddings = randn(semantic, dim, seed=5).bfloat16()
    squares_in = slow.square().unflatten(1, (4, -1)).sum(-1)
    hidden, out = poisoned(2 * batch, dim), poisoned(2 * batch, dim, dtype=torch.bfloat16)
    squares, ours = poisoned(2 * batch, 1), windows.clone().to(DEVICE)
    steps.semantic_kernel[(batch, 2)](
        logits.to(DEVICE), state["noise"].to(DEVICE), rows.temperature.to(DEVICE), rows.top_p.to(DEVICE),
        rows.top_k.to(DEVICE), rows.ignore_end.to(DEVICE), ours, first.to(DEVICE), state["draws"].to(DEVICE), columns,
        slow.to(DEVICE), squares_in.to(DEVICE), slow_norm.to(DEVICE), 1e-6, embeddings.to(DEVICE), norm.to(DEVICE),
        norm.to(DEVICE), hidden, out, squares, 4, batch, 1000, 77,
        C=semantic + 1, KEPT=kept, NOISE=state["noise"].shape[2], COLUMN=1 + codebooks, D_BLOCK=32, MAX_SQUARES=4,
        **steps.draw_arguments(semantic, How(), 1), **steps.swap_arguments(), **steps.vector_arguments(dim, None),
        **steps.options(False, 1),
    )  # fmt: skip
    noise = split_noise(state["noise"], semantic, 8)[0][torch.arange(batch), state["draws"] % kept]
    window = windows.masked_fill(first[:, None], -1)
    wanted = draw_semantic(logits, rows, noise, window, semantic)
    plain = draw(logits.clone().masked_fill_(_end_of(ignored, semantic), float("-inf")), rows, noise[:, 0])
    assert (wanted != plain).any() and (wanted == semantic).any()  # swaps and ends are among the cases
    ended = wanted == semantic
    assert torch.equal(columns[:, 0].cpu(), torch.where(ended, 77, wanted + 1000))
    assert torch.equal(columns[:, 1].cpu(), wanted.masked_fill(ended, 0))
    shifted = torch.cat([windows[:, 1:], wanted[:, None]], dim=1)
    assert torch.equal(ours.cpu(), torch.where(first[:, None], windows, shifted))
    normed = slow.double() * (slow.double().square().mean(1, keepdim=True) + 1e-6).rsqrt() * slow_norm.double()
    assert relative(hidden[:batch], normed) < 1e-2
    assert torch.equal(hidden[batch:].cpu(), embeddings[wanted.masked_fill(ended, 0)].float())
    assert relative(out, hidden.double().cpu() * norm.double()) < 6e-3
    assert relative(squares[:, 0], hidden.double().square().sum(1)) < 1e-6


def _end_of(ignored, semantic):
    return F.pad(torch.tensor(ignored)[:, None], (semantic, 0))


@kernel
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_weight_as_a_matrix_and_a_linear_of_any_number_of_rows(bits):
    from s2quant.runtime.kernels.dequantize import dequantize
    from s2quant.runtime.linears import make_linear

    weight = cases.quantized_weight(40, 128, bits=bits, seed=4).to(DEVICE)
    packed = pack(weight)
    assert relative(dequantize(packed), matrix_of(packed)) < 6e-3
    linear = make_linear(weight, torch.bfloat16, "triton")
    assert linear.backend == "triton"
    exact = weight.dequantize().double()
    for rows in (0, 1, 5, 20, 65):
        x = randn(rows, 128, seed=rows).bfloat16().to(DEVICE)
        y = linear(x[None])
        assert y.shape == (1, rows, 40) and y.dtype == torch.bfloat16
        assert rows == 0 or relative(y[0], x.double() @ exact.T) < 1e-2
