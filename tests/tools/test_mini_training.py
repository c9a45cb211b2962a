"""The training code of s2-mini on a toy scale: everything learns, and what it writes is loaded by s2quant."""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from mini import codec, codec_losses, common, dual, prompts, speech
from mini.grammar import words_of
from mini.tokenizer import write_tokenizer
from mini_cases import write_parts
from torch.nn import functional

from s2quant import load_codec, load_engine
from s2quant.checkpoint.config import S2Config
from s2quant.codec import CodecConfig
from s2quant.prompt import Tokenizer, build_prompt

SMALL_CODEC = CodecConfig(**vars(codec.CONFIG) | {"encoder_dim": 4, "decoder_dim": 32, "latent_dim": 64})
SMALL_DUAL = dual.config_json(dim=128, slow_layers=1, fast_layers=1, slow_ffn=128, fast_ffn=128)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_parts(folder)
    return folder


@pytest.fixture
def log(tmp_path: Path) -> common.Log:
    return common.Log(tmp_path / "log.jsonl", "test", time.time())


def load(data: Path, split: str = "train") -> common.Speech:
    found = common.Speech(data, "cpu", split)
    assert found.refresh() == 1
    assert found.complete
    return found


# ---- common --------------------------------------------------------------------------------------------------------


def test_resampling_is_soxrs_and_comes_back() -> None:
    t = np.arange(8000) / 16000
    wav = (0.3 * np.sin(2 * np.pi * 440 * t) + 0.1 * np.sin(2 * np.pi * 3000 * t)).astype(np.float32)
    up = common.resample(torch.from_numpy(wav)[None], 16000, 44100)[0].numpy()
    other = soxr.resample(wav, 16000, 44100)
    assert len(up) == 22050
    assert np.abs(up[500:-500] - other[500 : len(up) - 500]).max() < 3e-3
    down = common.resample(torch.from_numpy(up)[None], 44100, 16000)[0].numpy()
    assert np.abs(down[300:-300] - wav[300:-300]).max() < 3e-3


def test_word_errors() -> None:
    assert common.word_errors(["a", "b", "c"], ["a", "x", "c", "d"]) == 2
    assert common.word_errors(["a", "b"], []) == 2
    assert common.word_errors([], ["a"]) == 1


def test_rates_follow_the_time() -> None:
    assert common.cosine(0.0) == pytest.approx(0.1)
    assert common.cosine(0.03) == pytest.approx(1.0)
    assert common.cosine(1.0) == pytest.approx(0.02)
    budget = common.Budget(1e9, max_steps=4)
    budget.steps = 4
    assert budget.over


def test_utterances_are_framed_one_by_one(data: Path) -> None:
    store = load(data)
    sound = store.framed(0)
    assert sound.shape == (int(store.frames.sum()), 2048)
    assert len(store.phones) == len(sound)
    start = store.frame_starts[3]
    alone = common.resample(store.cut([3], int(store.samples[3])), 16000, 44100)[0]
    piece = sound[start : start + store.frames[3]].flatten()[: len(alone)].float() / 32767
    assert (piece - alone).abs().max() < 1e-4


# ---- codec ---------------------------------------------------------------------------------------------------------


def test_shifted_speech_is_the_same_a_little_later(data: Path) -> None:
    store = common.Speech(data, "cpu")
    store.refresh()
    sound, starts = store.framed(0).flatten(), store.frame_starts
    for quarters in range(4):
        later = store.shifted(quarters)
        heard, lead = later.framed(0).flatten(), quarters * 512
        for i, (first, size) in enumerate(zip(later.frame_starts, later.frames, strict=True)):
            utterance = heard[first * 2048 : (first + size) * 2048]
            assert not utterance[:lead].any()
            before = sound[starts[i] * 2048 : (starts[i] + store.frames[i]) * 2048]
            kept = min(len(before), len(utterance) - lead)
            assert torch.equal(utterance[lead : lead + kept], before[:kept])
            assert before[kept:].abs().sum() < 200  # no more is lost than the resampler rings on
            labels = later.phones[first : first + size].flatten()
            assert not labels[:quarters].any()
            expected = store.phones[starts[i] : starts[i] + store.frames[i]].flatten()
            assert torch.equal(labels[quarters:][: len(expected)], expected[: len(labels) - quarters])
    assert np.array_equal(store.shifted(0).frames, store.frames)


