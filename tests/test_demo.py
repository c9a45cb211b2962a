"""The demo: on a trained checkpoint where there is one, else on random weights, and it says which."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from s2quant import demo
from s2quant.demo import Subject, find_subject, run_demo
from s2quant.errors import UserError
from s2quant.evaluate.plan import EvalOptions, make_plan
from s2quant.recipe import default_recipe


def quiet(phase: str, done: int, total: int) -> None:
    pass


def test_the_trained_checkpoint_is_preferred(tmp_path: Path) -> None:
    assert find_subject(tmp_path).model is None
    (tmp_path / "s2-mini").mkdir()
    (tmp_path / "s2-mini" / "config.json").write_text("{}")
    found = find_subject(tmp_path)
    assert (found.model, found.recognizer, found.recipe.stem) == (tmp_path / "s2-mini", None, "s2-mini-w4a16")
    (tmp_path / "whisper-mini").mkdir()
    (tmp_path / "whisper-mini" / "whisper-mini.pt").write_bytes(b"")
    assert find_subject(tmp_path).recognizer == tmp_path / "whisper-mini" / "whisper-mini.pt"


def test_random_weights_are_called_random(tmp_path: Path) -> None:
    lines = run_demo(tmp_path / "d", quiet, find_subject(tmp_path))
    assert "random weights" in lines[0]
    assert [line.split()[0] for line in lines[2:4]] == ["bf16", "w4a16"]
    assert lines[4] == "evaluation: left out, random weights speak no words"
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"bf16", "w4a16", "bf16-1.wav", "w4a16-1.wav"}
    with pytest.raises(UserError, match="exists already"):
        run_demo(tmp_path / "d", quiet, find_subject(tmp_path))


def test_a_trained_checkpoint_is_evaluated(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EvalOptions] = []

    def evaluated(options: EvalOptions, report: object) -> dict[str, Any]:
        plan = make_plan(options)
        assert len(plan.utterances) == 2
        assert plan.asr_model == str(tmp_path / "w.pt")
        seen.append(options)
        options.out.mkdir()
        metrics = [{"name": "wer", "baseline": 0.01, "model": 0.02}, {"name": "voice", "baseline": None, "model": 0.5}]
        return {"metrics": metrics, "verdict": {"sentence": "as good"}}

    monkeypatch.setattr(demo, "run_eval", evaluated)
    monkeypatch.setattr(demo, "write_report", lambda out: (out / "report.html").write_text("x"))
    subject = Subject(
        model=tiny_folder, recognizer=tmp_path / "w.pt", recipe=default_recipe("tiny-w4a16"), sentences=("Hi.", "Ho."),
        num_utterances=2, max_frames=12,
    )  # fmt: skip
    lines = run_demo(tmp_path / "d", quiet, subject)
    assert (seen[0].baseline, seen[0].model.name) == (tiny_folder, "w4a16")
    assert lines[0] == f"checkpoint: {tiny_folder}"
    assert lines[5].split() == ["wer", "0.0100", "0.0200"]
    assert lines[6].split() == ["voice", "-", "0.5000"]
    assert lines[-1] == f"report: {tmp_path / 'd' / 'eval' / 'report.html'}"
    assert (tmp_path / "d" / "w4a16-2.wav").stat().st_size > 44
    assert not (tmp_path / "d" / "bf16").exists()


def test_what_is_missing_for_the_evaluation_is_named(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny_folder, model)
    subject = Subject(
        model=model,
        recognizer=None,
        recipe=default_recipe("tiny-w4a16"),
        sentences=("Hi.",),
        num_utterances=2,
        max_frames=4,
    )
    assert any("whisper-mini.pt is not there" in line for line in run_demo(tmp_path / "a", quiet, subject))
    monkeypatch.setattr(demo, "LISTENERS", ("no_such_package",))
    assert any("not installed: no_such_package" in line for line in run_demo(tmp_path / "b", quiet, subject))
