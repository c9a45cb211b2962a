"""The speaker model of seed-tts-eval against what its public code gives for the same weights."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from s2quant.errors import UserError
from s2quant.evaluate.ecapa import ecapa_from_state
from s2quant.evaluate.similarity import load_similarity

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluate"


def maker():
    spec = importlib.util.spec_from_file_location("make_ecapa", GOLDEN / "make_ecapa.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_ecapa"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "ecapa.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def state(golden):
    return maker().random_state(golden["shapes"])


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("ecapa") / "wavlm_large_finetune.pth"
    torch.save({"model": state}, path)
    return path


def test_the_embedding_is_that_of_the_public_code(golden, checkpoint):
    model = load_similarity("wavlm-ecapa", checkpoint)
    found = model.embed(maker().clip(), 16000)
    assert found.shape == (256,)
    assert torch.allclose(found, torch.tensor(golden["embedding"]), atol=2e-5, rtol=0)
    assert model.name.startswith("wavlm-ecapa:")


def test_the_last_hidden_state_is_the_normed_one(golden, state):
    """With all the weight on it, the embedding is that of the encoder's own output, whose norm was applied."""
    model = ecapa_from_state(state, "here")
    audio = torch.from_numpy(maker().clip())[None]
    with torch.no_grad():
        usual = model(audio)
        model.feature_weight.copy_(torch.tensor([0.0] * (len(model.feature_weight) - 1) + [100.0]))
        last = model(audio)
        model.wavlm.encoder.layer_norm.bias += torch.linspace(-2, 2, model.wavlm.config.hidden_size)
        model.wavlm.encoder.layer_norm.weight *= torch.linspace(0.1, 3, model.wavlm.config.hidden_size)
        renormed = model(audio)
    assert not torch.allclose(usual, last, atol=1e-2)
    assert not torch.allclose(last, renormed, atol=1e-2)  # an input or output of a block does not see this norm


def test_every_tensor_that_is_missing_or_left_over_is_named(state):
    broken = dict(state)
    del broken["layer3.SE_Connect.linear1.bias"]
    broken["more.weight"] = torch.zeros(1)
    broken["linear.bias"] = torch.zeros(255)
    with pytest.raises(UserError) as error:
        ecapa_from_state(broken, "here")
    for part in ("3 fault(s)", "blocks.3.squeeze.bias", "left over: more.weight", r"[255]"):
        assert part in str(error.value), part