def test_entries_are_running_means_of_what_chose_them(log: common.Log) -> None:
    trainer = codec.Trainer(SMALL_CODEC, "cpu", 0, log, False, 1, 4)
    trainer.settle()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 3, (2, 10, 5), generator=generator)
    points = torch.randn(2, 10, 8, 5, generator=generator)
    before = trainer.books[4].codebook.weight.clone()
    for _ in range(600):  # what was there at first is forgotten
        trainer.follow(codes, points)
    chosen = points[:, 4].transpose(1, 2)[codes[:, 4] == 1]
    assert torch.allclose(trainer.books[4].codebook.weight[1], chosen.mean(0), atol=1e-4)
    assert torch.allclose(trainer.books[4].codebook.weight[3:], before[3:])  # nothing chose them: they stay


def test_the_codec_learns_and_loads(data: Path, log: common.Log, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    trainer = codec.Trainer(SMALL_CODEC, "cpu", 0, log, compiled=False, rows=1, row_frames=12)
    store = load(data)
    sound, labels, starts = store.framed(0), store.phones, store.frame_starts
    batch = trainer.draw(sound, labels, starts)
    trainer.rate.fill_(1e-3)
    plain = [float(trainer.plain_step(**batch)["mel"]) for _ in range(8)]
    assert plain[-1] < 0.8 * plain[0]
    with torch.no_grad():
        latent = trainer.codec.encode_latent(batch["wav"])
        codec.lay_out_codebooks(trainer.codec, latent.transpose(1, 2).flatten(0, 1), trainer.generator)
        quantized = trainer.codec.quantize(latent)
        assert (quantized.latent - latent).square().mean() < 0.5 * latent.square().mean()
    trainer.rate.fill_(3e-4)
    first = float(trainer.step(**batch)["mel"])
    for _ in range(12):
        out = trainer.step(**batch)
    assert float(out["mel"]) < first
    trainer.usage[:, 5:] = 0
    kept = trainer.books[1].codebook.weight[:5].clone()
    assert trainer.restart_unused(out["projected"]) == 9 * 8  # a share of each residual codebook at a time
    assert torch.equal(trainer.books[1].codebook.weight[:5], kept)
    trainer.save(tmp_path / "codec.pth")
    loaded = load_codec(tmp_path / "codec.pth")
    codes = codec.encode_all(loaded, store, batch_frames=64)
    assert codes.shape == (10, int(store.frames.sum()))
    start = store.frame_starts[5]
    alone = loaded.encode(sound[start : start + store.frames[5]].flatten()[None, None].float() / 32768)
    assert torch.equal(alone[0], codes[:, start : start + store.frames[5]].long())
    back = codec.round_trip(loaded, codes, store, [5, 6])
    assert [len(w) for w in back] == [int(store.frames[i]) * 2048 for i in (5, 6)]
    assert len(codec.entropies(codes)) == 10


@pytest.mark.parametrize("pitch", [80.0, 129.0, 172.0, 300.0])
def test_pitch_is_read_off_the_sound(pitch: float) -> None:
    time = torch.arange(2048 * 12) / 44100
    voice = torch.stack([torch.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 9)]).sum(0) * 0.1
    bins, voiced = codec_losses.pitch_labels(voice[None, None])
    low, high = codec_losses.PITCH_HZ
    found = high * (high / low) ** (-(bins[0].double() + 0.5) / codec_losses.PITCH_BINS)
    assert voiced.all() and (found[1:-1] / pitch - 1).abs().max() < 0.04
    torch.manual_seed(0)
    assert not codec_losses.pitch_labels(0.1 * torch.randn(1, 1, 2048 * 12))[1].any()
    assert not codec_losses.pitch_labels(torch.zeros(1, 1, 2048 * 12))[1].any()


