"""The harness measures: damage that was done on purpose shows in its own figure, and nothing shows where nothing is."""

import hashlib
import json
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from run_cases import (
    TEXTS,
    KnowingAsr,
    SpectrumModel,
    damaged,
    failures,
    metric,
    records,
    rounded,
    run,
    write_suite,
)

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError
from s2quant.evaluate import run as run_module
from s2quant.runtime.engine import Engine
from s2quant.runtime.loading import load_engine

EMBEDDINGS = "text_model.model.embeddings.weight"


@pytest.fixture(scope="module")
def asr():
    return KnowingAsr()


@pytest.fixture
def listeners(monkeypatch, asr):
    """Take listeners that know the tiny checkpoint's speech, instead of those of the suite."""
    monkeypatch.setattr(run_module, "load_asr", lambda *_: asr)
    monkeypatch.setattr(run_module, "load_similarity", lambda *_: SpectrumModel())


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite"), margins={"wer": 0.05}, gates={"error_rate_max": 0.0})


@pytest.fixture(scope="module")
def same(tmp_path_factory, tiny_folder, suite, asr):
    """The tiny checkpoint against itself; the recognizer learns from it what undamaged speech is."""
    out = tmp_path_factory.mktemp("same") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_asr", lambda *_: asr)
        patch.setattr(run_module, "load_similarity", lambda *_: SpectrumModel())
        run(suite, tiny_folder, out, tiny_folder, metrics=("failures",))
        asr.learn(out)
        return out, run(suite, tiny_folder, out, tiny_folder, resume=True)


# ---- nothing where nothing is --------------------------------------------------------------------------------------


def test_identical_checkpoints_differ_by_exactly_nothing(same):
    out, results = same
    for row in results["metrics"]:
        if row["name"] != "SIM to baseline":
            assert (row["delta"], row["interval"]) == (0, [0, 0]), row["name"]
    assert metric(results, "SIM to baseline")["model"] == 1.0
    assert metric(results, "WER (corpus)")["model"] == 0.0
    assert metric(results, "WER (corpus)")["verdict"] == "non-inferior"
    assert [book["kl_mean"] for book in results["tokens"]["codebooks"]] == [0.0] * 10
    assert all(row["mcnemar_p"] == 1.0 for row in results["failures"])
    assert results["verdict"]["sentence"] == "no difference: both arms are equal in all 6 pairs"
    assert results["verdict"]["passed"] is True
    assert results["worst"] == []
    assert [row["arm"] for row in records(out)] == ["baseline"] * 6 + ["model"] * 6 + ["floor"] * 6


def test_other_seeds_are_inside_the_floor(same):
    floor = [metric(same[1], name) for name in ("WER", "Duration ratio")]
    for row in floor:
        low, high = row["floor_interval"]
        assert low <= 0 <= high, row
    assert floor[1]["floor_delta"] != 0  # other seeds are other speech


# ---- damage shows --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_bits(tiny_folder, tmp_path_factory):
    return damaged(tiny_folder, tmp_path_factory.mktemp("two") / "bits", rounded(2))


def test_two_bits_raise_the_error_rate_and_break_the_margin(listeners, same, suite, tiny_folder, two_bits, tmp_path):
    results = run(suite, two_bits, tmp_path / "run", tiny_folder)
    row = metric(results, "WER (corpus)")
    assert row["baseline"] == 0.0
    assert row["model"] > 0.3
    assert row["interval"][0] > 0.05
    assert row["verdict"] == "inferior"
    assert results["verdict"]["passed"] is False
    assert results["verdict"]["reasons"][0].startswith("margin.wer: inferior at 5.00 points of WER (corpus): delta +")
    assert metric(results, "SIM to baseline")["model"] < 1.0
    assert results["worst"]
    assert len(results["worst"]) <= 6
    assert {row["group"] for row in results["breakdown"]["tags"]} == {"with tags", "without tags"}


def test_noise_in_the_fast_part_is_found_in_the_fast_part(listeners, same, suite, tiny_folder, tmp_path):
    def noise(tensors):
        generator = torch.Generator().manual_seed(0)
        for name in sorted(tensors):
            if name.startswith("audio_decoder.") and "layers" in name and name.endswith(".weight"):
                own = tensors[name].float()
                tensors[name] = (own + own.std() * torch.randn(own.shape, generator=generator)).to(torch.bfloat16)

    model = damaged(tiny_folder, tmp_path / "noisy", noise)
    results = run(suite, model, tmp_path / "run", tiny_folder, seeds=(0,))
    books = results["tokens"]["codebooks"]
    assert books[0]["kl_mean"] == 0.0
    assert all(book["kl_mean"] > 0.01 for book in books[1:])
    assert all(book["kl_baseline_hidden"] == book["kl_mean"] for book in books[1:])
    assert metric(results, "WER (corpus)")["delta"] > 0.1


