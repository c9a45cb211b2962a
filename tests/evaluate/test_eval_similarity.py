"""Speaker models against the packages called directly."""

from pathlib import Path

import numpy as np
import pytest
import resemblyzer
import soundfile
import soxr
import torch
from transformers import AutoFeatureExtractor, Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector, WavLMModel

from s2quant.errors import UserError
from s2quant.evaluate.similarity import cosine, load_similarity

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluate"
RATE_HZ = 16000


@pytest.fixture(scope="module")
def speech():
    """float32 at 16 kHz by voice."""
    return {voice: soundfile.read(GOLDEN / f"speech-{voice}.ogg", dtype="float32")[0] for voice in ("rms", "slt")}


def wavlm_config():
    """Small, of the kind of wavlm-base-plus-sv: no stable layer norm, weighted sum of layers."""
    return WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, conv_dim=[16] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, num_buckets=32, xvector_output_dim=24,
        tdnn_dim=[32, 32, 32, 32, 64], use_weighted_layer_sum=True, apply_spec_augment=False, mask_time_prob=0.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def xvector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xvector")
    torch.manual_seed(0)
    model = WavLMForXVector(wavlm_config())
    with torch.no_grad():
        model.layer_weights.copy_(torch.tensor([0.3, 1.0, -0.5]))
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rate_hz", [16000, 44100])
def test_an_xvector_is_the_packages_own(xvector, speech, rate_hz):
    ours = load_similarity("wavlm-xvector", xvector)
    model, extract = WavLMForXVector.from_pretrained(xvector).eval(), AutoFeatureExtractor.from_pretrained(xvector)
    for samples in speech.values():
        clip = samples if rate_hz == RATE_HZ else soxr.resample(samples, RATE_HZ, rate_hz)
        heard = samples if rate_hz == RATE_HZ else soxr.resample(clip, rate_hz, RATE_HZ)
        with torch.no_grad():
            expected = model(**extract(heard, sampling_rate=RATE_HZ, return_tensors="pt")).embeddings[0]
        found = ours.embed(clip, rate_hz)
        assert found.shape == (24,) and found.dtype == torch.float32
        assert torch.equal(found, expected)
    assert ours.name.startswith("wavlm-xvector:")


def test_xvectors_of_two_voices_and_their_cosine(xvector, speech):
    ours = load_similarity("wavlm-xvector", xvector)
    one, other = (ours.embed(samples, RATE_HZ) for samples in speech.values())
    expected = float(torch.nn.functional.cosine_similarity(one[None].double(), other[None].double()))
    assert cosine(one, other) == pytest.approx(expected, abs=1e-12) and expected < 0.9999
    assert cosine(one, one.clone()) == 1.0 and cosine(one, None) is None and cosine(None, one) is None


def test_a_folder_without_the_head_is_refused(tmp_path):
    WavLMModel(wavlm_config()).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tensors for"):
        load_similarity("wavlm-xvector", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_similarity("wavlm-xvector", tmp_path)


def test_resemblyzer_is_the_packages_own(speech):
    ours = load_similarity("resemblyzer")
    encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
    for samples in speech.values():
        expected = encoder.embed_utterance(resemblyzer.preprocess_wav(samples, source_sr=RATE_HZ))
        found = ours.embed(samples, RATE_HZ)
        assert np.array_equal(found.numpy(), expected)
        assert found.norm() == pytest.approx(1.0, abs=1e-5)
    assert ours.name.startswith("resemblyzer:")


def test_resemblyzer_tells_two_voices_apart(speech):
    ours = load_similarity("resemblyzer")
    rms, slt = speech.values()
    halves = [ours.embed(part, RATE_HZ) for part in np.array_split(rms, 2)]
    other = ours.embed(slt, RATE_HZ)
    assert cosine(*halves) > max(cosine(half, other) for half in halves) + 0.05


def test_what_cannot_be_heard_has_no_embedding(speech, xvector):
    noise = np.random.default_rng(0).standard_normal(RATE_HZ).astype(np.float32)
    for ours in (load_similarity("resemblyzer"), load_similarity("wavlm-xvector", xvector)):
        assert ours.embed(np.zeros(RATE_HZ, np.float32), RATE_HZ) is None
        assert ours.embed(speech["rms"][: RATE_HZ // 2 - 1], RATE_HZ) is None
        assert ours.embed(1e-5 * noise, RATE_HZ) is None
        with pytest.raises(UserError, match="NaN"):
            ours.embed(np.full(RATE_HZ, np.nan, np.float32), RATE_HZ)


def test_files_that_are_no_speaker_model_are_named(tmp_path):
    for kind in ("wavlm-xvector", "wavlm-ecapa"):
        with pytest.raises(UserError, match="no such file or folder"):
            load_similarity(kind, tmp_path / "absent")
    path = tmp_path / "weights.pt"
    path.write_bytes(b"no weights")
    for kind in ("wavlm-ecapa", "resemblyzer"):
        with pytest.raises(UserError, match=r"weights\.pt: UnpicklingError"):
            load_similarity(kind, path)
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match="no usable tensor"):
        load_similarity("wavlm-ecapa", path)
    with pytest.raises(UserError, match="similarity back end 'ears'"):
        load_similarity("ears")
