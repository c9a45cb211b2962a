"""Hessians: weights by their formula, products that other processes can compute."""

from __future__ import annotations

import pytest
import torch

from s2quant.errors import UserError
from s2quant.quantize.hessian import Hessian, gram


def inputs(rows: int = 50, columns: int = 16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_weighted_is_the_formula() -> None:
    x, weights = inputs(), torch.rand(50, generator=torch.Generator().manual_seed(1)) * 4
    hessian = Hessian(16, "wo")
    for rows, some in zip(x.split(20), weights.split(20), strict=True):
        hessian.add(rows, some)
    wide, w = x.double(), weights.double()
    expected = 2 * torch.einsum("r,ri,rj->ij", w, wide, wide) / w.sum()
    assert torch.allclose(hessian.matrix().double(), expected, rtol=1e-5, atol=1e-6)
    assert hessian.num_tokens == 50


def test_only_the_ratio_of_weights_counts() -> None:
    x, kinds = inputs(), torch.arange(50) % 3 == 0
    matrices = []
    for text, speech in ((1.0, 4.0), (0.25, 1.0)):
        hessian = Hessian(16, "wo")
        hessian.add(x, torch.where(kinds, speech, text))
        matrices.append(hessian.matrix())
    assert torch.allclose(*matrices, rtol=1e-6, atol=0)


def test_weight_zero_leaves_rows_out_bit_for_bit() -> None:
    x, kept = inputs(), torch.arange(50) < 30
    x[40] = torch.nan  # of weight 0: it does not count
    weighted, plain = Hessian(16, "wo"), Hessian(16, "wo")
    weighted.add(x, kept.float())
    plain.add(x[kept])
    assert torch.equal(weighted.matrix(), plain.matrix())
    assert weighted.num_tokens == plain.num_tokens == 30
    assert Hessian(16, "wo").product(x, torch.zeros(50)) is None
    with pytest.raises(UserError, match="1 of 50 calibration inputs"):
        plain.add(x, torch.ones(50))


def test_products_made_elsewhere_give_the_same_bits() -> None:
    x = inputs(400).bfloat16()
    alone, shared = Hessian(16, "wo"), Hessian(16, "wo")
    for rows in x.split(90):
        alone.add(rows)
    products = [Hessian(16, "elsewhere").product(rows) for rows in x.split(90)]
    for product in products:
        assert product is not None
        shared.accumulate(product)
    assert torch.equal(alone.matrix(), shared.matrix())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_add_exact_products_up_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(1024, 640, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, 640)).to(dtype)
    exact = x.double().T @ x.double()
    found = gram(x.cuda())
    assert found.dtype == torch.float32
    norms = exact.diagonal().sqrt()
    away = ((found.cpu().double() - exact).abs() / (norms[:, None] * norms)).max()
    assert away < 1e-5  # a sum rounded to 16 bits would be 5e-4 off and more
    assert torch.equal(found, gram(x.cuda()))


@pytest.mark.gpu
def test_a_hessian_on_a_gpu_is_that_of_a_cpu() -> None:
    x, weights = inputs(3000, 256).bfloat16(), torch.rand(3000, generator=torch.Generator().manual_seed(1))
    for given in (None, weights):
        ours, theirs = Hessian(256, "wo"), Hessian(256, "wo")
        for start in range(0, 3000, 1024):
            some = slice(start, start + 1024)
            ours.add(x[some].cuda(), None if given is None else given[some].cuda())
            theirs.add(x[some], None if given is None else given[some])
        torch.testing.assert_close(ours.matrix().cpu(), theirs.matrix(), rtol=1e-4, atol=1e-5)
        assert ours.num_tokens == theirs.num_tokens == 3000
    with pytest.raises(UserError, match="1 of 3000 calibration inputs"):
        x[7, 3] = torch.inf
        ours.add(x.cuda())
