"""Speed: the arms take turns, every round counts the same frames, the figures follow from the samples."""

import itertools
import json
import statistics
import xml.etree.ElementTree as ET

import pytest
import torch

from s2quant.cli import main
from s2quant.errors import UserError
from s2quant.evaluate import speed
from s2quant.evaluate.speed import measure_speed

FRAME_S = 2048 / 44100


@pytest.fixture(scope="module")
def two_arms(tiny_folder, tiny_quantized):
    order = []
    result = measure_speed(
        {"baseline": tiny_folder, "model": tiny_quantized},
        text="Hi.",
        num_frames=6,
        repeats=2,
        batch_sizes=(1, 3),
        progress=lambda phase, done, total: order.append((phase, done, total)),
    )
    return result, order


def test_the_figures_follow_from_the_samples(two_arms):
    result, _ = two_arms
    assert [(row["concurrency"], row["arm"]) for row in result["rows"]] == [
        *((1, "baseline"), (1, "model"), (3, "baseline"), (3, "model"))
    ]
    for row in result["rows"]:
        samples, batch = row["samples"], row["concurrency"]
        assert set(samples) == {"prefill_s", "ar_s", "codec_s"}
        assert all(len(values) == 2 and min(values) > 0 for values in samples.values())
        ar_s, prefill_s, codec_s = (statistics.median(samples[key]) for key in ("ar_s", "prefill_s", "codec_s"))
        assert row["ms_per_frame"] == pytest.approx(1e3 * ar_s / 5)
        assert row["frames_per_s"] == pytest.approx(batch * 5 / ar_s)
        assert row["rtf"] == pytest.approx((prefill_s + ar_s + codec_s) / (6 * FRAME_S))
        assert row["ar_rtf"] == pytest.approx((prefill_s + ar_s) / (6 * FRAME_S))
        assert row["audio_s_per_s"] == pytest.approx(batch / row["rtf"])
        assert (row["first_audio_s"] is None) == (row["stages_s"]["encode"] is None) == (batch != 1)
        assert row["peak_device_bytes"] is None and row["peak_reserved_bytes"] is None  # not a GPU
        assert row["ratio"] == 1.0 or row["arm"] == "model"


def test_the_facts_of_the_arms(two_arms, tiny_folder, tiny_quantized):
    result, _ = two_arms
    assert result["arms"]["baseline"]["backends"] == [] and result["arms"]["model"]["backends"] != []
    decoding = {name: arm["decoding"] for name, arm in result["arms"].items()}
    assert all(found["frame"] == "operations" and found["not_fused"] for found in decoding.values())
    assert {row["backend"] for row in decoding["baseline"]["linears"]} == {"torch"}
    quantized = [row for row in decoding["model"]["linears"] if row["bits"]]
    assert {row["backend"] for row in quantized} == set(result["arms"]["model"]["backends"])
    for name, folder in (("baseline", tiny_folder), ("model", tiny_quantized)):
        assert result["arms"][name]["folder_bytes"] == sum(
            path.stat().st_size for path in folder.rglob("*") if path.is_file()
        )
        assert 0 < result["arms"][name]["warmup_s"] < result["warmup_s"]
    json.dumps(result)


def test_the_arms_take_turns(two_arms):
    _, order = two_arms
    assert [done for _, done, _ in order] == list(range(12)) and {total for *_, total in order} == {12}
    names = ["".join(phase[0] for phase, *_ in order[start : start + 6]) for start in (0, 6)]
    assert names == ["mbbmmb", "mbbmmb"]


def test_the_clock_is_read_where_the_definitions_say(tiny_folder, monkeypatch):
    """With a clock that advances by one at every look, a stretch is the looks in it."""
    ticks = itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))
    row = measure_speed({"only": tiny_folder}, text="Hi.", num_frames=4, repeats=1, dtype=torch.float32)["rows"][0]
    # between the first frame and the end lie the look at the end of the speech (its `seconds`) and the last one
    assert row["samples"]["ar_s"] == [2.0] and row["ms_per_frame"] == pytest.approx(2000 / 3)
    assert row["samples"]["codec_s"] == [1.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 1}, "num_frames is 1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"batch_sizes": ()}, r"batch sizes are \[\]"),
        ({"batch_sizes": (2, 2)}, "one of them twice"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"codec_graphs": True}, "graphs of a codec on cpu"),
        ({"num_frames": 100_000}, "leaves room for"),
        ({"text": "<|speaker:0|>Hi.\n<|speaker:1|>Hi.", "num_frames": 100_000}, "leaves room for"),
    ],
)
def test_what_cannot_be_timed_is_refused(tiny_folder, options, words):
    with pytest.raises(UserError, match=words):
        measure_speed({"only": tiny_folder}, **({"text": "Hi.", "num_frames": 2} | options))
    with pytest.raises(UserError, match="no checkpoint"):
        measure_speed({}, text="Hi.", num_frames=2)


def test_bench_writes_table_json_and_plot(tiny_folder, tiny_quantized, tmp_path, capsys):
    out = tmp_path / "bench"
    words = ["bench", "--model", str(tiny_folder), "--model", str(tiny_quantized), "--frames", "3", "--repeats", "1"]
    assert main([*words, "--batch", "1,2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed == (out / "bench.md").read_text()
    assert printed.count("bf16 |") == printed.count("w4a16 |") == 2 + 3  # batch sizes, first sounds
    result = json.loads((out / "bench.json").read_text())
    assert [row["concurrency"] for row in result["rows"]] == [1, 1, 2, 2]
    assert json.loads((out / "manifest.json").read_text())["stage"] == "bench"
    svg = ET.fromstring((out / "bench.svg").read_text())
    bars = [rect for rect in svg.iter("{http://www.w3.org/2000/svg}rect") if rect.find("./*") is not None]
    assert len(bars) == 4
    assert main([*words, "--out", str(out)]) == 2
    assert main([*words, "--batch", "1;2"]) == 2
    assert result["prompts_together"] is False and main([*words, "--decoder", "fast", "--prompts-together"]) == 2
    assert "prompts together: " in capsys.readouterr().err
    assert main([*words, "--model", str(tiny_folder)]) == 2
