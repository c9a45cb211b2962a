"""The script that measures streams on a GPU, at the tiny size on a CPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from s2quant.export.verify import inspect_folder

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "stream_check.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("stream_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parts_of_the_script(script, tmp_path, monkeypatch):
    words = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--size", "tiny", "--device", "cpu"]
    words += ["--only", "folders,load,memory,against"]
    monkeypatch.setattr(sys, "argv", ["stream_check.py", *map(str, words)])
    assert script.main() == 0
    found = inspect_folder(tmp_path / "work" / "w4a16")
    assert found.num_quantized == 17 and not found.faults
    parts = json.loads((tmp_path / "out" / "stream.json").read_text())["parts"]
    for name in ("bf16", "w4a16"):
        assert parts["load"][name]["status"] == 0
        assert json.loads(parts["load"][name]["last"][0])["first_sound_s"] > 0
    said = parts["memory"]["memory-None"]
    assert said["status"] == 0 and json.loads(said["last"][0])["num_frames"] == 40
    assert parts["against"]["left out"] == "no --against"


def test_a_part_that_fails_loses_no_other(script, tmp_path, monkeypatch):
    words = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--size", "tiny", "--device", "cpu"]
    monkeypatch.setattr(script, "load", lambda check: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["stream_check.py", *map(str, words), "--only", "load,against"])
    assert script.main() == 1
    parts = json.loads((tmp_path / "out" / "stream.json").read_text())["parts"]
    assert "ZeroDivisionError" in parts["load"]["exception"] and "left out" in parts["against"]


def test_prompts_by_graphs_are_checked_and_timed(script, tmp_path, monkeypatch):
    words = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--size", "tiny", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["stream_check.py", *map(str, words), "--only", "folders,prompts"])
    assert script.main() == 0
    found = json.loads((tmp_path / "out" / "stream.json").read_text())["parts"]["prompts"]
    assert all(found[name]["status"] == 0 for name in ("prompts-bf16", "prompts-w4a16", *script.FIRST))
    checked = json.loads((tmp_path / "out" / "prompts-bf16.json").read_text())
    assert len(checked["rows"]) == 6 and not checked["faults"] and set(checked["rows"][0]["graphs"]) == {"64", "512"}
    for name, graphs in (("first-eager", False), ("first-prompt-graphs", True), ("first-graphs", True)):
        bench = json.loads((tmp_path / "out" / name / "bench.json").read_text())
        assert bench["prompt_graphs"] is graphs and len(bench["first_audio"]) == 6
