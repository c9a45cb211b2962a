"""Recognizers against the packages called directly, on real speech and, for whisper, with random weights."""

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pocketsphinx
import pytest
import soundfile
import soxr
import torch
import whisper

from s2quant.errors import UserError
from s2quant.evaluate.asr import RATE_HZ, load_asr, to_16khz
from s2quant.evaluate.wer import score

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluate"
TEXTS = {"rms": "the train leaves at noon from the old station", "slt": "please close the door behind you"}
GREEDY = {"temperature": 0.0, "without_timestamps": True, "fp16": False}


@pytest.fixture(scope="module")
def speech():
    """float32 at 16 kHz by voice."""
    return {voice: soundfile.read(GOLDEN / f"speech-{voice}.ogg", dtype="float32")[0] for voice in TEXTS}


def write_whisper(path, num_vocab, seed=0):
    """A small random checkpoint in openai-whisper's own format, with values large enough for the audio to matter."""
    dims = dict(
        n_mels=80, n_audio_ctx=1500, n_audio_state=64, n_audio_head=2, n_audio_layer=1, n_vocab=num_vocab,
        n_text_ctx=448, n_text_state=64, n_text_head=2, n_text_layer=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**dims))
    for name, tensor in model.state_dict().items():
        if name == "decoder.positional_embedding":  # larger than the words' own: their head is tied, they would repeat
            tensor.copy_(torch.randn(tensor.shape))
        elif tensor.ndim > 1 and name != "encoder.positional_embedding":
            tensor.copy_(torch.randn(tensor.shape) * 2 / tensor.shape[1:].numel() ** 0.5)
    torch.save({"dims": dims, "model_state_dict": {k: v.half() for k, v in model.state_dict().items()}}, path)
    return path


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    return write_whisper(tmp_path_factory.mktemp("whisper") / "english.pt", 51864)


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    return write_whisper(tmp_path_factory.mktemp("whisper") / "multilingual.pt", 51865)


def direct(path, samples, lang):
    """The package alone: one clip, a window, greedy."""
    model = whisper.load_model(str(path)).float()
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples), 80)
    return whisper.decode(model, mel, whisper.DecodingOptions(language=lang, **GREEDY)).text.strip()


# ---- whisper -------------------------------------------------------------------------------------------------------


def test_whisper_gives_the_packages_own_transcripts(english, speech):
    asr = load_asr("whisper", english)
    expected = {voice: direct(english, samples, "en") for voice, samples in speech.items()}
    assert len(set(expected.values())) == 2, "random weights that do not hear: the test would prove nothing"
    for voice, samples in speech.items():
        assert asr.transcribe(samples, RATE_HZ, "en") == expected[voice]
    empty = np.zeros(0, np.float32)
    batch = asr.transcribe_batch([speech["rms"], empty, torch.from_numpy(speech["slt"])], RATE_HZ, "en")
    assert batch == [expected["rms"], "", expected["slt"]]
    assert asr.name.startswith("whisper:") and len(asr.name) == len("whisper:") + 12


def test_whisper_resamples_by_soxr(english, speech):
    at_44100 = soxr.resample(speech["rms"], RATE_HZ, 44100)
    expected = direct(english, soxr.resample(at_44100, 44100, RATE_HZ), "en")
    assert load_asr("whisper", english).transcribe(at_44100, 44100, "en") == expected
    assert np.array_equal(to_16khz(at_44100, 44100), soxr.resample(at_44100, 44100, RATE_HZ))


def test_whisper_goes_through_its_own_windows_for_a_long_clip(english, speech, monkeypatch):
    long = np.tile(speech["rms"], 12)
    assert len(long) > 30 * RATE_HZ
    monkeypatch.setattr(whisper.model.Whisper, "decode", shortened(whisper.model.Whisper.decode))
    model = whisper.load_model(str(english)).float()
    options = {"language": "en", "temperature": 0.0, "condition_on_previous_text": False, "fp16": False}
    expected = whisper.transcribe(model, long, verbose=None, **options)["text"].strip()
    asr = load_asr("whisper", english)
    assert asr.transcribe(long, RATE_HZ, "en") == expected != ""
    short, both = speech["slt"], asr.transcribe_batch([long, speech["slt"]], RATE_HZ, "en")
    assert both == [expected, asr.transcribe(short, RATE_HZ, "en")]


def shortened(decode):
    """Decode few tokens a window: random weights never stop by themselves."""

    def run(self, mel, options):
        return decode(self, mel, replace(options, sample_len=12))

    return run


def test_whisper_is_given_the_language(multilingual, speech):
    asr = load_asr("whisper", multilingual)
    found = {lang: asr.transcribe(speech["rms"], RATE_HZ, lang) for lang in ("en", "de")}
    assert found == {lang: direct(multilingual, speech["rms"], lang) for lang in found}
    assert found["en"] != found["de"]
    with pytest.raises(UserError, match="language 'xx'"):
        asr.transcribe(speech["rms"], RATE_HZ, "xx")


