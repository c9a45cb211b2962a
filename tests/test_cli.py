"""The command line: exit statuses, what goes to which stream, interruption; whole processes where that matters."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from folder_cases import REPOSITORY, SINGLE, link_copy, listing

from s2quant import __version__, demo
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.cli import main
from s2quant.errors import VerificationError
from s2quant.export import quantized, random
from s2quant.export.random import s2_pro_config, tiny_config
from s2quant.export.verify import inspect_folder
from s2quant.records import folder_hashes

RECIPE = REPOSITORY / "recipes" / "tiny-w4a16.yaml"
COMMANDS = (
    "quantize", "sensitivity", "search", "random", "speak", "inspect", "export", "eval", "report", "bench", "compare",
    "publish", "demo",
)  # fmt: skip


def process(arguments: Sequence[str], **more: object) -> subprocess.Popen[bytes]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background jobs
    return subprocess.Popen([sys.executable, "-m", "s2quant.cli", *arguments], env=environment, **pipes)  # type: ignore[call-overload,no-any-return]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# ---- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = "import sys, s2quant.cli as c\ntry: c.main(sys.argv[1:])\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: s2quant") or done.stdout == f"s2quant {__version__}\n"
    heavy = {"torch", "numpy", "safetensors", "transformers", "gptqmodel", "yaml", "rich", "jinja2", "soundfile"}
    assert heavy & set(done.stderr.split()) == set()


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(5):  # the best of a few: other work on the machine only adds
        started = time.perf_counter()
        process(["--help"]).communicate()
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {name}\s", text, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frobnicate"],
        ["quantize"],
        ["quantize", "r.yaml"],
        ["random", "--out", "x"],
        ["random", "--size", "tiny", "--config", "c.json", "--out", "x"],
        ["random", "--size", "huge", "--out", "x"],
        ["export", "x", "--profile", "gguf", "--out", "y"],
        ["speak", "x", "--model", "y"],
        ["speak", "x", "--model", "y", "--out", "z", "--seed", "one"],
    ],
)
def test_words_that_are_no_command(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "usage: s2quant" in printed.err


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_the_form_of_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path / "absent")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"s2quant inspect: error\ngot: {tmp_path / 'absent'} is not a folder\n"
        "expected: a checkpoint folder (config.json, *.safetensors)\ndo: check the path\n"
    )


@pytest.mark.parametrize(
    ("failure", "status", "text"),
    [
        (VerificationError("out", ["a differs"]), 1, "s2quant random: failed\nout: 1 fault(s)\n  a differs\n"),
        (KeyboardInterrupt(), 130, "s2quant random: interrupted\n"),
        (MemoryError(), 2, "got: out of memory\nexpected: enough memory"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 5 GiB.\nmore"),
            2,
            "got: CUDA out of memory. Tried to all",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 bytes"),
            2,
            "got: DefaultCPUAllocator: can't alloc",
        ),
        (
            PermissionError(13, "Permission denied", "/x/y"),
            2,
            "got: /x/y: Permission denied\nexpected: a file that can",
        ),
    ],
)
def test_status_of_every_kind_of_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: BaseException, status: int, text: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(random, "write_random", fail)
    assert main(["random", "--size", "tiny", "--out", "x"]) == status
    printed = capsys.readouterr()
    assert text in printed.err
    assert printed.out == ""


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(random, "write_random", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["random", "--size", "tiny", "--out", "x"])


def test_a_reader_that_goes_away(tiny_folder: Path) -> None:
    running = process(["inspect", str(tiny_folder), "--headers"])
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    errors = running.stderr.read()
    assert running.wait() == 1
    assert errors == b""


# ---- random, inspect, plan, export ----------------------------------------------------------------------------------


def test_random_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tiny_config()
    raw["audio_decoder_config"]["n_layer"] = 1
    (tmp_path / "c.json").write_text(json.dumps(raw), "utf-8")
    assert main(["random", "--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "a"), "--seed", "7"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}: random weights, seed 7\n"
    assert open_checkpoint(tmp_path / "a").config.fast.n_layer == 1
    assert main(["random", "--config", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 2  # a folder is no file
    assert "Is a directory" in capsys.readouterr().err


def test_random_of_the_tiny_size(tmp_path: Path, tiny_folder: Path) -> None:
    assert main(["random", "--size", "tiny", "--out", str(tmp_path / "a"), "--quiet"]) == 0
    assert folder_hashes(tmp_path / "a") == folder_hashes(tiny_folder)


def test_inspect(tiny_quantized: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tiny_quantized, tiny_folder):
        assert main(["inspect", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == inspect_folder(folder).to_json()
    assert main(["inspect", str(tiny_quantized)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "sound"
    assert lines[-2] == "17 linears quantized, 14 dense; 107 tensors, 14,661,120 bytes"
    assert sum("4 bit g32" in line for line in lines) == 17
    assert sum(line.startswith("text_model.") or line.startswith("audio_decoder.") for line in lines) == len(lines) - 2


def test_inspect_of_a_damaged_folder(tiny_quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = link_copy(tiny_quantized, tmp_path / "copy")
    (folder / "codec.pth").unlink()
    (folder / SINGLE).unlink()
    assert main(["inspect", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "FAULT neither" in out
    assert "codec.pth" in out
    assert "sound" not in out
    assert main(["inspect", str(folder), "--json"]) == 1
    table = json.loads(capsys.readouterr().out)
    assert (table["modules"], table["tensors"]) == ([], 0)
    assert len(table["faults"]) == 2


def test_plan_of_the_release_needs_only_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(s2_pro_config()), "utf-8")
    words = ["quantize", str(REPOSITORY / "recipes" / "s2-pro-w4a16.yaml"), "--model", str(tmp_path), "--plan"]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["quantized"], plan["dense"], plan["tensors"]) == (171, 30, 871)
    assert (plan["tensor_bytes"], plan["dense_tensor_bytes"]) == (4_238_063_616, 9_123_704_832)
    modules = {module["name"]: module for module in plan["modules"]}
    assert len(modules) == 358
    layer = "text_model.model.layers"
    sizes = {
        f"{layer}.0.attention.wqkv": 9_103_360,
        f"{layer}.0.attention.wo": 6_078_464,
        f"{layer}.0.feed_forward.w1": 14_407_680,
        f"{layer}.0.feed_forward.w2": 14_436_352,
    }
    for name, size in sizes.items():
        facts = {"method": "gptq", "bits": 4, "group_size": 32, "bytes": size}
        assert modules[name].items() >= facts.items()
    assert (
        modules[f"{layer}.1.feed_forward.w2"].items() >= {"method": "keep", "bits": None, "bytes": 49_807_360}.items()
    )
    assert sum(module["bytes"] for module in plan["modules"] if module["method"] == "gptq") == 1_990_395_904
    assert main(words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("171 linears quantized, 30 kept; 871 tensors, 4,238,063,616 bytes, 46.5 % of 9,123,704,832")
    assert listing(tmp_path) == {"config.json"}


def test_export(tiny_quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for profile in ("native", "bf16"):
        out = tmp_path / profile
        assert main(["export", str(tiny_quantized), "--profile", profile, "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}: profile {profile}, verified\n"
        assert inspect_folder(out).faults == ()


# ---- progress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_on_stderr_of_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    words = ["random", "--size", "tiny", "--out", str(tmp_path / "a")]
    assert main([*words, "--quiet"] if quiet else words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}: random weights, seed 0\n"
    assert ("drawing weights" in screen.getvalue()) is not quiet
    assert not quiet or screen.getvalue() == ""


def test_a_pipe_shows_no_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["random", "--size", "tiny", "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().err == ""


def test_demo_reports_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda out, report: [f"made {out}", "done"])
    assert main(["demo", "--out", str(tmp_path / "d")]) == 0
    assert capsys.readouterr().out == f"made {tmp_path / 'd'}\ndone\n"


# ---- speak ----------------------------------------------------------------------------------------------------------

HELLO = ["speak", "Hello there.", "--seed", "1", "--max-frames", "12"]


def test_speak_to_a_file(tiny_quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wav, codes = tmp_path / "x.wav", tmp_path / "x.npy"
    words = [*HELLO, "--model", str(tiny_quantized), "--out", str(wav)]
    assert main([*words, "--codes-out", str(codes), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    frames = np.load(codes)
    assert (frames.dtype, frames.shape) == (np.int64, (10, figures["num_frames"]))
    assert 0 < figures["num_frames"] <= 12
    with wave.open(str(wav)) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, 44100)
        assert sound.getnframes() == figures["num_frames"] * 2048
    assert figures["audio_s"] == pytest.approx(figures["num_frames"] * 2048 / 44100)
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    assert f"{wav}: {figures['audio_s']:.2f} s of sound, {figures['num_frames']} frames" in capsys.readouterr().out
    assert listing(tmp_path) == {"x.wav", "x.npy"}


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_speak_raw_sound_to_stdout(tiny_folder: Path, tmp_path: Path, stream: list[str]) -> None:
    """Nothing but sound is on stdout, the same as in the file; figures go to stderr; the text comes from stdin."""
    wav = tmp_path / "x.wav"
    assert main([*HELLO, "--model", str(tiny_folder), "--out", str(wav)]) == 0
    words = ["speak", "-", *HELLO[2:], "--model", str(tiny_folder), "--out", "-", "--json", *stream]
    sound, errors = process(words, stdin=subprocess.PIPE).communicate(b"Hello there.")
    with wave.open(str(wav)) as file:
        expected = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    got = np.frombuffer(sound, "<i2")
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= 1  # other chunks may round another way
    assert json.loads(errors)["num_frames"] * 2048 == len(got)


def test_speak_text_from_stdin_that_is_not_utf8(tiny_folder: Path, tmp_path: Path) -> None:
    for encoding in ("utf-8:strict", "utf-8:surrogateescape"):
        words = ["speak", "-", "--model", str(tiny_folder), "--out", str(tmp_path / "x.wav")]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": encoding}
        running = [sys.executable, "-m", "s2quant.cli", *words]
        done = subprocess.run(running, input=b"ab\xff", env=environment, capture_output=True, check=False)
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr
        assert b"expected: UTF-8 text" in done.stderr or b"expected: text in valid Unicode" in done.stderr
    assert listing(tmp_path) == set()


def test_a_text_that_is_not_spoken_whole_is_told(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sound so far is kept, but nobody takes it for the whole text."""
    text = " ".join(f"This is sentence number {n}, and it goes on for a while." for n in range(60))
    words = ["speak", text, "--model", str(tiny_folder), "--out", str(tmp_path / "x.wav"), "--max-frames", "6"]
    assert main([*words, "--split-sentences", "--seed", "1"]) == 1
    printed = capsys.readouterr()
    assert "stopped by full" in printed.out
    assert "the rest was not spoken" in printed.err
    assert (tmp_path / "x.wav").exists()


