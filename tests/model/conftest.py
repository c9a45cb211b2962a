import pytest
import torch
from model_cases import raw_config, weight

from s2quant.checkpoint.config import S2Config
from s2quant.model import DualAR, disk_name


def build(case, dtype=torch.float32):
    """Build a small model on the meta device, as a loader does, and give it its recomputed weights."""
    with torch.device("meta"):
        model = DualAR(S2Config.from_json(raw_config(case)))
    state = {n: weight(case, disk_name(n), tuple(p.shape)).to(dtype) for n, p in model.named_parameters()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


@pytest.fixture(params=["project", "shared"])
def case(request):
    return request.param


@pytest.fixture
def build_model():
    return build
