"""Quantized linears: the reference is exact, int4 is within its rounding, and a choice is never silent."""

from types import SimpleNamespace

import pytest
import runtime_cases as cases
import torch
from torch.nn import functional as F

from s2quant.errors import UserError
from s2quant.runtime import linears
from s2quant.runtime.linears import Int4Linear, int4_obstacle, make_linear

SHAPES = [(16, 32), (48, 128), (64, 192), (80, 256), (256, 96), (128, 9728)]


def inputs(rows, in_features, dtype=torch.bfloat16):
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(9)).to(dtype)


def by_hand(weight):
    """Dequantize in float64, one input at a time."""
    columns = []
    for k, group in enumerate(weight.g_idx.tolist()):
        columns.append((weight.codes[:, k].double() - 2 ** (weight.bits - 1)) * weight.scales[group].double())
    return torch.stack(columns, dim=1)


def int4_bound(exact, x):
    """Bound the error of int4 per output, from the roundings that it makes, given the exact weight; x is bf16.

    bf16 keeps 8 bits, so rounding to nearest errs by 2^-9 of the value. The scale is rounded once, the dequantized
    weight once more; both errors multiply |x| |w|, and add up over the inputs. Sums are float32 (2^-24 per addition).
    The output is rounded once. One percent covers products of these terms.
    """
    size = x.double().abs() @ exact.abs().T
    return 1.01 * ((2 * 2**-9 + x.shape[1] * 2**-24) * size + 2**-9 * (x.double() @ exact.T).abs()) + 1e-30


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_reference_is_dequantize_then_multiply(bits, shuffled):
    weight = cases.quantized_weight(64, 96, bits=bits, shuffled=shuffled)
    linear = make_linear(weight, torch.float32, "reference")
    assert linear.backend == "reference" and f"bits={bits}" in repr(linear)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = inputs(6, 96, dtype).view(2, 3, 96)
        y = linear(x)
        assert y.dtype == dtype and y.shape == (2, 3, 64)
        assert torch.equal(y, F.linear(x, weight.dequantize(dtype)))
    torch.testing.assert_close(linear(inputs(6, 96).double()), inputs(6, 96).double() @ by_hand(weight).T)


@pytest.mark.parametrize(
    ("shape", "group_size"), [(s, g) for s in SHAPES for g in (32, 64, 128) if s[1] % g == 0], ids=str
)
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "act order"])
def test_int4_is_within_its_rounding(shape, group_size, shuffled):
    weight = cases.quantized_weight(*shape, group_size=group_size, shuffled=shuffled)
    linear = make_linear(weight, torch.bfloat16, "int4")
    assert linear.backend == "int4" and (linear.order is not None) == (shuffled and shape[1] > group_size)
    exact = by_hand(weight)
    for rows in (1, 3, 17):
        x = inputs(rows, shape[1])
        y = linear(x)
        assert y.dtype == torch.bfloat16 and y.shape == (rows, shape[0])
        error = (y.double() - x.double() @ exact.T).abs()
        assert (error <= int4_bound(exact, x)).all()


def test_int4_errs_no_more_than_bf16_itself():
    weight = cases.quantized_weight(256, 2560, seed=3)
    x = inputs(16, 2560)
    exact = x.double() @ by_hand(weight).T
    int4 = make_linear(weight, torch.bfloat16, "int4")(x).double() - exact
    bf16 = F.linear(x, weight.dequantize(torch.bfloat16)).double() - exact
    assert int4.square().mean().sqrt() <= 1.2 * bf16.square().mean().sqrt()


def test_a_wrong_order_would_be_seen():
    """The bound is tight enough to catch channels that meet the wrong group's scale."""
    weight = cases.quantized_weight(64, 192)
    linear = Int4Linear(weight)
    linear.order = torch.arange(192)
    x, exact = inputs(4, 192), by_hand(weight)
    assert ((linear(x).double() - x.double() @ exact.T).abs() > int4_bound(exact, x)).float().mean() > 0.9


