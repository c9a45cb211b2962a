"""The script for a GPU, every line of it at the tiny size on a CPU."""

import json
import sys

import codec_speed
import pytest
import torch


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    def of(*words):
        out = tmp_path / "out.json"
        given = [tiny_folder, "--out", out, "--device", "cpu", "--repeats", 2, "--seconds", 0.1, *words]
        monkeypatch.setattr(sys, "argv", ["codec_speed.py", *map(str, given)])
        before = torch.backends.cudnn.allow_tf32
        assert codec_speed.main() == 0
        assert torch.backends.cudnn.allow_tf32 == before
        report = json.loads(out.read_text("utf-8"))
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()][:-1] == report["rows"]
        return report

    return of


def test_sizes_are_timed_in_the_plain_way(run):
    report = run("--sizes", "1x4,2x1")
    assert report["faults"] == [] and report["obstacle"] == "no Triton kernels for cpu" and report["device"] == "cpu"
    first, second, graph, voice, *upsamplings = report["rows"]
    assert [row["upsampling"] for row in upsamplings] == [8, 8, 4, 2] and upsamplings[0]["one_tap_ms"] > 0
    assert (second["streams"], second["frames"]) == (2, 1) and "fused" not in first
    assert first["plain"]["snr_db"] is None and first["plain"]["finite"]  # on a CPU it is the exact way
    assert first["plain"]["audio_s_per_s"] == pytest.approx(4 * 2048 / 44100 / first["plain"]["ms"] * 1e3)
    assert graph["plain"]["ms"] > 0 and voice["plain"]["codes_as_exact"] == 1


def test_what_is_further_from_exact_is_a_fault():
    rows = [
        {"streams": 1, "plain": {"snr_db": 57.0, "finite": True}, "fused": {"snr_db": 56.5, "finite": True}},
        {"streams": 2, "plain": {"snr_db": 57.0, "finite": True}, "fused": {"snr_db": 40.0, "finite": True}},
        {"streams": 4, "plain": {"snr_db": 58.5, "finite": True}, "fused": {"snr_db": 57.2, "finite": True}},
        {"streams": 3, "plain": {"snr_db": 57.0, "finite": True}, "fused": {"snr_db": float("nan"), "finite": False}},
    ]
    found = codec_speed.faults(rows, None)
    assert found[0] == "streams 2: 40.0 dB from exact decoding, the plain way 57.0"
    assert found[1:] == ["streams 3: fused is not finite", "streams 3: nan dB from exact decoding, the plain way 57.0"]
    assert len(codec_speed.faults([rows[0] | {"fused": {"snr_db": 55.9, "finite": True}}], None)) == 1
    assert codec_speed.faults([], "no Triton") == ["no Triton"]
    assert codec_speed.snr_db(torch.tensor([1.1]), torch.tensor([1.0])) == pytest.approx(20, abs=1e-4)