def test_half_of_the_rows_are_played_faster_or_slower(log: common.Log) -> None:
    trainer = codec.Trainer(SMALL_CODEC, "cpu", 0, log, False, 12, 16)
    frames, pitch = 400, 400.0
    tone = torch.sin(2 * np.pi * pitch * torch.arange(frames * 2048, dtype=torch.float64) / 44100)
    labels = torch.arange(frames * 4, dtype=torch.int64).view(frames, 4) // 8  # rises by 1 in two frames
    drawn = trainer.draw((tone * 20000).short().view(frames, 2048), labels, np.arange(frames))
    size = 16 * 2048
    peaks = torch.fft.rfft(drawn["wav"][:, 0] * torch.hann_window(size), 4 * size).abs().argmax(1) * 44100 / (4 * size)
    speeds = peaks / pitch
    assert 2 <= ((speeds - 1).abs() < 0.002).sum() <= 10
    assert speeds.min() > np.exp(-codec.BENT) - 0.01 and speeds.max() < np.exp(codec.BENT) + 0.01
    assert (speeds.max() - speeds.min()) > 0.1
    rise = (drawn["labels"][:, -1, -1] - drawn["labels"][:, 0, 0]).float()
    assert (rise - speeds * 63 / 8).abs().max() <= 1.01


def test_mel_bands_are_means() -> None:
    for window, bands in codec_losses.SCALES:
        matrix = codec_losses.mel_bands(window, bands)
        assert matrix.shape == (bands, window // 2 + 1)
        assert torch.allclose(matrix.sum(1), torch.ones(bands))


# ---- prompts and Dual-AR -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 512)
    return Tokenizer.load(folder)


def spoken(data: Path) -> prompts.Spoken:
    store = load(data)
    shape = (10, int(store.frames.sum()))
    return prompts.Spoken.of(store, torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).short())


def test_the_tokenizer_gives_words_whole(tokenizer: Tokenizer) -> None:
    text = "[slow] The old captain opened [pause] the green window."
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) <= 18
    assert tokenizer.im_end_id == 1218
    assert tokenizer.num_semantic == 512


@pytest.mark.parametrize("kind", list(prompts.KINDS | prompts.EASY_KINDS))
def test_training_sequences_are_prompts_and_answers(data: Path, tokenizer: Tokenizer, kind: str) -> None:
    source = spoken(data)
    conversation, utterances = prompts.draw_conversation(source, random.Random(1), kind)
    tokens, goal = prompts.encode(conversation, tokenizer)
    said = [message for message in conversation.messages if message.role == "user"]
    spoken_parts = [m.parts[0].codes for m in conversation.messages if m.role == "assistant"]
    system = conversation.messages[0].parts
    voices = []
    if len(system) > 1:  # take the references apart again: all their codes may stand with the first transcript
        transcripts = system[1].text.split("\n")
        cuts = [system[3].codes[:, :-1], system[3].codes[:, -1:]] if len(transcripts) == 2 else [system[3].codes]
        voices = [prompts.Voice(text=t, codes=c.long()) for t, c in zip(transcripts, cuts, strict=True)]
    history = [(m.parts[0].text, c.long()) for m, c in zip(said[:-1], spoken_parts[:-1], strict=True)]
    prompt = build_prompt(tokenizer, said[-1].parts[0].text, voices, history)
    assert np.array_equal(tokens[:, : prompt.shape[1]], prompt.numpy())
    answer = tokens[:, prompt.shape[1] :]
    assert answer.shape[1] == goal + 1
    assert np.array_equal(answer[1:, : goal - 1], spoken_parts[-1].numpy())
    assert answer[0, goal - 1] == tokenizer.im_end_id
    labels = source.phones_of(utterances)
    first = utterances[0]
    inside = int(source.frames[first]) - 3
    expected = source.phones[source.starts[first] : source.starts[first] + source.frames[first]]
    assert labels.shape == (goal, 8)
    assert np.array_equal(labels[:inside, :4], expected[:inside])
    assert np.array_equal(labels[:inside, 4:], expected[3:])
    assert not labels[-1].any()  # silence behind the end


