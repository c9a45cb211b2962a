"""Audio files: what is read, what is refused, what is written."""

import resource

import numpy as np
import pytest
import soundfile
import torch

from s2quant.errors import UserError
from s2quant.runtime.audio import pcm16, pcm_bytes, read_reference, write_wav

RATE = 44100


def tone(seconds, rate, hz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write(path, samples, rate=RATE, subtype="FLOAT"):
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def test_a_file_at_the_codec_s_rate_is_read_as_it_is(tmp_path):
    samples = tone(1.0, RATE)
    audio = read_reference(write(tmp_path / "a.wav", samples), RATE)
    assert audio.dtype == torch.float32 and np.array_equal(audio.numpy(), samples)


def test_stereo_is_the_mean_of_its_channels(tmp_path):
    left, right = tone(1.0, RATE, 300), tone(1.0, RATE, 700, 0.2)
    audio = read_reference(write(tmp_path / "a.wav", np.stack([left, right], axis=1)), RATE)
    np.testing.assert_allclose(audio.numpy(), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    audio = read_reference(write(tmp_path / "a.wav", tone(1.0, rate), rate), RATE).numpy()
    assert abs(len(audio) - RATE) <= 2
    middle = slice(RATE // 4, 3 * RATE // 4)  # the ends ring
    np.testing.assert_allclose(audio[middle], tone(1.0, RATE)[middle], atol=2e-3)


def test_flac_and_16_bit_are_read(tmp_path):
    samples = tone(0.6, RATE)
    soundfile.write(tmp_path / "a.flac", samples, RATE)
    np.testing.assert_allclose(read_reference(tmp_path / "a.flac", RATE).numpy(), samples, atol=1e-4)


def bad_sample(value):
    samples = tone(1.0, RATE)
    samples[100] = value
    return samples


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(RATE, np.float32), "silence"),
        (tone(1.0, RATE, level=1e-4), "silence"),
        (np.stack([tone(1.0, RATE), -tone(1.0, RATE)], axis=1), "silence"),
        (tone(0.3, RATE), r"0\.30 s of audio"),
        (tone(0.3, RATE)[:0], r"0\.00 s of audio"),
        (tone(121.0, RATE), r"more than 120 s[\s\S]*0\.5 to 120 s"),
        (bad_sample(np.nan), "NaN or infinite"),
        (bad_sample(np.inf), "NaN or infinite"),
        (np.stack([bad_sample(np.inf), bad_sample(-np.inf)], axis=1), "NaN or infinite"),
    ],
    ids=["zeros", "faint", "cancels out", "short", "empty", "long", "nan", "inf", "two inf"],
)
def test_a_reference_that_cannot_be_used_is_refused(tmp_path, samples, message):
    path = write(tmp_path / "a.wav", samples)
    with pytest.raises(UserError, match=message) as error:
        read_reference(path, RATE)
    assert str(path) in error.value.got


def test_a_file_that_is_no_audio_is_refused(tmp_path):
    text = tmp_path / "a.wav"
    text.write_text("not a sound")
    (tmp_path / "empty.wav").touch()
    for path in (text, tmp_path / "empty.wav", tmp_path / "absent.wav", tmp_path):
        with pytest.raises(UserError, match="an audio file"):
            read_reference(path, RATE)


def test_samples_are_rounded_and_clipped():
    audio = torch.tensor([0.0, 1.0, -1.0, 7.5, -7.5, 0.5, 0.6 / 32767, -0.4 / 32767])
    samples = pcm16(audio)
    assert samples.dtype == np.int16 and samples.tolist() == [0, 32767, -32767, 32767, -32767, 16384, 1, 0]
    assert pcm_bytes(torch.tensor([1.0, -1.0])) == b"\xff\x7f\x01\x80"


def test_a_wav_is_read_back(tmp_path):
    audio = torch.from_numpy(tone(0.7, RATE))
    write_wav(tmp_path / "a.wav", audio, RATE)
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.samplerate, info.channels, info.subtype, info.format) == (RATE, 1, "PCM_16", "WAV")
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert np.array_equal(samples, pcm16(audio))


def test_a_file_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, torch.zeros(10), RATE)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_wav(path, torch.ones(20), RATE)
    assert path.read_bytes() == before
    write_wav(path, torch.ones(20), RATE, overwrite=True)
    assert soundfile.info(path).frames == 20


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match=r"writing .*a\.wav failed"):
            write_wav(tmp_path / "a.wav", torch.zeros(100_000), RATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