def test_a_lower_im_end_is_speech_without_an_end(listeners, same, suite, tiny_folder, tmp_path):
    end = S2Config.load(tiny_folder).im_end_id

    def lower(tensors):
        lean = (
            tensors["audio_decoder.codebook_embeddings.weight"].float().mean(0)
        )  # of all frames, see export/random.py
        tensors[EMBEDDINGS][end] = -4 * (lean / lean.norm()).to(torch.bfloat16)

    model = damaged(tiny_folder, tmp_path / "endless", lower)
    suite = write_suite(tmp_path / "suite", max_frames=120, floor_seeds=None, gates={"failure_delta_max": 0.1})
    results = run(suite, model, tmp_path / "run", tiny_folder, metrics=("failures",))
    assert failures(results, "no_end") == 6
    assert failures(results, "no_end", "baseline") < 3
    assert results["verdict"]["reasons"][-1].startswith("failure_delta_max: ")
    assert {row["stop_reason"] for row in records(tmp_path / "run") if row["arm"] == "model"} == {"limit"}


def test_fewer_bits_have_more_divergence(listeners, suite, tiny_folder, two_bits, tmp_path):
    found = []
    for bits in (8, 4, 3, 2):
        model = two_bits if bits == 2 else damaged(tiny_folder, tmp_path / f"bits-{bits}", rounded(bits))
        more = {"seeds": (0,), "limit": 2, "metrics": ("tokens",)}
        found.append(run(suite, model, tmp_path / f"run-{bits}", tiny_folder, **more)["tokens"]["codebooks"][0])
    divergence = [book["kl_mean"] for book in found]
    assert 0 < divergence[0] < divergence[1] < divergence[2] < divergence[3]
    assert found[0]["floor_kl_mean"] > 0


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs flite")
def test_another_voice_and_missing_words_are_heard(tiny_folder, tmp_path):
    """Real recognizer and speaker model on synthetic speech put in the place of the tiny checkpoint's."""

    def say(voice, text, path):
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True)

    prompt = tmp_path / "suite" / "rms.wav"
    prompt.parent.mkdir()
    said = "This is how my voice sounds on an ordinary day."
    say("rms", said, prompt)
    voices = {"rms": {"audio": "rms.wav", "text": said, "sha256": hashlib.sha256(prompt.read_bytes()).hexdigest()}}
    more = {"seeds": [0], "floor_seeds": None, "max_frames": 20}
    suite = write_suite(tmp_path / "suite", TEXTS, voices=voices, **more)
    out = tmp_path / "run"
    run(suite, tiny_folder, out, tiny_folder, metrics=("failures",))
    assert {row["prompt_id"] for row in records(out)} == {"rms"}
    assert all((out / row["prompt_audio"]).is_file() for row in records(out))
    for number, text in enumerate(TEXTS):
        words = text.replace("[slow] ", "")
        say("rms", words, out / f"audio/baseline/utt-{number}-0.wav")
        say("slt", " ".join(words.split()[:4]), out / f"audio/model/utt-{number}-0.wav")
    results = run(suite, tiny_folder, out, tiny_folder, resume=True, metrics=("wer", "similarity"))
    voice, errors = metric(results, "SIM to prompt"), metric(results, "WER (corpus)")
    assert voice["baseline"] > 0.7
    assert voice["delta"] < -0.1
    assert voice["interval"][1] < 0
    assert metric(results, "SIM to baseline")["model"] < 0.75
    assert errors["baseline"] < 0.2
    assert errors["delta"] > 0.2


# ---- whatever happens ----------------------------------------------------------------------------------------------