def test_rows_hold_whole_conversations_and_the_loss_is_the_models(
    data: Path, tokenizer: Tokenizer, tmp_path: Path, log: common.Log
) -> None:
    packed = prompts.pack(spoken(data), tokenizer, 4, dual.LENGTH, "test")
    assert packed["document"].max() >= 2
    assert (packed["target"] & (packed["document"] < 0)).sum() == 0
    np.savez(tmp_path / "rows-001.npz", **packed)
    rows = dual.Rows(tmp_path, "cpu")
    assert rows.refresh() == 4
    trainer = dual.Trainer(SMALL_DUAL, "cpu", 0, log, compiled=False, batch=1, num_targets=600)
    for p in trainer.model.parameters():
        if p.ndim == 2 and not p.any():
            torch.nn.init.normal_(p, std=0.05)
    batch = trainer.draw(rows, wrong=(0.0,))
    index = int(batch["document"].max())
    inside = batch["document"][0] == index
    alone = batch["tokens"][:, :, inside]
    start = int(inside.nonzero()[0, 0])
    keep = (batch["counts"] > 0) & inside[batch["chosen"]]
    one = batch | {name: batch[name][keep] for name in ("chosen", "counts", "phones")}
    row = next(i for i, row in enumerate(packed["tokens"]) if np.array_equal(row, batch["tokens"][0].numpy()))
    assert torch.equal(batch["phones"], torch.from_numpy(packed["phones"][row])[batch["chosen"]].long())
    assert batch["phones"].any()
    with torch.no_grad():
        found, whole = trainer.losses(**one), trainer.model(alone)
    places = one["chosen"] - start
    expected = functional.cross_entropy(whole.logits[0, places - 1], alone[0, 0, places])
    assert torch.allclose(found["semantic"], expected, atol=1e-4)
    number = {int(place): i for i, place in enumerate(whole.frames[:, 1])}
    frames = [number[int(place)] for place in places if alone[0, 0, place] != tokenizer.im_end_id]
    expected = functional.cross_entropy(whole.fast_logits[frames, 1:].flatten(0, 1), whole.codes[frames, 1:].flatten())
    assert torch.allclose(found["residual"], expected, atol=1e-4)


