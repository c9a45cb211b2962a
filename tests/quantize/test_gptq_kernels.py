"""What GPTQ runs on a GPU, bit for bit against gptqmodel's own steps: in Triton's interpreter, or on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2quant.quantize import gptq as adapter
from s2quant.quantize.factor import inverse_factor, inverse_of_lower
from s2quant.quantize.gptq import gptq_quantize
from s2quant.quantize.hessian import Hessian
from s2quant.recipe import LinearSettings

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INSIDE else "cpu"
WITH_TRITON = pytest.mark.skipif(
    not (INSIDE or HAS_GPU) or importlib.util.find_spec("triton") is None, reason="needs a GPU, or the interpreter"
)
pytestmark = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")


@pytest.mark.skipif(INSIDE, reason="this is the process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def weights_of(rows, columns, seed=0):
    """Random weights with what a grid has to cope with: one-sided groups, empty ones, one alone that is large."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0, :128] = weight[0, :128].abs()
    weight[1, :128] = -weight[1, :128].abs()
    weight[2, :128] = 0
    weight[3, 5] = 3.0
    weight[4, :128] = -0.0
    return weight


def matrix_of(columns, seed=0):
    x = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(seed + 1))
    x *= torch.arange(1, columns + 1).pow(-0.5)
    return x.T @ x / len(x)


def gptq_of(rows, columns, bits, group_size):
    """Make gptqmodel's object, as the adapter does, and give it where its quantizer stands."""
    gptq_class, config_class = adapter._import_gptqmodel()
    config = config_class(bits=bits, group_size=group_size, desc_act=False, act_group_aware=False, sym=True)
    linear = torch.nn.Linear(columns, rows, bias=False)
    gptq = gptq_class(linear, config)
    gptq.quantizer.configure(perchannel=True)
    return gptq


@WITH_TRITON
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 16), (4, 128), (3, 64), (2, 32)])
def test_scales_of_a_group_are_gptqmodels_mended(bits, group_size):
    from s2quant.quantize import kernels

    x = weights_of(37, 256)[:, 0:group_size]
    gptq, watch = gptq_of(37, 256, bits, group_size), adapter._Watch()
    adapter._mend_one_sided(gptq.quantizer, watch)
    gptq.quantizer.find_params(x, weight=True)
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)
    found = kernels.group_scales(weights_of(37, 256).to(DEVICE)[:, 0:group_size], (1 << bits) - 1, count)
    assert torch.equal(found.cpu()[:, None], gptq.quantizer.scale)
    assert int(count) == int(watch.one_sided[0]) >= 1


