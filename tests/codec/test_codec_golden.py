"""Against the reference implementation: see tests/golden/codec/make_goldens.py for how the numbers were made."""

import json
from pathlib import Path

import pytest
import torch
from codec_cases import GOLDEN_FRAMES, TINY, WIDE_BLOCKS, excerpt, random_codes, recording, wide_block, wide_input
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden" / "codec"
FACTS = json.loads((GOLDEN / "provenance.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "goldens.safetensors")


def largest_error(x, y):
    return (x - y).abs().max().item()


@pytest.mark.parametrize("chunk_frames", [None, 128])
def test_encoding_gives_the_reference_codes(tiny, golden, chunk_frames):
    codes = tiny.encode(recording(FACTS["recording_seed"]), chunk_frames)
    assert codes.shape == (1, 10, GOLDEN_FRAMES)
    assert torch.equal(codes, golden["tiny.codes"].long())


def test_the_recording_uses_many_entries(golden):
    assert all(len(set(book.tolist())) > 30 for book in golden["tiny.codes"][0])


@pytest.mark.parametrize("chunk_frames", [None, 128])
def test_decoding_gives_the_reference_audio(tiny, golden, chunk_frames):
    codes = random_codes(TINY, 1, GOLDEN_FRAMES, past_end=64)
    decoded = excerpt(tiny.decode(codes, chunk_frames))
    assert golden["tiny.decoded"].std() > 0.1
    assert largest_error(decoded, golden["tiny.decoded"]) < 1e-5


@pytest.mark.parametrize("name", ["encoder_block", "decoder_block", "pre_module", "convnext"])
def test_a_block_of_the_released_width(golden, name):
    with torch.no_grad():
        y = excerpt(wide_block(name)(wide_input(name)))
    assert golden[name].std() > 0.1
    assert largest_error(y, golden[name]) < 1e-5 * max(1.0, golden[name].abs().max().item())


def test_a_codebook_of_the_released_width(golden):
    book = wide_block("codebook")
    with torch.no_grad():
        codes = book.nearest(book.in_proj(wide_input("codebook")))
        value = book.value(book.rows(codes))
    assert torch.equal(codes, golden["codebook.codes"].long())
    assert largest_error(excerpt(value), golden["codebook"]) < 1e-5


def test_every_golden_is_compared(golden):
    assert set(golden) == {"tiny.codes", "tiny.decoded", "codebook.codes", *WIDE_BLOCKS}