def test_training_begins_with_one_turn(data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    easy = prompts.pack(spoken(data), tokenizer, 2, dual.LENGTH, "test", easy=True)
    mixed = prompts.pack(spoken(data), tokenizer, 2, dual.LENGTH, "test")
    np.savez(tmp_path / "rows-001.npz", easy=np.array(False), **mixed)
    rows = dual.Rows(tmp_path, "cpu")
    rows.refresh()
    config, generator = S2Config.from_json(SMALL_DUAL), torch.Generator().manual_seed(0)
    assert rows.draw(1, 64, config, generator, (0.0,), easy=True)["tokens"].shape[0] == 1  # there is none yet
    np.savez(tmp_path / "rows-002.npz", easy=np.array(True), **easy)
    rows.refresh()
    drawn = [rows.draw(1, 64, config, generator, (0.0,), easy=True)["tokens"][0].short() for _ in range(8)]
    assert all(any(torch.equal(row, torch.from_numpy(known)) for known in easy["tokens"]) for row in drawn)
    answers = [(easy["document"][0] == n).sum() - easy["target"][0][easy["document"][0] == n].sum() for n in range(3)]
    assert max(answers) < 60  # a prompt of one turn without references is short


def test_the_dual_ar_learns_and_speaks(data: Path, tokenizer: Tokenizer, tmp_path: Path, log: common.Log) -> None:
    torch.set_num_threads(1)
    np.savez(tmp_path / "rows-001.npz", **prompts.pack(spoken(data), tokenizer, 2, dual.LENGTH, "test"))
    rows = dual.Rows(tmp_path, "cpu")
    rows.refresh()
    trainer = dual.Trainer(SMALL_DUAL, "cpu", 0, log, compiled=False, batch=1, num_targets=128)
    trainer.warm_up()
    batch = trainer.draw(rows, wrong=(0.5,))
    changed = (batch["heard"] != batch["tokens"]).any(1)
    frames = trainer.model.slow.is_semantic(batch["tokens"])
    assert changed.any()
    assert not (changed & ~frames).any()
    assert torch.equal(trainer.model.slow.is_semantic(batch["heard"]), frames)
    trainer.rate.fill_(2e-3)
    trainer.muon_rate.fill_(0.02)
    losses = [float(sum(trainer._step(**batch)[name] for name in ("semantic", "residual"))) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]
    out = tmp_path / "model"
    out.mkdir()
    dual.write_model(out, SMALL_DUAL, trainer.model)
    codec.Trainer(SMALL_CODEC, "cpu", 0, log, compiled=False, rows=1, row_frames=8).save(out / "codec.pth")
    engine = load_engine(out)
    from s2quant.runtime.speech import Request

    speech_ = engine.speak(Request(text="The old captain waited.", max_frames=3))
    assert speech_.codes.shape[0] == 10
    assert engine.decode(speech_.codes).shape == (speech_.codes.shape[1] * 2048,)


def test_the_full_size_is_what_it_should_be() -> None:
    from s2quant.checkpoint.config import S2Config
    from s2quant.checkpoint.layout import expected_tensors, linears

    config = S2Config.from_json(dual.config_json())
    assert sum(spec.numel for spec in expected_tensors(config).values()) == 8_525_568
    assert all(m % 64 == 0 and k % 64 == 0 for m, k in linears(config).values())


def test_muon_makes_updates_orthogonal() -> None:
    p = torch.nn.Parameter(torch.zeros(64, 32))
    muon = dual.Muon([p], torch.tensor(1.0), decay=0.0)
    p.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, 1, 32))
    muon.step()
    values = torch.linalg.svdvals(p.detach() / 2**0.5)
    assert values.min() > 0.4
    assert values.max() < 1.4


# ---- recognizer ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("whisper") is None, reason="needs openai-whisper")
def test_the_recognizer_learns_and_whisper_loads_it(data: Path, log: common.Log, tmp_path: Path) -> None:
    import whisper
    from mini import recognizer

    torch.set_num_threads(1)
    sizes = {"n_audio_state": 32, "n_audio_head": 1, "n_audio_layer": 1}
    sizes |= {name.replace("audio", "text"): value for name, value in sizes.items()}
    trainer = recognizer.Trainer(recognizer.DIMS | sizes, "cpu", 0, log, compiled=False)
    store = load(data)
    for row in store.rows:
        assert set(trainer.tokenizer.encode(f" {row['sentence']}")) <= set(trainer.used.tolist())
    wav, tokens, phones = recognizer.Batches([store], trainer.tokenizer, 2, 0, 10).draw()
    loudness = wav.unfold(1, 320, 320).square().mean(2).sqrt()  # [B, T], as many positions as phonemes
    silent = phones == speech.PHONES.index("pau")
    assert phones.shape == loudness.shape
    assert loudness[silent].median() < 0.2 * loudness[~silent].median()  # labels lie where the sound is
    mel = recognizer.log_mel(wav, trainer.filters)
    whole = whisper.pad_or_trim(whisper.log_mel_spectrogram(wav[1], 80, padding=whisper.audio.N_SAMPLES), 3000)
    edge = wav.shape[1] // 160 - 2  # noise may reach to the end of a clip, where one mirrors it and the other does not
    assert torch.allclose(mel[1, :, :edge], whole[:, :edge], atol=1e-5)
    assert torch.allclose(mel[1, :, edge + 4 :], whole[:, edge + 4 :], atol=1e-5)
    with torch.no_grad():  # the loss is whisper's own cross-entropy over the whole vocabulary
        logits = trainer.model(mel, tokens[:, :-1].clamp(min=0))
        expected = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-1)
        audio = trainer.model.encoder(mel)
        found = recognizer.loss_of(trainer.model, audio, tokens, trainer.used, trainer.column)
    assert torch.allclose(found, expected, atol=1e-3)
    trainer.rate.fill_(3e-3)
    steps = [trainer._step(mel, tokens, phones) for _ in range(10)]
    assert all(float(steps[-1][name]) < 0.95 * float(steps[0][name]) for name in ("loss", "phone"))
    recognizer.save_model(tmp_path / "tiny.pt", trainer.model)
    loaded = whisper.load_model(str(tmp_path / "tiny.pt"))
    used = (loaded.decoder.token_embedding.weight != 0).any(1)
    assert int(used.sum()) == len(trainer.used)
    heard = recognizer.transcribe(loaded, wav[:1])
    assert isinstance(words_of(heard[0]), list)


