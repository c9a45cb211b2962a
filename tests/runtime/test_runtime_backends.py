"""What reports say about linears and frames."""

import pytest
import torch

from s2quant.runtime.backends import describe_decoding, list_linears
from s2quant.runtime.fused_weights import frame_obstacle
from s2quant.runtime.load import load_model


@pytest.fixture(scope="module")
def model(tiny_quantized):
    return load_model(tiny_quantized, dtype=torch.bfloat16)


def test_every_linear_is_in_one_row(model):
    rows = list_linears(model)
    assert len({(row["kind"], row["bits"], row["backend"]) for row in rows}) == len(rows)
    dense = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    quantized = sum(hasattr(module, "backend") for module in model.modules())
    assert sum(row["count"] for row in rows if row["bits"] is None) == dense > 0
    assert sum(row["count"] for row in rows if row["bits"]) == quantized > 0
    assert {row["kind"] for row in rows} >= {"slow wqkv", "slow w2", "fast wqkv", "fast output"}


def test_the_reason_is_named(model):
    plain = describe_decoding(model, "plain", 1024)
    assert (plain["frame"], plain["not_fused"]) == ("operations", "the plain decoder")
    fast = describe_decoding(model, "fast", 1024)
    assert (
        fast["frame"] == "operations"
        and fast["not_fused"] == frame_obstacle(model, 1024) == "no Triton kernels for cpu"
    )
    assert "not fused: no Triton kernels for cpu" in fast["text"] and "bits in groups of" in fast["text"]
    assert "one operation after the other" in fast["text"]
    assert frame_obstacle(model, 1024, fused=False) == "not wanted"
