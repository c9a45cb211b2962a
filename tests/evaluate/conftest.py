"""What the tests of token metrics share: the tiny checkpoint, and utterances that it spoke."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from s2quant.evaluate.tokens import TokenSequence
from s2quant.prompt import Voice
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import Request

TEXTS = ("Good morning.", "The train leaves at nine.", "Please close the door.")


@pytest.fixture(scope="module")
def engine(tiny_folder):
    return load_engine(tiny_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def baseline(engine):
    return engine.model


@pytest.fixture(scope="module")
def size(engine):
    return engine.residual_size


@pytest.fixture(scope="module")
def sequences(engine):
    """Four utterances, one with a voice in its prompt; the last one is made to end where it stands."""
    voice = Voice(text="Hello.", codes=torch.arange(60).view(6, 10).T.contiguous() % 50)
    requests = [Request(text=text, seed=5 + i, max_frames=14) for i, text in enumerate(TEXTS)]
    requests.append(Request(text="Who is there?", seed=9, max_frames=10, voices=(voice,)))
    found = []
    for speech in sorted(engine.generate(requests), key=lambda speech: speech.index):
        found.append(
            TokenSequence(
                id=f"utt-{speech.index}",
                tokens=engine.spoken_sequence(requests[speech.index], [speech.codes]),
                num_frames=speech.codes.shape[1],
                ended=speech.stop_reason == "end",
            )
        )
    found[-1] = dataclasses.replace(found[-1], ended=True)
    assert sum(one.num_frames for one in found) > 25
    return found
