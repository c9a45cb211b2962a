"""The kernel of many rows against plain PyTorch: in Triton's interpreter here, compiled where there is a GPU."""

from types import SimpleNamespace

import pytest
import runtime_cases as cases
import torch
from layout_cases import matrix_of
from test_runtime_kernels import DEVICE, INSIDE, how_of, kernel, poisoned, randn, relative, weight_of
from torch.nn import functional as F

from s2quant.runtime.kernels.layout import arranged, arranged_place, pack

KINDS = ["w4", "w8", "bf16"]


@pytest.mark.skipif(INSIDE, reason="this is the process")
def test_in_the_interpreter():
    cases.passes_in_the_interpreter(__file__)


def block_of(weight, splits=1, tiles=8):
    from s2quant.runtime.kernels.weights import Block

    return Block(tiles=tiles, splits=splits, stages=3, warps=4)


def rounded(matrix):
    """Give the numbers that are multiplied: a packed weight is rounded once."""
    return matrix.bfloat16().double()


def x_of(rows, in_features):
    """Give x as it is, padded with numbers that must not matter."""
    from s2quant.runtime.kernels.choice import padded_rows

    x = torch.full((padded_rows(rows), in_features), 3.0, dtype=torch.bfloat16)
    x[:rows] = randn(rows, in_features, seed=rows)
    return x.to(DEVICE)


@kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "splits"), [(17, 1), (24, 2), (33, 1), (47, 8), (64, 2), (65, 1)])
def test_a_product_is_stored_scaled(kind, rows, splits):
    from s2quant.runtime.kernels.many import many
    from s2quant.runtime.kernels.weights import Then

    weight, (matrix,) = weight_of(kind, 144, 256, False)
    squares = (torch.rand(rows, 37) * 100).to(DEVICE)
    out, x = poisoned(rows, 144), x_of(rows, 256)
    then = Then(epilogue="store", out=out, squares_in=squares, eps=1e-6)
    many(weight, arranged(x, kind), rows, then, block_of(weight, splits))
    scale = (squares.double().sum(1) / 256 + 1e-6).rsqrt()[:, None]
    assert relative(out, x[:rows].double() @ rounded(matrix).T * scale) < 1e-5


@kernel
@pytest.mark.parametrize("kind", ["w4", "w8"])
@pytest.mark.parametrize("group_size", [64, 128])
def test_larger_groups(kind, group_size):
    from s2quant.runtime.kernels.many import many
    from s2quant.runtime.kernels.weights import Then

    weight, (matrix,) = weight_of(kind, 48, 256, False, group_size)
    out, x = poisoned(19, 48), x_of(19, 256)
    many(weight, arranged(x, kind), 19, Then(epilogue="store", out=out), block_of(weight))
    assert relative(out, x[:19].double() @ rounded(matrix).T) < 1e-5