# ---- flite ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (speech.LIBRARIES / "libflite.so.1").exists(), reason="needs Debian's flite")
def test_speech_does_not_depend_on_what_was_said_before() -> None:
    lines = list(speech.lines(0, "train", 10))
    there = [speech.speak(line)[0] for line in lines]
    back = [speech.speak(line)[0] for line in reversed(lines)]
    assert all(np.array_equal(one, other) for one, other in zip(there, reversed(back), strict=True))


@pytest.mark.skipif(not (speech.LIBRARIES / "libflite.so.1").exists(), reason="needs Debian's flite")
def test_tags_are_heard() -> None:
    pytest.importorskip("whisper")
    from mini.judge import longest_silence_s, pitch_hz

    text = "The old captain opened the green window."
    for voice in speech.VOICES:

        def say(line: str, voice: str = voice) -> np.ndarray:
            return speech.speak(speech.Line(text=line, voice=voice, split="train"))[0]

        plain = say(text)
        assert len(say(f"[fast] {text}")) < 0.88 * len(plain)
        assert len(say(f"[slow] {text}")) > 1.15 * len(plain)
        assert pitch_hz(say(f"[high] {text}")) > 1.1 * pitch_hz(plain)
        assert pitch_hz(say(f"[low] {text}")) < 0.92 * pitch_hz(plain)
        assert longest_silence_s(say(text.replace("opened", "opened [pause]"))) > longest_silence_s(plain) + 0.2
        assert abs(float(np.sqrt(np.mean(plain**2))) - speech.LEVEL) < 0.01


def test_the_judge_s_options_are_called_as_those_of_s2quant_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("whisper")
    from mini import judge

    seen: list[judge.Options] = []
    monkeypatch.setattr(judge, "run", lambda options: seen.append(options) or {})
    files = ["--model", "M", "--asr-model", "W.pt", "--out", "O"]
    monkeypatch.setattr(sys, "argv", ["judge.py", *files, "--limit", "3", "--slots", "2", "--seeds", "0,2"])
    judge.main()
    found = seen[0]
    assert (found.model, found.asr_model, found.out) == (Path("M"), Path("W.pt"), Path("O"))
    assert (found.limit, found.num_slots, found.seeds) == (3, 2, (0, 2))


@pytest.mark.skipif(not (speech.LIBRARIES / "libflite.so.1").exists(), reason="needs Debian's flite")
def test_phone_labels_fit_the_sound() -> None:
    audio, phones = speech.speak(speech.Line(text="The old captain waited.", voice="slt", split="train"))
    count = speech.num_frames(len(audio))
    labels = speech.phone_labels(phones, count)
    assert labels.shape == (count, speech.SUBFRAMES)
    assert {speech.PHONES[i] for i in labels.flatten()} >= {"k", "p", "w", "ey", "pau"}