def test_an_english_checkpoint_refuses_other_languages(english, speech):
    with pytest.raises(UserError, match="all that this checkpoint knows"):
        load_asr("whisper", english).transcribe(speech["rms"], RATE_HZ, "de")


def test_files_that_are_no_recognizer_are_named(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"model\.pt: UnpicklingError"):
        load_asr("whisper", path)
    torch.save({"dims": {}}, path)
    with pytest.raises(UserError, match="a checkpoint of openai-whisper"):
        load_asr("whisper", path)
    for name in (None, "large-v3", tmp_path / "absent.pt"):
        with pytest.raises(UserError, match="no such file"):
            load_asr("whisper", name)
    with pytest.raises(UserError, match="whisper model 'huge'"):
        load_asr("whisper", "official:huge")
    with pytest.raises(UserError, match=r"lm\.txt: no such file"):
        load_asr("pocketsphinx", tmp_path / "lm.txt")
    with pytest.raises(UserError, match="recognizer 'ears'"):
        load_asr("ears")


# ---- pocketsphinx --------------------------------------------------------------------------------------------------


def sphinx(samples, **more):
    """The package alone: a new decoder, silence around the clip."""
    decoder = pocketsphinx.Decoder(samprate=16000, loglevel="FATAL", **more)
    pad = np.zeros(3200, np.float32)
    pcm = np.round(np.concatenate([pad, samples, pad]).clip(-1, 1) * 32767).astype("<i2")
    decoder.start_utt()
    decoder.process_raw(pcm.tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr if found else ""


@pytest.fixture(scope="module")
def listener():
    return load_asr("pocketsphinx")


def test_pocketsphinx_hears_what_a_new_decoder_hears_whatever_came_before(listener, speech):
    expected = {voice: sphinx(samples) for voice, samples in speech.items()}
    for voice in ("rms", "slt", "slt", "rms"):
        assert listener.transcribe(speech[voice], RATE_HZ, "en") == expected[voice]
    assert listener.transcribe_batch([speech["slt"], speech["rms"]], RATE_HZ, "en") == [
        expected["slt"],
        expected["rms"],
    ]
    assert expected["rms"] == TEXTS["rms"]


def test_processes_hear_what_one_hears_in_order(listener, speech):
    clips = [speech["slt"], np.zeros(0, np.float32), speech["rms"], speech["slt"], speech["rms"][:20000]]
    asr = load_asr("pocketsphinx", processes=2)
    assert asr.pool is None and asr.name == listener.name
    for some in (clips, clips[2:], clips[:1]):
        assert asr.transcribe_batch(some, RATE_HZ, "en") == listener.transcribe_batch(some, RATE_HZ, "en")
    workers = asr.pool.workers
    assert len(workers) == 2 and all(worker.poll() is None for worker in workers)
    workers[0].kill()
    workers[0].wait()
    with pytest.raises(UserError, match="a process of pocketsphinx ended with status -9"):
        asr.transcribe_batch(clips, RATE_HZ, "en")
    del asr
    gc.collect()
    assert workers[1].poll() == 0  # it ends with its recognizer


def test_its_errors_rise_with_noise(listener, speech):
    noise = np.random.default_rng(0).standard_normal(len(speech["rms"])).astype(np.float32)
    rates = []
    for level in (0.0, 0.01, 0.3):
        heard = listener.transcribe(speech["rms"] + level * noise, RATE_HZ, "en")
        rates.append(score(TEXTS["rms"], heard, "whisper-english", "en").rate)
    assert rates[0] == 0 and rates[2] > 0.8
    assert rates == sorted(rates)


def test_pocketsphinx_takes_a_language_model_and_only_english(speech, tmp_path):
    words = ["door", "close", "please", "the", "behind", "you"]
    lines = "".join(f"-0.7782\t{word}\n" for word in words)
    path = tmp_path / "words.arpa"
    path.write_text(
        f"\\data\\\nngram 1={len(words) + 2}\n\n\\1-grams:\n-99\t<s>\n-0.7782\t</s>\n{lines}\n\\end\\\n",
        encoding="utf-8",
    )
    asr = load_asr("pocketsphinx", path)
    heard = asr.transcribe(speech["rms"], RATE_HZ, "en")
    assert heard == sphinx(speech["rms"], lm=str(path))
    assert set(heard.split()) <= set(words)
    with pytest.raises(UserError, match="language 'de' for pocketsphinx"):
        asr.transcribe(speech["rms"], RATE_HZ, "de")


def test_a_clip_without_samples_is_heard_as_nothing_and_broken_ones_are_refused(listener):
    assert listener.transcribe(np.zeros(0, np.float32), RATE_HZ, "en") == ""
    with pytest.raises(UserError, match="NaN or infinite"):
        listener.transcribe(np.full(16000, np.nan, np.float32), RATE_HZ, "en")
    with pytest.raises(UserError, match="shape"):
        listener.transcribe(np.zeros((2, 16000), np.float32), RATE_HZ, "en")