@WITH_TRITON
@pytest.mark.parametrize("bits", [4, 8, 2])
def test_a_block_is_gptqmodels_loop(bits):
    """gptqmodel's own loop over columns, on the CPU, for one block of 128 columns and four groups."""
    from s2quant.quantize import kernels

    rows, group_size = 37, 32
    weight = weights_of(rows, 128)
    gptq = gptq_of(rows, 128, bits, group_size)
    factor = inverse_factor(matrix_of(128), 0.01)
    work, quantized = weight.clone(), torch.zeros(rows, 128)
    errors, losses, scales, zeros = torch.zeros(rows, 128), torch.zeros(rows, 128), [], []
    for column in range(128):
        if column % group_size == 0:
            gptq.quantizer.find_params(weight[:, column : column + group_size], weight=True)
            scales.append(gptq.quantizer.scale.flatten())
            zeros.append(gptq.quantizer.zero.flatten())
        value, pivotal = work[:, column], factor[column, column]
        rounded = gptq.quantizer.quantize(value.unsqueeze(1)).flatten()
        quantized[:, column] = rounded
        residual = value - rounded
        losses[:, column] = residual.square() / pivotal.square()
        errors[:, column] = residual / pivotal
        work[:, column:] -= errors[:, column].unsqueeze(1) * factor[column, column:]
    ours = [torch.full((rows, 128), 7.0, device=DEVICE) for _ in range(3)]
    groups = (torch.arange(128, dtype=torch.int32) // group_size).to(DEVICE)
    kernels.block_update(
        weight.clone().to(DEVICE), factor.to(DEVICE), torch.stack(scales).to(DEVICE), torch.stack(zeros).to(DEVICE),
        groups, *ours, (1 << bits) - 1,
    )  # fmt: skip
    for mine, theirs in zip(ours, (quantized, errors, losses), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    assert float(losses.max()) > 0


@WITH_TRITON
def test_a_block_keeps_what_is_no_number():
    """As torch.clamp does: so that a weight that went wrong is seen, not rounded to a code."""
    from s2quant.quantize import kernels

    weight = weights_of(8, 128).to(DEVICE)
    weight[5, 3] = float("nan")
    ours = [torch.zeros(8, 128, device=DEVICE) for _ in range(3)]
    one = torch.ones(1, 8, device=DEVICE)
    groups = torch.zeros(128, dtype=torch.int32, device=DEVICE)
    kernels.block_update(weight, torch.eye(128, device=DEVICE), one, one * 8, groups, *ours, 15)
    assert ours[0][5, 3].isnan() and ours[2][5, 3].isnan()
    assert not ours[0][:5].isnan().any() and not ours[0][6:].isnan().any()


@pytest.mark.parametrize("n", [1, 5, 64, 1025, 1500])
def test_the_factor_is_that_of_the_inverse(n):
    matrix = matrix_of(n)
    factor = inverse_factor(matrix, 0.01)
    damped = matrix.double() + 0.01 * torch.eye(n)
    exact = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.equal(factor, factor.triu()) and float(factor.diagonal().min()) > 0
    assert float((factor - exact).norm() / exact.norm()) < 1e-5
    theirs = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped.float())), upper=True)
    assert float((factor - exact).norm()) <= 1.1 * float((theirs - exact).norm()) + 1e-6  # not worse than the long way


def test_a_matrix_without_a_factor():
    assert inverse_factor(-torch.eye(8), 0.01) is None
    lower = torch.rand(40, 40).tril() + 5 * torch.eye(40)
    assert torch.allclose(inverse_of_lower(lower.clone()) @ lower, torch.eye(40), atol=1e-5)


@WITH_TRITON
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("dead", [False, True])
def test_whole_linears_are_gptqmodels(desc_act, dead, monkeypatch):
    """On a GPU its eager loops and its own inverse against our kernels; in the interpreter, scales and factor."""
    weight, x = weights_of(64, 384).to(DEVICE), torch.randn(1500, 384, generator=torch.Generator().manual_seed(3))
    x = (x * torch.arange(1, 385).pow(-0.5)).to(DEVICE)
    x[:, 7] *= 0 if dead else 1
    hessian, settings = Hessian(384, "wo"), LinearSettings(desc_act=desc_act)
    hessian.add(x)
    monkeypatch.setattr(adapter, "gpu_obstacle", lambda weight: None)
    ours, stats = gptq_quantize(weight, hessian, settings)
    monkeypatch.setattr(adapter, "gpu_obstacle", lambda weight: "off")
    monkeypatch.setenv("GPTQMODEL_DISABLE_GPTQ_CUDA", "1")
    theirs, wanted = gptq_quantize(weight, hessian, settings)
    assert torch.equal(ours.g_idx, theirs.g_idx)
    assert float((ours.codes == theirs.codes).float().mean()) > 0.995
    assert stats.loss == pytest.approx(wanted.loss, rel=1e-3)
    assert (stats.num_dead, stats.num_one_sided) == (wanted.num_dead, wanted.num_one_sided)
    assert stats.num_dead == dead and stats.fallback is None and stats.damp_percent == 0.05


@WITH_TRITON
def test_a_matrix_that_needs_more_damping_gets_gptqmodels(monkeypatch):
    monkeypatch.setattr(adapter, "gpu_obstacle", lambda weight: None)
    hessian = Hessian(128, "wo")
    hessian.add(torch.randn(256, 128, device=DEVICE))
    broken = hessian.matrix()
    broken.diagonal().sub_(1.2 * broken.diagonal().mean())
    monkeypatch.setattr(Hessian, "matrix", lambda self: broken.clone())
    _, stats = gptq_quantize(weights_of(16, 128).to(DEVICE), hessian, LinearSettings(), strict=False)
    assert stats.fallback is not None
