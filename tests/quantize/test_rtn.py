"""Round-to-nearest: the grid, its edges, and what is refused."""

import pytest
import torch

from s2quant.errors import UserError
from s2quant.packing import pack, unpack
from s2quant.quantize.rtn import nearest, rtn_quantize
from s2quant.recipe import LinearSettings


def settings(bits=4, group_size=32):
    return LinearSettings(method="rtn", bits=bits, group_size=group_size)


def random_weight(rows=64, columns=128, seed=0, dtype=torch.float32):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
def test_every_weight_goes_to_the_nearest_point_of_its_grid(bits, group_size):
    weight = random_weight()
    quantized, stats = rtn_quantize(weight, settings(bits, group_size))
    scale = quantized.scales.float().T.repeat_interleave(group_size, dim=1)
    points = (torch.arange(2**bits) - 2 ** (bits - 1)) * scale.unsqueeze(2)  # [M, K, 2^bits]
    nearest = (points - weight.unsqueeze(2)).abs().amin(dim=2)
    torch.testing.assert_close((quantized.dequantize() - weight).abs(), nearest, rtol=1e-4, atol=1e-8)
    assert torch.equal(quantized.g_idx, torch.arange(128, dtype=torch.int32) // group_size)
    assert (quantized.zeros == 2 ** (bits - 1)).all()
    assert (stats.method, stats.loss, stats.damp_percent, stats.fallback) == ("rtn", None, None, None)
    assert 0 < stats.max_scale_error < 2**-10 and stats.num_subnormal_scales == 0


def test_scale_is_twice_the_largest_over_fifteen():
    weight = random_weight()
    quantized, _ = rtn_quantize(weight, settings())
    absmax = weight.view(64, 4, 32).abs().amax(dim=2)
    assert torch.equal(quantized.scales, (2 * absmax / 15).half().T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_from_disk_equals_in_memory(bits):
    quantized, _ = rtn_quantize(random_weight(), settings(bits))
    again = unpack(pack(quantized), bits, 32)
    assert torch.equal(again.dequantize(), quantized.dequantize())


def test_codes_belong_to_the_rounded_scale():
    """7.5 - 0.002 steps of the exact scale would be 7; of the stored one, rounded down, they are 7.5 and more: 8."""
    weight = random_weight(512, 256)
    quantized, _ = rtn_quantize(weight, settings(8))
    scale = quantized.scales.float().T.repeat_interleave(32, dim=1)
    assert torch.equal(quantized.codes.float(), (torch.round(weight / scale) + 128).clamp(0, 255))
    exact = (2 * weight.view(512, 8, 32).abs().amax(dim=2) / 255).repeat_interleave(32, dim=1)
    assert not torch.equal(quantized.codes.float(), (torch.round(weight / exact) + 128).clamp(0, 255))


def test_a_second_pass_changes_nothing_but_rounding():
    quantized, _ = rtn_quantize(torch.tensor([[-7.5, 7.0, 0.0, 1.0] * 8] * 8), settings())
    assert quantized.codes[0, :4].tolist() == [0, 15, 8, 9]
    assert (quantized.scales == 1).all()


def test_groups_of_zeros():
    weight = random_weight()
    weight[:, 32:64] = 0
    weight[3] = 0
    quantized, stats = rtn_quantize(weight, settings())
    assert (quantized.dequantize()[:, 32:64] == 0).all() and (quantized.dequantize()[3] == 0).all()
    assert torch.isfinite(quantized.scales).all() and stats.num_subnormal_scales == 0


def test_tiny_groups_are_counted_and_stay_finite():
    weight = random_weight()
    weight[0, :32] = 1e-4  # scale 1.3e-5, below 6.1e-5
    weight[1, :32] = 1e-9  # scale rounds to zero
    quantized, stats = rtn_quantize(weight, settings())
    assert stats.num_subnormal_scales == 2
    assert torch.isfinite(quantized.dequantize()).all()
    assert (quantized.dequantize()[1, :32] == 0).all() and (quantized.codes[1, :32] == 8).all()
    torch.testing.assert_close(quantized.dequantize()[0, :32], weight[0, :32], rtol=0.1, atol=0)


def test_bfloat16_weights_give_what_their_float32_values_give():
    weight = random_weight(dtype=torch.bfloat16)
    before = weight.clone()
    left, right = rtn_quantize(weight, settings())[0], rtn_quantize(weight.float(), settings())[0]
    assert torch.equal(left.codes, right.codes) and torch.equal(left.scales, right.scales)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(value):
    weight = random_weight()
    weight[5, 7] = value
    with pytest.raises(UserError, match=r"layers.3.wo: 1 of 8192 weights are NaN or infinite"):
        rtn_quantize(weight, settings(), "layers.3.wo")


def test_sizes_and_kinds_that_do_not_fit():
    with pytest.raises(UserError, match=r"wo:\n.*144 inputs, not a multiple of group_size 32"):
        rtn_quantize(random_weight(columns=144), settings(), "wo")
    with pytest.raises(UserError, match="60 outputs"):
        rtn_quantize(random_weight(rows=60), settings())
    with pytest.raises(UserError, match=r"torch.int64 of shape \(8, 32\)"):
        rtn_quantize(torch.zeros(8, 32, dtype=torch.int64), settings())
    with pytest.raises(UserError, match="a floating point matrix"):
        rtn_quantize(torch.zeros(32), settings())


def test_scale_beyond_float16():
    weight = random_weight()
    weight[0, 0] = 1e6
    with pytest.raises(UserError, match="w2: 1 scales beyond float16, the largest 133333"):
        rtn_quantize(weight, settings(), "w2")


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (4, 32), (8, 64)])
def test_nearest_is_what_is_read_back(bits, group_size):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(bits)) * 0.05
    weight[3, :64], weight[5] = 0, 1e-9
    settings = LinearSettings(bits=bits, group_size=group_size)
    expected = rtn_quantize(weight, settings)[0].dequantize(torch.float32)
    assert torch.equal(nearest(weight, settings), expected)
    assert torch.equal(nearest(weight.bfloat16(), settings), rtn_quantize(weight.bfloat16(), settings)[0].dequantize())
    weight[7, 2] = 1e6  # a scale beyond float16
    beyond = nearest(weight, settings).isnan().any(dim=1)
    assert beyond.tolist() == [row == 7 and bits < 8 for row in range(32)]
