"""What kernels of our own need is asked for, and what is missing is named."""

import os
import sys

import pytest
import torch

from s2quant import gpu

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here")


@pytest.fixture(autouse=True)
def asked_anew():
    gpu.kernel_obstacle.cache_clear()
    yield
    gpu.kernel_obstacle.cache_clear()


def test_why_kernels_cannot_run_is_said(monkeypatch):
    assert gpu.kernel_obstacle(torch.device("cpu")) == "no Triton kernels for cpu"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton is not installed" in gpu.kernel_obstacle(torch.device("cuda", 7))


@pytest.mark.parametrize(
    ("capability", "compiler", "said"),
    [((7, 5), "gcc", "older than Ampere"), ((9, 0), None, "no C compiler"), ((9, 0), "clang", None)],
)
def test_cards_and_compilers(monkeypatch, capability, compiler, said):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name if name == compiler else None)
    found = gpu.kernel_obstacle(torch.device("cuda", 7))
    assert found is None if said is None else said in found
