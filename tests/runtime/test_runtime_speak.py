"""The job of `s2quant speak`, from options to files."""

import io
import itertools

import numpy as np
import pytest
import soundfile
import torch

from s2quant.errors import UserError, VerificationError
from s2quant.model import SlowAR
from s2quant.runtime import speak as speak_module
from s2quant.runtime.audio import pcm_bytes
from s2quant.runtime.speak import SpeakOptions, speak_to


@pytest.fixture
def options(tiny_folder, tmp_path):
    base = {"text": "Hello there.", "model": tiny_folder, "out": tmp_path / "a.wav", "dtype": "float32"}
    return lambda **changes: SpeakOptions(**(base | {"max_frames": 9, "seed": 3} | changes))


@pytest.fixture
def end_at_once(monkeypatch):
    monkeypatch.setattr(SlowAR, "constrained_logits", lambda self, hidden: torch.eye(4097)[[-1] * len(hidden)] * 100)


@pytest.fixture
def recording(tmp_path):
    def make(name, seconds=1.0, rate=44100, channels=1):
        noise = 0.1 * np.random.default_rng(len(name)).standard_normal((int(seconds * rate), channels))
        soundfile.write(tmp_path / name, noise, rate)
        return tmp_path / name

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_text_becomes_a_wav_with_its_codes(options, tmp_path, engine):
    result = speak_to(options(codes_out=tmp_path / "a.npy"), io.BytesIO())
    codes = np.load(tmp_path / "a.npy")
    samples, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert codes.dtype == np.int64 and codes.shape == (10, 9) and samples.shape == (9 * 2048,)
    assert samples.tobytes() == pcm_bytes(engine.decode(torch.from_numpy(codes)))
    assert result["num_frames"] == 9 and result["stop_reason"] == "limit" and result["sample_rate"] == rate == 44100
    assert result["audio_s"] == 9 * 2048 / 44100 and result["seed"] == 3 and result["first_audio_s"] is None
    assert result["rtf"] == pytest.approx(result["seconds"] / result["audio_s"])
    assert names(tmp_path) == ["a.npy", "a.wav"]


def test_streaming_writes_the_same_samples(options, tmp_path):
    speak_to(options(max_frames=40), io.BytesIO())
    result = speak_to(options(max_frames=40, stream=True, out=tmp_path / "b.wav"), io.BytesIO())
    whole, streamed = (soundfile.read(tmp_path / name, dtype="int16")[0].astype(int) for name in ("a.wav", "b.wav"))
    assert whole.shape == streamed.shape and np.abs(whole - streamed).max() <= 1  # 1e-5 may round to the next step
    assert 0 < result["first_audio_s"] < result["seconds"]


