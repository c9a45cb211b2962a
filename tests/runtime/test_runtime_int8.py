"""The int8 backend: exact where the numbers allow it, within bf16's rounding elsewhere, chosen where it is fast."""

from dataclasses import replace

import pytest
import runtime_cases as cases
import torch
from test_runtime_linears import by_hand, inputs
from torch.nn import functional as F

from s2quant.errors import UserError
from s2quant.runtime import int8
from s2quant.runtime.int8 import MANY_ROWS, Int8Linear, int8_obstacle
from s2quant.runtime.linears import make_linear

needs_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the backend needs a CPU with AVX-512"
)
ROWS = (1, 3, MANY_ROWS - 1, MANY_ROWS, MANY_ROWS + 9)
SHAPES = [(64, 32), (128, 256), (192, 768), (320, 96), (64, 9728)]


def in_whole_numbers(out_features, in_features, group_size, shuffled, rows):
    """Give a weight and x whose products and sums are integers below 2^24, hence exact in float32."""
    weight = cases.quantized_weight(out_features, in_features, group_size, bits=8, shuffled=shuffled)
    generator = torch.Generator().manual_seed(4)
    scales = 2.0 ** torch.randint(-1, 3, weight.scales.shape, generator=generator)
    weight.codes.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)  # every code there is
    x = 2 * torch.randint(-1, 2, (rows, in_features), generator=generator)
    return replace(weight, scales=scales.half()), x.bfloat16()


@needs_avx512
@pytest.mark.parametrize(
    ("shape", "group_size"), [(s, g) for s in SHAPES for g in (32, 64, 128, 256) if s[1] % g == 0], ids=str
)
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "act order"])
@pytest.mark.parametrize("chunk", [64, int8.CHUNK_VALUES], ids=["block by block", "at once"])
def test_it_is_exact_in_whole_numbers(shape, group_size, shuffled, chunk, monkeypatch):
    monkeypatch.setattr(int8, "CHUNK_VALUES", chunk)
    weight, x = in_whole_numbers(*shape, group_size, shuffled, max(ROWS))
    linear = make_linear(weight, torch.bfloat16, "int8")
    assert linear.backend == "int8" and linear.packed.nbytes == weight.codes.nbytes
    exact = x.double() @ by_hand(weight).T
    assert exact.abs().max() < 2**24 and exact.unique().numel() > 20
    for rows in ROWS:
        y = linear(x[:rows])
        assert y.dtype == torch.bfloat16 and torch.equal(y, exact[:rows].bfloat16())


@needs_avx512
@pytest.mark.parametrize("rows", ROWS)
def test_it_errs_no_more_than_bf16_itself(rows):
    """Scales of 11 bits are rounded to the 8 of bf16, which dequantizing does with every weight."""
    weight = cases.quantized_weight(256, 2560, group_size=128, bits=8, seed=3)
    x = inputs(rows, 2560)
    exact = x.double() @ by_hand(weight).T
    ours = make_linear(weight, torch.bfloat16, "int8")(x).double() - exact
    bf16 = F.linear(x, weight.dequantize(torch.bfloat16)).double() - exact
    assert ours.square().mean().sqrt() <= 1.2 * bf16.square().mean().sqrt()
    assert ours.abs().max() <= 1.5 * bf16.abs().max()


@needs_avx512
@pytest.mark.parametrize("rows", [1, MANY_ROWS])
def test_scales_of_bf16_give_the_weight_as_it_is(rows):
    weight = cases.quantized_weight(128, 256, bits=8)
    weight = replace(weight, scales=weight.scales.bfloat16())
    linear = make_linear(weight, torch.bfloat16)
    blocks = linear._dequantize(slice(0, 128)).transpose(1, 2).reshape(128, 256)
    assert torch.equal(blocks, weight.dequantize(torch.bfloat16)[:, linear.order[:256]])
    x, exact = inputs(rows, 256), by_hand(weight)
    size = x.double().abs() @ exact.abs().T
    assert ((linear(x).double() - x.double() @ exact.T).abs() <= 2**-8 * size).all()


@needs_avx512
def test_it_keeps_shape_and_dtype_of_its_input():
    linear = make_linear(cases.quantized_weight(64, 96, bits=8), torch.bfloat16, "int8")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (6, 60):
            x = inputs(rows, 96, dtype)
            y = linear(x.view(2, -1, 96))
            assert y.dtype == dtype and y.shape == (2, rows // 2, 64)
            assert torch.equal(y.view(rows, 64), linear(x))
    strided = inputs(4, 192)[:, ::2]
    assert torch.equal(linear(strided), linear(strided.contiguous()))
    assert linear(torch.zeros(0, 96, dtype=torch.bfloat16)).shape == (0, 64)


@needs_avx512
def test_auto_is_int8_in_bf16_and_exact_otherwise():
    weight = cases.quantized_weight(64, 96, bits=8)
    assert isinstance(make_linear(weight, torch.bfloat16), Int8Linear)
    assert make_linear(weight, torch.float32).backend == "reference"
    assert make_linear(cases.quantized_weight(64, 96), torch.bfloat16).backend == "int4"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 4}, "4 bits, not 8"),
        ({"group_size": 16}, "group size 16, not 32, 64, 128 or 256"),
        ({"out_features": 80}, "80 outputs, not a multiple of 64"),
    ],
    ids=str,
)
def test_what_it_cannot_take(options, words, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    weight = cases.quantized_weight(**({"out_features": 64, "in_features": 96, "bits": 8} | options))
    assert int8_obstacle(weight) == words
    with pytest.raises(UserError, match=f"the int8 backend: {words}") as error:
        make_linear(weight, torch.bfloat16, "int8")
    assert "dense" in error.value.todo
    assert make_linear(weight, torch.bfloat16).backend == ("int4" if weight.bits == 4 else "dense")


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT", "SVE256"])
def test_other_cpus_multiply_8_bits_dense(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    weight = cases.quantized_weight(64, 96, bits=8)
    assert int8_obstacle(weight) == f"torch computes with {capability} on this CPU, not with AVX512"
    assert make_linear(weight, torch.bfloat16).backend == "dense"


def test_a_layout_that_is_not_known_is_not_read(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    monkeypatch.setattr(int8, "_pack", lambda codes: pack(codes.repeat(1, 2).int() & 15, 1).flip(1))
    int8._is_layout_known.cache_clear()
    weight = cases.quantized_weight(64, 96, bits=8)
    try:
        assert "in an unknown layout" in int8_obstacle(weight)
        assert make_linear(weight, torch.bfloat16).backend == "dense"
    finally:
        int8._is_layout_known.cache_clear()


def test_it_is_for_cpus():
    weight = cases.quantized_weight(64, 96, bits=8).to("meta")
    assert int8_obstacle(weight) == "a kernel for CPUs, not for meta"