def test_int4_keeps_shape_and_dtype_of_its_input():
    linear = make_linear(cases.quantized_weight(64, 96), torch.bfloat16, "int4")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = inputs(6, 96, dtype)
        y = linear(x.view(2, 3, 96))
        assert y.dtype == dtype and y.shape == (2, 3, 64)
        assert torch.equal(y.view(6, 64), linear(x))
    strided = inputs(4, 192)[:, ::2]
    assert torch.equal(linear(strided), linear(strided.contiguous()))
    assert linear(torch.zeros(0, 96, dtype=torch.bfloat16)).shape == (0, 64)


def test_bf16_scales_are_taken_as_they_are():
    weight = cases.quantized_weight(32, 64)
    object.__setattr__(weight, "scales", weight.scales.bfloat16())
    x, exact = inputs(3, 64), by_hand(weight)
    y = make_linear(weight, torch.bfloat16)(x)
    assert ((y.double() - x.double() @ exact.T).abs() <= int4_bound(exact, x)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 8}, "8 bits"),
        ({"bits": 3}, "3 bits"),
        ({"group_size": 16}, "group size 16"),
        ({"out_features": 24}, "24 outputs, not a multiple of 16"),
    ],
    ids=str,
)
def test_int4_by_name_says_what_it_cannot_take(options, words):
    weight = cases.quantized_weight(**({"out_features": 64, "in_features": 96} | options))
    assert words in int4_obstacle(weight)
    with pytest.raises(UserError, match=words) as error:
        make_linear(weight, torch.bfloat16, "int4")
    assert "reference" in error.value.todo


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_is_the_reference_bit_for_bit(bits, dtype):
    weight = cases.quantized_weight(40, 96, bits=bits)
    linear = make_linear(weight, dtype, "dense")
    assert linear.backend == "dense" and linear.weight.dtype == dtype
    for rows in (1, 6):
        x = inputs(rows, 96).to(dtype)
        assert torch.equal(linear(x), make_linear(weight, dtype, "reference")(x))
    y = linear(inputs(6, 96, torch.float16).view(2, 3, 96))
    assert y.dtype == torch.float16 and y.shape == (2, 3, 40)


@pytest.mark.parametrize("options", [{"bits": 3}, {"group_size": 16}, {"out_features": 24}], ids=str)
def test_auto_is_dense_on_a_cpu_where_no_kernel_takes_the_weight(options):
    weight = cases.quantized_weight(**({"out_features": 64, "in_features": 96} | options))
    assert make_linear(weight, torch.bfloat16).backend == "dense"
    assert make_linear(weight, torch.float32).backend == "reference"


def test_auto_is_the_reference_on_a_gpu_where_no_kernel_takes_the_weight(monkeypatch):
    weight = SimpleNamespace(codes=SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(linears, "_is_triton_best", lambda weight: False)
    monkeypatch.setattr(linears, "int4_obstacle", lambda weight: "no")
    monkeypatch.setattr(linears, "ReferenceLinear", lambda weight: "reference")
    assert make_linear(weight, torch.bfloat16) == "reference"


@pytest.mark.parametrize(("capability", "obstacle", "backend"), [
    ((9, 0), None, "triton"), ((9, 0), "no", "int4"), ((8, 9), None, "int4"), ((10, 0), None, "int4"),
])  # fmt: skip
def test_auto_is_triton_where_it_was_measured(capability, obstacle, backend, monkeypatch):
    weight = SimpleNamespace(codes=SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("s2quant.runtime.triton_linear.weight_obstacle", lambda weight: obstacle)
    monkeypatch.setattr(linears, "_triton_linear", lambda weight: "triton")
    monkeypatch.setattr(linears, "int4_obstacle", lambda weight: None)
    monkeypatch.setattr(linears, "Int4Linear", lambda weight: "int4")
    assert make_linear(weight, torch.bfloat16) == backend
    monkeypatch.setattr(linears, "ReferenceLinear", lambda weight: "reference")
    assert make_linear(weight, torch.float32) == "reference"


def test_auto_is_int4_in_bf16_and_exact_otherwise():
    weight = cases.quantized_weight(64, 96)
    assert make_linear(weight, torch.bfloat16).backend == "int4"
    assert make_linear(weight, torch.float32).backend == "reference"
    assert make_linear(weight, torch.float32, "int4").backend == "int4"
    with pytest.raises(UserError, match=r"'int3'[\s\S]*auto, reference, dense, int4"):
        make_linear(weight, torch.bfloat16, "int3")