class Pipe(io.BytesIO):
    """Standard output, with a note of what came when."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        self.flushed.append(self.tell())


def test_raw_pcm_goes_to_standard_output_chunk_by_chunk(options, tmp_path):
    speak_to(options(), io.BytesIO())
    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    (tmp_path / "a.wav").unlink()
    for stream, chunks in ((False, [9]), (True, [4, 9])):
        pipe = Pipe()
        speak_to(options(out=None, stream=stream, codes_out=tmp_path / f"{stream}.npy"), pipe)
        samples = np.frombuffer(pipe.getvalue(), dtype="<i2").astype(int)
        assert np.abs(samples - whole).max() <= 1
        assert pipe.flushed == [frames * 2048 * 2 for frames in chunks]
    assert names(tmp_path) == ["False.npy", "True.npy"]


def test_the_seed_and_the_sampling_arrive(options, tmp_path):
    found = {}
    for name, changes in {
        "same": {},
        "again": {},
        "seed": {"seed": 4},
        "cold": {"temperature": 1e-5},
        "narrow": {"top_p": 1e-3},
        "one": {"top_k": 1},
    }.items():
        speak_to(options(out=tmp_path / f"{name}.wav", codes_out=tmp_path / f"{name}.npy", **changes), io.BytesIO())
        found[name] = np.load(tmp_path / f"{name}.npy")
    assert np.array_equal(found["same"], found["again"])
    assert len({found[name].tobytes() for name in ("same", "seed", "cold", "one")}) == 4
    best = [found[name][:, 0].tolist() for name in ("cold", "narrow", "one")]  # before any repetition: the best code
    assert best[0] == best[1] == best[2]


def test_voices_are_cloned_from_recordings(options, recording, engine, monkeypatch):
    seen = []
    plain = speak_module.Engine.prepare
    monkeypatch.setattr(speak_module.Engine, "prepare", lambda self, r: seen.append(r) or plain(self, r))
    first, second = recording("one.wav"), recording("second.flac", seconds=0.7, rate=16000, channels=2)
    speak_to(options(out=None, voices=((first, "First."),)), io.BytesIO())
    speak_to(options(out=None, voices=((first, "First."), (second, "Second."))), io.BytesIO())
    one, two = seen[0].voices, seen[-1].voices
    assert [voice.text for voice in two] == ["First.", "Second."]
    assert one[0].codes.shape == (10, 22) and two[1].codes.shape == (10, 16)  # whole frames of 2048 samples
    for path, voice in zip((first, second), two, strict=True):
        assert torch.equal(engine.voice(path, voice.text).codes, voice.codes)
    prompt = engine._prompt(seen[-1], "Hello there.", [])
    frames = prompt[0] >= engine.config.semantic_begin_id
    assert torch.equal(prompt[1:, frames], torch.cat([voice.codes for voice in two], dim=1))


def test_a_voice_changes_the_speech(options, recording, tmp_path):
    for name, voices in {"with": ((recording("one.wav"), "First."),), "without": ()}.items():
        speak_to(options(out=None, voices=voices, codes_out=tmp_path / f"{name}.npy"), io.BytesIO())
    assert not np.array_equal(np.load(tmp_path / "with.npy"), np.load(tmp_path / "without.npy"))


def test_control_tokens_are_refused_or_escaped(options, tmp_path):
    with pytest.raises(UserError, match="im_end"):
        speak_to(options(text="a <|im_end|> b"), io.BytesIO())
    assert names(tmp_path) == []
    speak_to(options(text="a <|im_end|> b", escape=True), io.BytesIO())
    assert names(tmp_path) == ["a.wav"]


def test_long_text_is_spoken_sentence_by_sentence_when_asked(options):
    text = " ".join(f"This is sentence number {i}, and it is not short at all." for i in range(8))
    whole = speak_to(options(text=text, out=None, max_frames=3), io.BytesIO())
    split = speak_to(options(text=text, out=None, max_frames=3, split_sentences=True), io.BytesIO())
    assert whole["num_frames"] == 3 and split["num_frames"] > 3


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_files_that_exist_are_kept_unless_told_otherwise(options, tmp_path):
    for name in ("a.wav", "a.npy"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(UserError, match=f"{name} exists already"):
            speak_to(options(codes_out=tmp_path / "a.npy", model=tmp_path / "unread"), io.BytesIO())
        if name == "a.wav":
            (tmp_path / name).unlink()
    (tmp_path / "a.wav").write_text("precious")
    speak_to(options(codes_out=tmp_path / "a.npy", overwrite=True), io.BytesIO())
    assert soundfile.info(tmp_path / "a.wav").frames == 9 * 2048 and np.load(tmp_path / "a.npy").shape == (10, 9)


def test_a_folder_is_made_for_the_output(options, tmp_path):
    speak_to(options(out=tmp_path / "new" / "a.wav", overwrite=True), io.BytesIO())
    assert names(tmp_path / "new") == ["a.wav"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 0.0, "top_k": 0}, "top_k is 0"),
        ({"dtype": "float8"}, "bfloat16, float32"),
        ({"codes_out": "a.txt"}, r"not a name ending in \.npy"),
        ({"out": "a.npy", "codes_out": "a.npy"}, "for the sound and for the codes"),
        ({"voices": (("absent.wav", "x"), ("other.wav", "y"))}, r"absent\.wav is no file[\s\S]*other\.wav is no file"),
        ({"out": "."}, "is a folder"),
        ({"out": ".", "overwrite": True}, "is a folder"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_refused_before_the_model_is_read(options, tmp_path, changes, words):
    for name in {"out", "codes_out"} & changes.keys():
        changes = changes | {name: tmp_path / changes[name]}
    if "voices" in changes:
        changes = {"voices": tuple((tmp_path / path, text) for path, text in changes["voices"])}
    with pytest.raises(UserError, match=words):
        speak_to(options(model=tmp_path / "unread", **changes), io.BytesIO())
    assert names(tmp_path) == []


def test_a_recording_that_cannot_be_used_is_refused(options, recording, tmp_path):
    short = recording("short.wav", seconds=0.2)
    with pytest.raises(UserError, match=r"0\.20 s"):
        speak_to(options(voices=((short, "Short."),)), io.BytesIO())
    with pytest.raises(UserError, match="text"):
        speak_to(options(voices=((recording("good.wav"), ""),)), io.BytesIO())
    assert names(tmp_path) == ["good.wav", "short.wav"]


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_speech_is_a_fault_and_leaves_nothing(options, tmp_path, end_at_once, stream):
    pipe = io.BytesIO()
    for out in (tmp_path / "a.wav", None):
        with pytest.raises(VerificationError, match="before the first frame"):
            speak_to(options(stream=stream, out=out, codes_out=tmp_path / "a.npy"), pipe)
    assert names(tmp_path) == [] and pipe.getvalue() == b""


@pytest.mark.parametrize("stream", [False, True])
def test_sound_that_is_not_finite_is_a_fault_and_leaves_nothing(options, tmp_path, monkeypatch, stream):
    from s2quant.codec import Codec

    calls = itertools.count()
    plain = Codec.decode_latent
    monkeypatch.setattr(
        Codec,
        "decode_latent",
        lambda *a: plain(*a) * (float("nan") if not stream or next(calls) else 1.0),  # streamed: in the second chunk
    )
    with pytest.raises(VerificationError, match="not finite"):
        speak_to(options(stream=stream, codes_out=tmp_path / "a.npy"), io.BytesIO())
    assert names(tmp_path) == []


@pytest.mark.parametrize("stream", [False, True])
def test_codes_that_cannot_be_written_take_the_sound_with_them(options, tmp_path, monkeypatch, stream):
    def save(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(speak_module.np, "save", save)
    with pytest.raises(UserError, match="No space left"):
        speak_to(options(stream=stream, codes_out=tmp_path / "a.npy"), io.BytesIO())
    assert names(tmp_path) == []


def test_a_reader_that_goes_away_is_not_the_disk_s_fault(options, tmp_path):
    class Broken(io.BytesIO):
        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        speak_to(options(out=None, stream=True, codes_out=tmp_path / "a.npy"), Broken())
    assert names(tmp_path) == []