# ---- quantize -------------------------------------------------------------------------------------------------------


def test_quantize_passes_its_options_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr(quantized, "quantize_checkpoint", lambda options, report: seen.append(options) or [{"a": 1}])
    words = ["quantize", str(RECIPE), "--model", "m", "--out", "o"]
    assert main([*words, "--sequences", "3", "--slots", "2", "--resume", "--calibration", "c", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": "o", "modules": [{"a": 1}]}
    options = seen[0]
    assert (options.model, options.out, options.calibration) == (Path("m"), Path("o"), Path("c"))
    assert (options.num_sequences, options.num_slots, options.resume) == (3, 2, True)
    assert options.eval_folder == REPOSITORY / "eval"  # check_disjoint looks into its `texts`
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("o: 1 linears quantized, verified")


@pytest.mark.parametrize(
    ("there", "hint"),
    [
        (None, "nothing was finished yet"),
        ("o.partial", "what is finished is kept: go on with --resume"),
        ("o", "what is finished is kept: go on with --resume"),
    ],
)
def test_what_an_interrupted_run_has_kept_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, there: str | None, hint: str
) -> None:
    def interrupted(options: object, report: object) -> None:
        if there is not None:
            (tmp_path / there / "stages").mkdir(parents=True)
            (tmp_path / there / "stages" / "x.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized, "quantize_checkpoint", interrupted)
    assert main(["quantize", str(RECIPE), "--model", "m", "--out", str(tmp_path / "o")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"s2quant quantize: interrupted; {hint}"


def test_interrupted_then_resumed(tiny_folder: Path, tiny_quantized: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of the blocks: status 130 and a hint; --resume ends with the bytes of a run in one go."""
    out = tmp_path / "out"
    words = ["quantize", str(RECIPE), "--model", str(tiny_folder), "--out", str(out)]
    running = process(words)
    stages = tmp_path / "out.partial" / "stages"
    deadline = time.monotonic() + 120
    while not list(stages.glob("text_model*.safetensors")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    printed, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert printed == b""
    assert errors.splitlines()[-1] == b"s2quant quantize: interrupted; what is finished is kept: go on with --resume"
    assert b"Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    kept = {path.name: path.stat().st_mtime_ns for path in stages.iterdir()}
    assert 1 <= len(kept) < 4
    assert all(name.startswith("text_model.model.layers.") for name in kept)  # no file half-written

    again = process(words)
    assert b"go on with --resume" in again.communicate(timeout=120)[1]
    assert again.returncode == 2
    assert {path.name: path.stat().st_mtime_ns for path in stages.iterdir()} == kept

    finished = process([*words, "--resume", "--json"])
    printed, errors = finished.communicate(timeout=120)
    assert finished.returncode == 0, errors
    assert len(json.loads(printed)["modules"]) == 17
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / SINGLE).read_bytes() == (tiny_quantized / SINGLE).read_bytes()
    assert inspect_folder(out).faults == ()


def test_the_words_for_linears_and_dtypes_are_the_runtime_s() -> None:
    from s2quant.cli.common import DTYPES, LINEARS
    from s2quant.runtime import linears, load

    assert linears.BACKENDS == LINEARS
    assert tuple(load.DTYPES) == DTYPES
