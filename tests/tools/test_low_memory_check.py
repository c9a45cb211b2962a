"""Quantized in two goes with low memory, after gpu_check.py, at the tiny size on a CPU."""

import json
import os
import sys

import gpu_check
import low_memory_check
import pytest
import torch
from safetensors.torch import load_file, save_file


def words(tmp_path, *more):
    found = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--size", "tiny", "--device", "cpu", *more]
    return [str(word) for word in found]


@pytest.fixture
def made(tmp_path, monkeypatch):
    more = ("--sequences", 3, "--slots", 2, "--frames", 2, "--full-length", "--keep")
    monkeypatch.setattr(os, "cpu_count", torch.get_num_threads)  # so that runs have this process's number of threads
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words(tmp_path, *more)])
    assert gpu_check.main() == 0
    return tmp_path


def test_two_goes_end_as_one(made, capsys):
    assert low_memory_check.main(words(made, "--sequences", 3, "--stages", 2)) == 0
    found = json.loads((made / "out" / "low_memory.json").read_text("utf-8"))
    assert found["killed"]["status"] is None and 2 <= found["killed"]["done"] < 6
    assert found["gone_on"]["status"] == 0 and found["unequal"] == [] and found["low_memory"] is True
    assert found["peak_host_bytes"] > 0 and found["device"]

    path = made / "work" / "w4a16" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("qweight"))
    tensors[name][0, 0] += 1
    save_file(tensors, path, {"format": "pt"})
    assert low_memory_check.unequal(made / "work" / "w4a16", made / "work" / "low-memory") == [name]


def test_three_goes_that_speak_end_as_one(made, capsys):
    more = ("--sequences", 8, "--stages", 2, "--groups", 2)
    assert low_memory_check.main(words(made, *more, "--seconds", 0)) == 1  # cut off
    assert low_memory_check.main(words(made, *more, "--go-on")) == 0
    found = json.loads((made / "out" / "low_memory.json").read_text("utf-8"))
    assert found["killed_speaking"]["status"] is found["killed"]["status"] is None
    assert 2 <= found["killed_speaking"]["done"] < 4 and 2 <= found["killed"]["done"] < 6
    assert found["gone_on"]["status"] == found["again"]["status"] == 0 and found["unequal"] == []


def test_a_run_that_was_not_killed_shows_nothing(made, capsys):
    assert low_memory_check.main(words(made, "--sequences", 3, "--stages", 99)) == 1
    found = json.loads((made / "out" / "low_memory.json").read_text("utf-8"))
    assert found["killed"]["status"] == 0 and "unequal" not in found


def test_two_processes_end_as_one(made, capsys):
    assert low_memory_check.main(words(made, "--sequences", 3, "--processes", 2, "--profile")) == 0
    for rank in range(2):
        assert "quantize_stages" in (made / "out" / f"profile-{rank}.txt").read_text("utf-8")
    found = json.loads((made / "out" / "shared.json").read_text("utf-8"))
    assert found["shared"]["processes"] == 2 and found["unequal"] == [] and len(found["processes"]) == 2
    assert found["low_memory"] is False and list(found["shared"]["phases_s"]) == ["start", "quantizing", "writing"]
