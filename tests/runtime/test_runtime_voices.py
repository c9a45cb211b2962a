"""Recordings are encoded once: entries by content, damage seen and told, nothing written where it must not be."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from s2quant.codec import Codec
from s2quant.errors import UserError
from s2quant.runtime import voices as module
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speak import SpeakOptions, speak_to
from s2quant.runtime.voices import user_cache_folder

TEXT = "What I say."


@pytest.fixture
def recording(tmp_path):
    def make(name="voice.wav", seed=0):
        noise = 0.1 * np.random.default_rng(seed).standard_normal(44100)
        soundfile.write(tmp_path / name, noise, 44100)
        return tmp_path / name

    return make


@pytest.fixture
def cached(tiny_folder, tmp_path):
    def make(folder=tiny_folder, where=tmp_path / "cache"):
        return load_engine(folder, dtype=torch.float32, voice_cache=where)

    return make


@pytest.fixture
def encodings(monkeypatch):
    seen, encode = [], Codec.encode
    monkeypatch.setattr(
        Codec, "encode", lambda self, wav, **more: (seen.append(wav.shape), encode(self, wav, **more))[1]
    )
    return seen


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "voices").iterdir())


def test_a_recording_is_encoded_once(cached, recording, encodings, engine, tmp_path):
    path = recording()
    expected = engine.voice(path, TEXT).codes
    first = cached()
    for _ in range(2):
        voice = first.voice(path, TEXT)
        assert torch.equal(voice.codes, expected) and voice.codes.dtype == torch.int64 and voice.text == TEXT
    again = cached().voice(path, "Another transcript.")  # another process, another text, another name
    shutil.copyfile(path, tmp_path / "copy.wav")
    assert torch.equal(again.codes, expected) and torch.equal(
        cached().voice(tmp_path / "copy.wav", TEXT).codes, expected
    )
    assert len(encodings) == 2  # one by the engine without a cache
    assert (first.voices.hits, first.voices.misses, first.voices.notes) == (1, 1, [])
    assert len(entries(tmp_path)) == 1 and not list((tmp_path / "cache").rglob(".*"))


def test_other_content_is_another_entry(cached, recording, encodings, tmp_path):
    path = recording(seed=1)
    one = cached().voice(path, TEXT).codes
    recording(seed=2)  # edited in place
    two = cached().voice(path, TEXT).codes
    assert not torch.equal(one, two) and len(encodings) == 2 and len(entries(tmp_path)) == 2


def test_another_codec_or_version_is_another_entry(cached, recording, encodings, tiny_folder, tmp_path, monkeypatch):
    from folder_cases import link_copy

    path = recording()
    cached().voice(path, TEXT)
    other = tmp_path / "other"
    link_copy(tiny_folder, other)
    state = torch.load(other / "codec.pth", weights_only=True)
    name = next(key for key in state if key.startswith("encoder") and state[key].ndim == 3)
    state[name] = state[name] * 1.5
    (other / "codec.pth").unlink()
    torch.save(state, other / "codec.pth")
    cached(other).voice(path, TEXT)
    assert len(encodings) == 2 and len(entries(tmp_path)) == 2
    monkeypatch.setattr(module, "VOICE_VERSION", 99)
    cached().voice(path, TEXT)
    monkeypatch.setattr(module, "device_name", lambda device: "another GPU")
    cached().voice(path, TEXT)
    assert len(encodings) == 4 and len(entries(tmp_path)) == 4


def test_the_codec_s_hash_is_made_once_and_again_when_the_file_changes(
    cached, recording, tiny_folder, tmp_path, monkeypatch
):
    hashed, sha256 = [], module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: (hashed.append(path.name), sha256(path))[1])
    path, folder = recording(), tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for _ in range(3):
        cached(folder).voice(path, TEXT)
    assert hashed.count("codec.pth") == 1
    os.utime(folder / "codec.pth", ns=(1, 1))
    cached(folder).voice(path, TEXT)
    assert hashed.count("codec.pth") == 2 and len(entries(tmp_path)) == 1


def flip(entry):
    data = bytearray(entry.read_bytes())
    data[-3] ^= 1
    entry.write_bytes(data)


def truncate(entry):
    entry.write_bytes(entry.read_bytes()[:-10])


def stated_wrongly(entry):
    codes = load_file(entry)["codes"]
    save_file({"codes": codes + 20_000}, entry, {"sha256": module._hash(codes + 20_000)})


def other_tensor(entry):
    save_file({"codes": torch.zeros(10, 3)}, entry)


def empty(entry):
    entry.write_bytes(b"")


def without_codes(entry):
    save_file({"other": torch.zeros(10, 3)}, entry)


@pytest.mark.parametrize("damage", [flip, truncate, stated_wrongly, other_tensor, empty, without_codes])
def test_a_damaged_entry_is_made_anew_with_a_word(cached, recording, encodings, tmp_path, damage):
    path = recording()
    expected = cached().voice(path, TEXT).codes
    (entry,) = entries(tmp_path)
    sound = entry.read_bytes()
    damage(entry)
    engine = cached()
    assert torch.equal(engine.voice(path, TEXT).codes, expected) and len(encodings) == 2
    (note,) = engine.voices.notes
    assert str(entry) in note and "is damaged" in note and "encoded anew" in note
    assert load_file(entry)["codes"].tolist() == expected.tolist() and len(entry.read_bytes()) == len(sound)
    assert cached().voice(path, TEXT) and len(encodings) == 2


def test_a_cache_that_cannot_be_written_costs_a_note(cached, recording, encodings, tmp_path, engine):
    (tmp_path / "file").write_text("in the way")
    path, broken = recording(), cached(where=tmp_path / "file")
    assert torch.equal(broken.voice(path, TEXT).codes, engine.voice(path, TEXT).codes)
    assert len(broken.voices.notes) == 2 and all("could not be kept" in note for note in broken.voices.notes)


def test_a_recording_that_changes_while_it_is_encoded_is_not_kept(cached, recording, monkeypatch, tmp_path):
    path, encode, engine = recording(seed=1), Codec.encode, cached()

    def slow(self, wav, **more):
        recording(seed=2)
        return encode(self, wav, **more)

    monkeypatch.setattr(Codec, "encode", slow)
    engine.voice(path, TEXT)
    assert not (tmp_path / "cache" / "voices").exists() and not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_bad_recording_is_refused_as_before_and_nothing_is_kept(cached, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(44100), 44100)
    engine = cached()
    with pytest.raises(UserError, match="silence"):
        engine.voice(tmp_path / "silent.wav", TEXT)
    with pytest.raises(UserError, match=r"absent\.wav"):
        engine.voice(tmp_path / "absent.wav", TEXT)
    with pytest.raises(UserError):
        engine.voice(tmp_path / "silent.wav", "")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_platform_s_cache_folder():
    home = Path("/home/me")
    assert user_cache_folder({"XDG_CACHE_HOME": "/var/c"}, "linux", home) == Path("/var/c/s2quant")
    assert user_cache_folder({"XDG_CACHE_HOME": "relative"}, "linux", home) == home / ".cache/s2quant"
    assert user_cache_folder({"XDG_CACHE_HOME": ""}, "linux", home) == home / ".cache/s2quant"
    assert user_cache_folder({}, "darwin", home) == home / "Library/Caches/s2quant"
    assert user_cache_folder({}, "win32", home) == home / "AppData/Local/s2quant"
    assert user_cache_folder({"LOCALAPPDATA": "/l"}, "win32", home) == Path("/l/s2quant")
    assert user_cache_folder({}, "linux").is_relative_to(Path.home())


def test_speaking_uses_it(tiny_folder, recording, encodings, tmp_path):
    options = {"text": "Hi.", "model": tiny_folder, "out": None, "dtype": "float32", "max_frames": 4}
    voices = ((recording(), TEXT),)

    def said(cache):
        stdout = io.BytesIO()
        return speak_to(SpeakOptions(**options, voices=voices, voice_cache=cache), stdout), stdout.getvalue()

    without, cold, warm = said(None), said(tmp_path / "cache"), said(tmp_path / "cache")
    assert [result["voices_kept"] for result, _ in (without, cold, warm)] == [0, 0, 1]
    assert without[1] == cold[1] == warm[1] and len(encodings) == 2
    assert all(result["voices_s"] > 0 and result["notes"] == [] for result, _ in (without, cold, warm))


def test_the_command_line_names_the_folder(tiny_folder, recording, tmp_path, monkeypatch, capsys):
    from s2quant.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    words = [
        "speak",
        "Hi.",
        "--model",
        str(tiny_folder),
        "--max-frames",
        "3",
        "--force",
        "--out",
        str(tmp_path / "x.wav"),
    ]
    words += ["--voice", str(recording()), "--voice-text", TEXT]
    assert main([*words, "--no-voice-cache"]) == 0 and not (tmp_path / "xdg").exists()
    assert main([*words, "--voice-cache", str(tmp_path / "cache")]) == 0 and not (tmp_path / "xdg").exists()
    assert main(words) == 0
    (entry,) = (tmp_path / "xdg" / "s2quant" / "voices").iterdir()
    assert entries(tmp_path)[0].name == entry.name and "damaged" not in capsys.readouterr().err
    entry.write_bytes(b"x")
    assert main(words) == 0 and "s2quant speak: the kept voice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--no-voice-cache", "--voice-cache", "x"])