def test_a_run_stopped_again_and_again_gives_the_same_files(
    listeners, same, suite, tiny_folder, tiny_quantized, tmp_path
):
    options = {"seeds": (0,), "limit": 2}
    run(suite, tiny_quantized, tmp_path / "whole", tiny_folder, **options)
    out, stops, phases = tmp_path / "stopped", 0, set()
    while True:
        calls: dict[str, int] = {}

        def stop(phase, done, total, calls=calls):
            kind = phase.partition(",")[0]
            calls[kind] = calls.get(kind, 0) + (done > 0)
            phases.add(kind)
            if calls[kind] > (4 if kind == "speaking" else 2):  # the longest group, of baseline and floor, has four
                raise KeyboardInterrupt

        try:
            run(suite, tiny_quantized, out, tiny_folder, resume=stops > 0, progress=stop, **options)
            break
        except KeyboardInterrupt:
            stops += 1
            assert not (out / "results.json").exists()
            with sorted((out / "work").glob("clips-*-000.jsonl"))[-1].open("a") as file:
                file.write('{"arm": "mod')  # as a kill in the middle of a line leaves it
    assert stops >= 5
    assert {"speaking", "token metrics", "transcribing", "comparing voices"} <= phases
    for name in ("results.json", "summary.csv", "manifest.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert records(out) == records(tmp_path / "whole")


def test_a_run_goes_on_only_with_what_its_clips_depend_on(same, suite, tiny_folder, tiny_quantized, tmp_path):
    out, _ = same
    with pytest.raises(UserError, match="exists already"):
        run(suite, tiny_folder, out, tiny_folder)
    with pytest.raises(UserError, match="model: other files"):
        run(suite, tiny_quantized, out, tiny_folder, resume=True, metrics=("failures",))
    with pytest.raises(UserError, match="dtype: 'float32' there, 'bfloat16' here"):
        run(suite, tiny_folder, out, tiny_folder, resume=True, metrics=("failures",), dtype="bfloat16")
    with pytest.raises(UserError, match="num_slots: 3 there, 4 here"):
        run(suite, tiny_folder, out, tiny_folder, resume=True, metrics=("failures",), num_slots=4)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        run(suite, tiny_folder, tmp_path / "other", resume=True)


def test_what_is_refused_leaves_no_folder(suite, tiny_folder, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run(suite, tiny_folder, tmp_path / "run", asr_model=str(tmp_path / "absent.lm"))
    with pytest.raises(UserError, match="is not a folder"):
        run(suite, tmp_path / "absent", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_utterance_that_fails_is_a_record(listeners, tiny_folder, tmp_path, monkeypatch):
    suite = write_suite(tmp_path / "suite", [*TEXTS[:2], "No <|im_end|> here."], gates={"error_rate_max": 0.0})
    plain = run(suite, tiny_folder, tmp_path / "plain", tiny_folder, metrics=("wer", "failures"))
    wanted = torch.from_numpy(np.load(tmp_path / "plain/audio/model/utt-1-1.npy"))
    decode = Engine.decode

    def failing(self, codes):
        if torch.equal(codes, wanted):
            raise RuntimeError("CUDA out of memory. Tried to allocate\nmuch")
        return decode(self, codes)

    monkeypatch.setattr(Engine, "decode", failing)
    results = run(suite, tiny_folder, tmp_path / "run", tiny_folder, metrics=("wer", "failures"))
    errors = {(row["arm"], row["utt"], row["seed"]): row["error"] for row in records(tmp_path / "run")}
    assert errors["model", "utt-1", 1] == "RuntimeError: CUDA out of memory. Tried to allocate"
    assert "<|im_end|>" in errors["model", "utt-2", 0]
    assert sum(error is not None for error in errors.values()) == 2 * 3 + 2  # both arms are the same checkpoint
    others = [row for row in records(tmp_path / "run") if row["error"] is None]
    before = {(row["arm"], row["utt"], row["seed"]): row["codes"] for row in records(tmp_path / "plain")}
    assert all(before[row["arm"], row["utt"], row["seed"]] == row["codes"] for row in others)
    lost = next(row for row in records(tmp_path / "run") if row["error"])
    assert lost["asr"]["hits"] == 0
    assert lost["asr"]["deletions"] > 0
    assert failures(plain, "error") == 2
    assert failures(results, "error") == 3
    assert results["verdict"]["reasons"] == ["error_rate_max: 0.5 is above 0"]


def test_when_all_fails_there_are_no_figures(listeners, tiny_folder, tmp_path):
    suite = write_suite(tmp_path / "suite", ["No <|im_end|>.", "Nor <|im_end|>."], margins={"wer": 0.1})
    results = run(suite, tiny_folder, tmp_path / "run", tiny_folder)
    for row in results["metrics"]:
        assert [row[key] for key in ("baseline", "model", "floor", "delta", "interval", "mde")] == [None] * 6
    assert results["tokens"] is None
    assert results["verdict"]["passed"] is False
    assert [gate["name"] for gate in results["verdict"]["gates"]][:3] == [
        "sound.baseline",
        "sound.model",
        "sound.floor",
    ]
    assert json.loads((tmp_path / "run/results.json").read_text())["metrics"][0]["model"] is None


def test_without_a_baseline_figures_stand_alone(listeners, same, suite, tiny_folder, tmp_path):
    results = run(suite, tiny_folder, tmp_path / "run", metrics=("wer", "failures"), seeds=(0,))
    row = metric(results, "WER (corpus)")
    assert (row["model"], row["baseline"], row["delta"], row["verdict"]) == (0.0, None, None, None)
    assert row["n"] == 3
    assert list(results["arms"]) == ["model"]
    assert results["verdict"]["sentence"] == "no baseline, so nothing to compare with"
    assert soundfile.info(tmp_path / "run/audio/model/utt-0-0.wav").samplerate == 44100


def test_speech_is_made_by_the_decoder_that_the_run_names(suite, tiny_folder, tmp_path, listeners, monkeypatch):
    seen = []

    def noted(*args, **named):
        engine = load_engine(*args, **named)
        seen.append(engine.decoder)
        return engine

    monkeypatch.setattr(run_module, "load_engine", noted)
    for decoder, used in (("auto", "plain"), ("fast", "fast")):
        out = tmp_path / decoder
        run(suite, tiny_folder, out, metrics=("failures",), limit=1, decoder=decoder)
        assert json.loads((out / "run.json").read_text())["decoder"] == used and set(seen) == {used}
        seen.clear()