@kernel
@pytest.mark.parametrize("kind", ["w4", "w8"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_shared_shifts_unpack_the_same_numbers(kind, group_size):
    from s2quant.runtime.kernels.many import many
    from s2quant.runtime.kernels.weights import Then

    weight, (matrix,) = weight_of(kind, 144, 256, False, group_size)
    x = arranged(x_of(64, 256), kind)
    found = []
    for shared in (False, True):
        out = poisoned(64, 144)
        many(weight, x, 64, Then(epilogue="store", out=out), block_of(weight), how_of(shared_shifts=shared))
        found.append(out)
    assert torch.equal(*found)
    assert relative(found[0], x_of(64, 256)[:64].double() @ rounded(matrix).T) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_all_of_unpacking_is_exact_in_float32_up_to_its_rounding(bits):
    """2^(23 - TO) + middle, times a scale of 11 bits, has to fit into 24 for every TO: 8 and 12, or 8."""
    scales = torch.arange(1024, 2048).double()
    for to in {8 + at % 8 for at in range(0, 32, bits)}:
        middle = scales * ((1 << (23 - to)) + (1 << (bits - 1)))
        assert torch.equal(middle, middle.float().double())


@kernel
@pytest.mark.parametrize("kind", ["w4", "w8"])
def test_scales_of_bfloat16(kind):
    from s2quant.runtime.kernels.many import many
    from s2quant.runtime.kernels.weights import Then, Weight

    weight, _ = weight_of(kind, 128, 128, False)
    scales = weight.second.bfloat16()
    codes = matrix_with(weight, torch.ones_like(weight.second))
    wide = matrix_with(weight, scales.float())
    made = Weight(**{**vars(weight), "second": scales})
    out, x = poisoned(20, 128), x_of(20, 128)
    many(made, arranged(x, kind), 20, Then(epilogue="store", out=out), block_of(made))
    assert relative(out, x[:20].double() @ rounded(wide).T) < 1e-5
    assert relative(wide, codes) > 0.5


def matrix_with(weight, scales):
    """Read a packed weight back with other scales."""
    from s2quant.runtime.kernels.layout import Packed

    return matrix_of(
        Packed(
            words=weight.first, scales=scales, order=None, out_features=weight.out_features,
            in_features=weight.in_features, group_size=weight.group_size, bits=4 if weight.kind == "w4" else 8,
        )
    )  # fmt: skip


@kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "out_features"), [(25, 64), (40, 96)])
def test_a_pair_is_gated_and_put_in_the_next_linear_s_order(kind, rows, out_features):
    from s2quant.runtime.kernels.many import many
    from s2quant.runtime.kernels.weights import Then

    weight, (first, second) = weight_of(kind, out_features, 128, True)
    place = torch.randperm(out_features, generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
    out, x = poisoned(rows, out_features, dtype=torch.bfloat16), x_of(rows, 128)
    many(weight, arranged(x, kind), rows, Then(epilogue="gate", out=out, place=place), block_of(weight))
    wide = x[:rows].double()
    exact = F.silu(wide @ rounded(first).T) * (wide @ rounded(second).T)
    assert relative(out[:, place.long()], exact) < 6e-3


@kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [1, 2])
def test_a_residual_prepares_the_next_norm(kind, splits):
    from s2quant.runtime.kernels.choice import num_sums
    from s2quant.runtime.kernels.many import many
    from s2quant.runtime.kernels.weights import Then

    rows, out_features = 18, 144
    weight, (matrix,) = weight_of(kind, out_features, 256, False)
    block = block_of(weight, splits)
    hidden, norm = randn(rows, out_features).to(DEVICE), randn(out_features, seed=1).bfloat16().to(DEVICE)
    before, x = hidden.double(), x_of(rows, 256)
    place = torch.randperm(out_features, generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
    out, squares = poisoned(rows, out_features, dtype=torch.bfloat16), poisoned(rows, num_sums(weight, block))
    then = Then(epilogue="residual", out=out, place=place, hidden=hidden, norm=norm, squares_out=squares)
    parts = poisoned(2 * rows * out_features)
    many(weight, arranged(x, kind), rows, then, block, parts=parts)
    exact = before + x[:rows].double() @ rounded(matrix).T
    assert relative(hidden, exact) < 1e-6
    assert relative(squares.sum(1), exact.square().sum(1)) < 1e-6
    assert relative(out[:, place.long()], exact * norm.double()) < 6e-3


@kernel
def test_a_row_does_not_depend_on_its_neighbours_nor_on_their_number():
    from s2quant.runtime.kernels.many import many
    from s2quant.runtime.kernels.weights import Then

    weight, _ = weight_of("w4", 128, 256, False)
    x = arranged(x_of(64, 256), "w4")
    found = []
    for rows in (64, 40):
        out = poisoned(rows, 128)
        many(weight, x, rows, Then(epilogue="store", out=out), block_of(weight, 2))
        found.append(out[:40])
        x[41:] = 5.0
    assert torch.equal(*found)


@kernel
def test_the_number_of_rows_chooses_the_kernel():
    from s2quant.runtime.kernels.choice import FEWEST_MANY, multiply, padded_rows, plan_for
    from s2quant.runtime.kernels.weights import Block, Shape, Then

    weight, (matrix,) = weight_of("w4", 64, 128, False)
    assert isinstance(plan_for(weight, FEWEST_MANY - 1), Shape) and isinstance(plan_for(weight, FEWEST_MANY), Block)
    assert isinstance(plan_for(weight, 64, how_of(many_rows=False)), Shape)
    assert [padded_rows(rows) for rows in (1, 16, 17, 33, 65)] == [8, 16, 32, 64, 128]
    for rows in (16, 17):
        out, x = poisoned(rows, 64), x_of(rows, 128)
        ordered = arranged(x, "w4") if rows == 17 else x
        multiply(weight, ordered, rows, Then(epilogue="store", out=out), plan_for(weight, rows))
        exact = rounded(matrix) if rows == 17 else matrix.double()
        assert relative(out, x[:rows].double() @ exact.T) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_where_inputs_stand_is_how_they_are_arranged(kind):
    values = torch.randn(3, 384)
    order = torch.randperm(384)
    place = torch.argsort(order).int()  # input order[n] stands at n
    moved = arranged_place(place, kind, 384, values.device)
    wanted, found = arranged(values[:, order], kind), torch.empty_like(values)
    found[:, moved.long()] = values
    assert torch.equal(found, wanted)
    natural = arranged_place(None, kind, 384, values.device)
    assert (natural is None) == (kind == "bf16")
    if natural is not None:
        found[:, natural.long()] = values
        assert torch.equal(found, arranged(values, kind)) and not torch.equal(found, values)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 128), (8, 128)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_pair_s_outputs_stand_where_the_next_linear_reads_many_rows(bits, group_size, shuffled):
    """Few rows and many, against what the next linear wants of outputs in their natural order."""
    from s2quant.runtime.fused_weights import _linear, _pair
    from s2quant.runtime.triton_linear import PairedFeedForward, TritonLinear

    def drawn(out_features, in_features, seed, shuffle):
        weight = cases.quantized_weight(out_features, in_features, group_size, bits, seed, shuffle)
        return TritonLinear(pack(weight))

    linears = {"w1": drawn(384, 128, 1, False), "w3": drawn(384, 128, 2, False), "w2": drawn(144, 384, 3, shuffled)}
    block, natural = SimpleNamespace(feed_forward=SimpleNamespace(**linears)), matrix_of(linears["w1"].packed)
    down = _linear(linears["w2"])
    for _ in range(2):  # a second frame of the same model finds the pair
        linear, gated = _pair(block, down)
        packed = block.feed_forward.pair.packed
        assert isinstance(block.feed_forward, PairedFeedForward) and linear.weight.gated
        first, second = matrix_of(packed).unflatten(0, (-1, 2, 8)).unbind(1)
        place = block.feed_forward.place
        assert torch.equal(first.flatten(0, 1)[place], natural)
        assert torch.equal(second.flatten(0, 1)[place], matrix_of(linears["w3"].packed))
        wanted, few = torch.empty_like(natural), torch.empty_like(natural)
        wanted[natural_place(down, 384)] = natural
        few[gated.place.long()] = first.flatten(0, 1)
        assert gated.many_place is None and torch.equal(few, wanted)
        assert torch.equal(first.flatten(0, 1), arranged(wanted.T, down.weight.kind).T)


def natural_place(linear, in_features):
    """Say where few rows want each input."""
    return torch.arange(in_features) if linear.place is None else linear.place.long()
