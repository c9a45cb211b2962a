"""A few layers quantized by one process and by two, timed; at the tiny size on a CPU."""

import json

import pytest
import quantize_speed
import torch
from parts import QUANTIZING, Parts
from traced import summed_up

from s2quant.checkpoint.config import S2Config
from s2quant.export.random import tiny_config


def test_one_process_and_two(tmp_path, capsys):
    words = ["--size", "tiny", "--device", "cpu", "--layers", 2, "--sequences", 4, "--processes", "1,2", "--parts"]
    words += ["--out", tmp_path / "out", "--work", tmp_path / "work"]
    assert quantize_speed.main([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "out" / "quantize_speed.json").read_text("utf-8"))
    assert list(found["runs"]) == ["1", "1 parts", "2", "2 parts"] and found["layers"] == 2
    for name, run in found["runs"].items():
        assert run["status"] == 0 and run["processes"] == int(name[0]), name
        assert list(run["phases_s"]) == ["start", "quantizing", "writing"]
        assert run["gptq_seconds"] > 0 and run["hessian_seconds"] > 0
        assert run.get("unequal", []) == []
    assert all("unequal" in run for run in list(found["runs"].values())[1:])
    parts = found["runs"]["2 parts"]["parts"]
    assert list(parts) == ["parts-0", "parts-1"]
    calls = {row["part"].partition(":")[2]: row["calls"] for row in parts["parts-0"]}
    assert calls["sum_hessian"] == 8 and calls["StageStore.save"] == 2
    assert "StageStore.save" not in {row["part"].partition(":")[2] for row in parts["parts-1"]}


def test_a_difference_is_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantize_speed, "unequal", lambda one, other: ["a tensor"])
    words = ["--size", "tiny", "--device", "cpu", "--layers", 1, "--sequences", 3, "--processes", "1,1"]
    assert quantize_speed.main([str(w) for w in [*words, "--out", tmp_path / "out", "--work", tmp_path / "work"]]) == 1


def test_random_sequences_are_what_a_model_takes():
    from s2quant.model import check_tokens

    config = S2Config.from_json(tiny_config())
    for length in (1, 40, 1024):
        sequence = quantize_speed.random_sequence(config, length, 0)
        assert sequence.shape == (1 + config.num_codebooks, length)
        check_tokens(config, sequence[None])
    assert not torch.equal(*(quantize_speed.random_sequence(config, 40, seed) for seed in (0, 1)))


def test_parts_are_counted_once(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("parts.now", lambda: float(next(clock)))
    for name in ("outer", "inner"):  # so that the module is as before
        monkeypatch.setattr(Sample, name, getattr(Sample, name))
    found = Parts([f"{__name__}:Sample.outer", f"{__name__}:Sample.inner"])
    assert Sample().outer() == 2
    seconds = {row["part"].rpartition(".")[2]: (row["seconds"], row["calls"]) for row in found.table()}
    assert seconds == {"outer": (3.0, 1), "inner": (2.0, 2)}  # 5 in all, of which the inner ones took 1 each
    with pytest.raises(AttributeError):
        Parts([QUANTIZING[0] + "x"])


class Sample:
    def outer(self):
        return self.inner() + self.inner()

    def inner(self):
        return 1


def test_idle_time_is_put_down_to_what_the_main_thread_was_in():
    def mark(name, ts, dur, tid=1):
        return {"cat": "user_annotation", "name": f"## {name}", "ts": ts, "dur": dur, "tid": tid}

    def kernel(ts, dur, name="gemm"):
        return {"cat": "kernel", "name": name, "ts": ts, "dur": dur, "tid": 7}

    events = [
        *(mark("quantize_stage", ts, 900) for ts in (0, 1000, 2000, 3000)),
        mark("solve", 1100, 300), mark("merge", 1200, 100), mark("solve", 2100, 100, tid=2),
        kernel(500, 600, "before"), kernel(1150, 60), kernel(1200, 40), kernel(1290, 610, "add"), kernel(2000, 1000),
        {"name": "an instant"}, mark("quantize_stage", 1500, 300) | {"cat": "gpu_user_annotation"},
    ]  # fmt: skip
    found = summed_up(events)
    assert found["stages"] == 2 and found["ms"] == 1.0
    # 1000-1150, 1240-1290 and 1900-2000 are idle
    assert found["idle_ms"] == {"quantize_stage": 0.075, "": 0.05, "quantize_stage > solve > merge": 0.025}
    assert found["busy_ms"] == pytest.approx(0.85)
    assert found["kernels_ms"] == {"gemm": 0.55, "add": 0.305}


def test_stages_are_traced(tmp_path):
    words = ["--size", "tiny", "--device", "cpu", "--layers", 6, "--sequences", 1, "--processes", ""]
    options = quantize_speed.arguments([str(word) for word in (*words, "--out", tmp_path, "--work", tmp_path / "work")])
    found = quantize_speed.run(options, quantize_speed.prepared(options), 1, "trace")
    traced = found["trace"]["trace-0"]
    assert found["status"] == 0 and traced["stages"] == 1 and traced["ms"] > 0
    assert traced["busy_ms"] == 0 and sum(traced["idle_ms"].values()) == pytest.approx(traced["ms"])  # no GPU
    assert all(part.startswith("quantize_stage") for part in traced["idle_ms"])
