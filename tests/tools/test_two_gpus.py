"""The script for several GPUs, by two processes on a CPU; and that what it compares with can be told apart."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import preloaded
import pytest
import same_output
import torch
import two_gpus
from launched import Launcher, Watch

from s2quant.recipe import load_recipe
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import Request


def words(tmp_path: Path, *more: object) -> list[str]:
    found = ["--out", tmp_path / "out", "--work", tmp_path / "work", "--size", "tiny", "--device", "cpu", *more]
    return [str(word) for word in found]


def test_two_processes_quantize_as_one(tiny_folder, tmp_path, capsys):
    more = ("--only", "quantize", "--model", tiny_folder, "--sequences", 8, "--max-frames", 16)
    assert two_gpus.main(words(tmp_path, *more)) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"two_gpus.json", "two_gpus.md", "two_gpus.log"}
    part = json.loads((tmp_path / "out" / "two_gpus.json").read_text("utf-8"))["parts"]["quantize"]
    assert part["equal"] and part["differences"] == [] and part["linears"] == 17
    assert (part["slots"], part["calibration_groups"]) == (2, 4)
    assert part["calibration"]["num_sequences"] == 8
    assert [len(part[name]["memory"]) for name in ("one", "several")] == [1, 2]
    for name in ("one", "several"):
        phases = part[name]["phases_s"]
        assert list(phases) == ["start, calibration speech", "quantizing", "writing"]
        assert all(seconds > 0 for seconds in phases.values()) and sum(phases.values()) <= part[name]["seconds"]
    assert part["ratio"] == part["one"]["seconds"] / part["several"]["seconds"]
    page = (tmp_path / "out" / "two_gpus.md").read_text("utf-8")
    assert page in capsys.readouterr().out
    assert f"| quantize | {part['one']['seconds']:.1f} | {part['several']['seconds']:.1f} |" in page
    assert "| yes |" in page and "17 linears" in page

    other = tmp_path / "other"
    shutil.copytree(tmp_path / "work" / "quantize-one", other)
    records = other / "s2quant" / "records.json"
    records.write_text(records.read_text().replace('"num_tokens": ', '"num_tokens": 1', 1))
    (other / "config.json").write_text("{}")
    (other / "codec.pth").unlink()
    found = same_output.compare_quantized(tmp_path / "work" / "quantize-one", other)
    assert not found["equal"] and found["num_differences"] == 3
    assert found["differences"][:2] == ["codec.pth: only in the first", "config.json: other bytes"]
    assert ": num_tokens: " in found["differences"][2]


def test_sequences_of_full_length_come_from_weights_without_an_end(tiny_folder, tmp_path, monkeypatch):
    found = {}

    def both(check, part, words, phases, compare):
        found["words"] = words(tmp_path / "made")
        raise RuntimeError("enough")

    monkeypatch.setattr(two_gpus, "both", both)
    assert two_gpus.main(words(tmp_path, "--only", "quantize", "--full-length", "--sequences", 8)) == 1
    command = found["words"]
    recipe = load_recipe(Path(command[1]))
    assert not recipe.calibration.require_end
    assert recipe.calibration.max_frames == recipe.calibration.max_positions
    model = load_engine(command[command.index("--model") + 1], num_slots=1)
    assert model.speak(Request(text="Hello.", max_frames=200)).stop_reason == "limit"


def run_folder(folder: Path, wall_s: float = 1.0, **changes: object) -> Path:
    record = {"arm": "model", "utt": "a", "seed": 0, "num_frames": 3, "wall_s": wall_s} | changes
    (folder / "audio" / "model").mkdir(parents=True)
    (folder / "audio" / "model" / "a-0.wav").write_bytes(b"sound")
    (folder / "records.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "results.json").write_text("{}")
    return folder


def test_runs_are_told_apart_by_all_but_times(tmp_path):
    one = run_folder(tmp_path / "one")
    found = same_output.compare_runs(one, run_folder(tmp_path / "same", wall_s=2.0))
    assert found["equal"] and (found["records"], found["files"]) == (1, 2)
    other = run_folder(tmp_path / "other", num_frames=4)
    (other / "audio" / "model" / "a-0.wav").write_bytes(b"other")
    assert same_output.compare_runs(one, other)["differences"] == [
        "records.jsonl: model a 0: num_frames: 3, 4",
        "audio/model/a-0.wav: other bytes",
    ]
    missing = same_output.compare_runs(one, run_folder(tmp_path / "missing", seed=1))
    assert missing["num_differences"] == 2 and not missing["equal"]


def test_a_quantized_model_can_be_given(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(two_gpus.Check, "run", lambda check, part, name, words, *more, **named: said.append(words))
    monkeypatch.setattr(two_gpus, "both", lambda check, part, words, *more, **named: said.append(words(tmp_path)))
    monkeypatch.setattr(two_gpus, "missing", lambda part: [])
    for more in ((), ("--quantized", tmp_path / "mine")):
        two_gpus.main(words(tmp_path, "--only", "eval", *more))
    made, first, second = said
    assert made[0] == "quantize" and first[0] == second[0] == "eval"
    assert made[made.index("--out") + 1] == first[first.index("--model") + 1]
    assert second[second.index("--model") + 1] == str(tmp_path / "mine")


def test_a_part_that_fails_loses_no_other_and_is_exit_status_1(tmp_path, monkeypatch):
    def run(self, words, shared=False, **more):
        if words[0] == "random":
            return {"processes": 1, "seconds": 1.0, "status": None, "phases_s": {}}
        raise ZeroDivisionError

    monkeypatch.setattr(Launcher, "run", run)
    assert two_gpus.main(words(tmp_path)) == 1
    parts = json.loads((tmp_path / "out" / "two_gpus.json").read_text("utf-8"))["parts"]
    assert "ZeroDivisionError" in parts["eval"]["error"]
    assert parts["quantize"]["error"] == "made: out of time"
    assert parts["quantize"]["made"]["seconds"] == 1.0
    assert "| quantize |  |  |  | not known |" in (tmp_path / "out" / "two_gpus.md").read_text("utf-8")


def test_a_command_that_is_out_of_time_is_ended_with_what_it_started(tmp_path, monkeypatch):
    launcher = Launcher(num_processes=2, preload=[], log=tmp_path / "log")
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(Launcher, "command", lambda self, words, shared: [sys.executable, "-c", parent])
    found = launcher.run([], limit_s=1)
    assert found["status"] is None and found["seconds"] < 3
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_libraries_are_loaded_before_the_words_are_read(tmp_path, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    launcher = Launcher(num_processes=2, preload=[tmp_path / "a.so", tmp_path / "b.so"], log=tmp_path / "log")
    alone, shared = (launcher.command(["inspect", str(tmp_path / "none")], shared) for shared in (False, True))
    assert shared[-len(alone) + 1 :] == alone[1:] and "accelerate.commands.launch" in shared
    assert preloaded.main(alone[2:]) == 2
    assert loaded == [str(tmp_path / "a.so"), str(tmp_path / "b.so")]
    assert "s2quant inspect: error" in capsys.readouterr().err


def test_several_can_be_started_by_s2quant_itself(tmp_path):
    launcher = Launcher(num_processes=3, preload=[], log=tmp_path / "log", launcher="s2quant")
    alone, shared = (launcher.command(["inspect", "none"], shared) for shared in (False, True))
    assert shared == [*alone, "--processes", "3"]


def test_phases_end_when_their_files_grow_no_more(tmp_path):
    watch = Watch({"first": [tmp_path / "a-*"], "never": [tmp_path / "b"], "second": [tmp_path / "c"]})
    with watch:
        (tmp_path / "a-0").write_text("1")
        time.sleep(0.4)
        (tmp_path / "a-1").write_text("1")
        (tmp_path / "a-0").unlink()
        (tmp_path / "a-0").write_text("12")
        time.sleep(0.3)
        (tmp_path / "c").write_text("1")
        time.sleep(0.3)
        (tmp_path / "a-0").unlink()
        time.sleep(0.3)
    found = watch.seconds()
    assert list(found) == ["first", "second"]
    assert 0.35 < found["first"] < 0.7 and 0.2 < found["second"] < 0.6


def test_seconds_per_file_are_those_after_the_first(tmp_path):
    watch = Watch({"many": [tmp_path / "*"], "none": [tmp_path / "no" / "*"]})
    for number in range(4):
        (tmp_path / str(number)).write_text("1")
        watch.look()
        time.sleep(0.1 if number else 0.3)  # the first is another's time
    assert watch.seconds_per_file() == {"many": pytest.approx((0.3 + 0.1 + 0.1) / 3, abs=0.05)}
    (tmp_path / "3").unlink()
    watch.look()
    assert watch.seconds_per_file() == {"many": pytest.approx((0.3 + 0.1 + 0.1) / 3, abs=0.05)}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--device", "cuda:1"), "--device cuda:1: cpu or cuda"),
        (("--num-processes", 1), "2 or more"),
        (("--only", "speed"), "--only speed: parts are eval, quantize"),
        (("--metrics", "wer,speed"), "timings are never equal"),
    ],
)
def test_wrong_words(tmp_path, capsys, more, text):
    with pytest.raises(SystemExit, match="2"):
        two_gpus.main(words(tmp_path, *more))
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
