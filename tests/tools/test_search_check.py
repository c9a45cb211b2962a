"""A recipe found, quantized by and spoken with, each step by its command, at the tiny size on a CPU."""

import json
import os

import pytest
import search_check
import torch


def test_a_call_that_was_cut_off_is_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", torch.get_num_threads)  # so that runs have this process's number of threads
    options = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--size", "tiny", "--device", "cpu"]
    options += ["--frames", 20, "--sequences", 6, "--held", 2, "--bits", "4,8"]
    words = [str(word) for word in options]
    assert search_check.main([*words, "--seconds", "0"]) == 1
    assert search_check.main([*words, "--go-on"]) == 0
    found = json.loads((tmp_path / "out" / "search.json").read_text("utf-8"))
    assert list(found["steps"]) == ["sensitivity", "search", "quantize", "inspect", "speak"]
    assert [goes[-1]["status"] for goes in found["steps"].values()] == [0] * 5
    assert found["tensor_bytes"] == found["foretold_bytes"] <= found["budget_bytes"] == 14_661_120
    assert found["process"]["num_measured"] > 0 and found["process"]["seconds"]["linears"] > 0
    assert (tmp_path / "out" / "found.wav").stat().st_size > 44 and (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("place", ["work/mine", "absent"])
def test_a_checkpoint_that_was_named_is_never_written(tmp_path, place):
    named = tmp_path / place
    if place == "work/mine":
        named.mkdir(parents=True)
        (named / "config.json").touch()
    words = [
        "--out",
        tmp_path / "out",
        "--work",
        tmp_path / "work",
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--model",
        named,
    ]
    try:
        status = search_check.main([str(word) for word in words])
    except SystemExit as refused:
        status = str(refused)
    assert status == 1 or "move one" in status
    assert [path.name for path in named.glob("*")] == (["config.json"] if place == "work/mine" else [])
