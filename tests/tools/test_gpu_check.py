"""The script for a GPU, every line of it at the tiny size on a CPU; a GPU is too dear to find a slip on."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_sequence_can_have_the_most_positions(script, tmp_path, monkeypatch):
    words = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--size", "tiny", "--device", "cpu"]
    words += ["--sequences", 3, "--slots", 2, "--frames", 2, "--full-length", "--keep"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, words)])
    assert script.main() == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["full_length"] and report["calibration"]["num_positions"] == 3 * 256
    assert (tmp_path / "work" / "calibration.safetensors").is_file() and (tmp_path / "work" / "w4a16").is_dir()


def test_the_whole_script(script, tiny_folder, tmp_path, monkeypatch, capsys):
    words = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--size", "tiny", "--device", "cpu"]
    words += ["--model", tiny_folder, "--sequences", 3, "--slots", 2, "--frames", 8]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, words)])
    assert script.main() == 0
    assert not (tmp_path / "work").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["counts_right"] and report["inspect"]["faults"] == []
    assert report["inspect"]["quantized"] == 17 and report["calibration"]["num_sequences"] == 3
    assert report["output_error"]["median"] < report["output_error"]["median_rtn"]
    for name in ("bf16", "w4a16"):
        assert report["speech"][name]["frames"] == 8 and report["speech"][name]["audio_is_finite"]
        assert report["speech"][name]["audio_s"] == pytest.approx(8 * 2048 / 44100)
    page = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert page in capsys.readouterr().out
    assert "| quantized linears / dense linears | 17 / 14 |" in page
    assert "| peak GPU memory while quantizing, GB | not measured |" in page
