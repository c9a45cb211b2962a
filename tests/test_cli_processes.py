"""`--processes N`: what processes are told, and how they end."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.cli import main, processes
from s2quant.cli.processes import are_wanted, run_processes
from s2quant.errors import UserError, is_lost_process
from s2quant.files import read_json, sha256_file

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = REPOSITORY / "recipes" / "tiny-w4a16.yaml"
TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
LAUNCHER = """
import sys
from s2quant.cli import processes
script = sys.argv[1]
processes.command = lambda: [sys.executable, script]
processes.GRACE_S, processes.FORWARD_S = 60.0, 0.5
sys.exit(processes.run_processes(2, sys.argv[2:]))
"""


def starts(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, grace_s: float = 60.0) -> None:
    """Let processes run a script in place of s2quant; it knows its rank, and the words as sys.argv[1:]."""
    script = folder / "script.py"
    head = "import os, signal, sys, time\nfrom pathlib import Path\n"
    script.write_text(f"{head}rank, folder = int(os.environ['RANK']), Path({str(folder)!r})\n{text}", "utf-8")
    monkeypatch.setattr(processes, "command", lambda: [sys.executable, str(script)])
    monkeypatch.setattr(processes, "GRACE_S", grace_s)
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)


def test_what_they_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every one its number, all the same port; cores are shared out; only the first has this process's input."""
    told = f"names = {TOLD}\nfound = [os.environ[name] for name in names] + sys.argv[1:] + [sys.stdin.read()]\n"
    starts(monkeypatch, tmp_path, told + "(folder / f'told-{rank}').write_text('|'.join(found))\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(7)), raising=False)
    with (tmp_path / "input").open("w+") as text:
        text.write("read me")
        text.seek(0)
        kept = os.dup(0)
        os.dup2(text.fileno(), 0)
        try:
            assert run_processes(3, ["a", "b c"]) == 0
        finally:
            os.dup2(kept, 0)
            os.close(kept)
    told_to = [(tmp_path / f"told-{rank}").read_text().split("|") for rank in range(3)]
    ports = {one[5] for one in told_to}
    assert len(ports) == 1
    port = ports.pop()
    assert told_to == [
        [str(rank), str(rank), "3", "3", "127.0.0.1", port, "2", "a", "b c", "" if rank else "read me"]
        for rank in range(3)
    ]


def test_threads_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    starts(monkeypatch, tmp_path, "sys.exit(int(os.environ['OMP_NUM_THREADS']) - 5)\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run_processes(2, []) == 0


def test_an_error_that_all_have_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    starts(monkeypatch, tmp_path, "print('got: nothing', file=sys.stderr)\nsys.exit(2)\n")
    assert run_processes(3, []) == 2
    assert capfd.readouterr().err == "got: nothing\n"


def test_an_error_of_one_is_said_whoever_was_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first process has lost its partner; why is what the other wrote, even with the same exit status."""
    script = """
if rank == 0:
    print("connection closed", file=sys.stderr)
    sys.exit(1)
raise RuntimeError(f"the cause in {rank}")
"""
    starts(monkeypatch, tmp_path, script)
    assert run_processes(3, []) == 1
    said = capfd.readouterr().err
    assert "connection closed" in said and "the cause in 1" in said and "the cause in 2" in said


def test_the_same_from_several_others_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    starts(monkeypatch, tmp_path, "if rank:\n    print('got: no GPU', file=sys.stderr)\n    sys.exit(2)\n")
    assert run_processes(3, []) == 2
    assert capfd.readouterr().err == "process 1 of 3 (exit status 2):\ngot: no GPU\n"


def test_one_that_fails_ends_those_that_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it said is shown, and its status counts, not that of those that were ended."""
    script = "if rank == 1:\n    print('got: no GPU', file=sys.stderr)\n    sys.exit(3)\ntime.sleep(100)\n"
    starts(monkeypatch, tmp_path, script, grace_s=0.2)
    began = time.monotonic()
    assert run_processes(3, []) == 3
    assert time.monotonic() - began < 30
    assert capfd.readouterr().err == "process 1 of 3 (exit status 3):\ngot: no GPU\n"


def test_the_others_may_end_by_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They have something to clear away when one has failed."""
    done = f"open({str(tmp_path / 'done')!r}, 'w')\n"
    starts(monkeypatch, tmp_path, "if rank == 0:\n    sys.exit(4)\ntime.sleep(1.5)\n" + done)
    assert run_processes(2, []) == 4
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, 137), (signal.SIGSEGV, 139)])
def test_a_signal_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
    rank: int,
) -> None:
    starts(monkeypatch, tmp_path, f"if rank == {rank}:\n    os.kill(os.getpid(), {int(number)})\n")
    assert run_processes(2, []) == status
    assert capfd.readouterr().err == f"process {rank} of 2 was ended by {number.name}\n"


def test_one_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deaf = """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "deaf").touch()
    time.sleep(100)
while not (folder / "deaf").exists():
    time.sleep(0.05)
sys.exit(1)
"""
    starts(monkeypatch, tmp_path, deaf, grace_s=0.1)
    monkeypatch.setattr(processes, "KILL_S", 0.3)
    began = time.monotonic()
    assert run_processes(2, []) == 1
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("number", "to_all", "status"),
    [
        (signal.SIGTERM, False, 143),
        (signal.SIGHUP, False, 129),
        (signal.SIGINT, True, 130),  # a terminal's control-C
        (signal.SIGINT, False, 130),  # an editor's stop button: passed on
    ],
)
def test_a_signal_ends_all(tmp_path: Path, number: signal.Signals, to_all: bool, status: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n"
        "try:\n    (folder / os.environ['RANK']).write_text(str(os.getpid()))\n    time.sleep(100)\n"
        "except KeyboardInterrupt:\n    (folder / f'interrupted-{os.environ[\"RANK\"]}').touch()\n    sys.exit(130)\n",
        "utf-8",
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    launch = [sys.executable, "-c", LAUNCHER, str(script), str(tmp_path)]
    launcher = subprocess.Popen(launch, start_new_session=True, env=environment)
    try:
        started = [tmp_path / "0", tmp_path / "1"]
        until = time.monotonic() + 60
        while not all(path.exists() and path.read_text() for path in started) and time.monotonic() < until:
            time.sleep(0.05)
        numbers = [int(path.read_text()) for path in started]
        if to_all:
            os.killpg(launcher.pid, number)
        else:
            launcher.send_signal(number)
        assert launcher.wait(60) == status
        for one in numbers:
            with pytest.raises(ProcessLookupError):
                os.kill(one, 0)
        assert len(list(tmp_path.glob("interrupted-*"))) == (2 if number == signal.SIGINT else 0)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "answer",
    [
        "signal.signal(signal.SIGINT, signal.SIG_IGN)",  # both are ended
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(0 if rank else 1))",  # it lost the other first
    ],
)
def test_an_interrupt_of_which_nobody_spoke_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str
) -> None:
    """By the caller, who says what is kept."""
    script = f"""
{answer}
(folder / f"{{rank}}").touch()
while not all((folder / name).exists() for name in "01"):
    time.sleep(0.05)
if rank:
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(100)
"""
    starts(monkeypatch, tmp_path, script, grace_s=3.0)
    monkeypatch.setattr(processes, "FORWARD_S", 0.1)
    with pytest.raises(KeyboardInterrupt):
        run_processes(2, [])


@pytest.mark.parametrize(
    ("launched", "count", "device", "expected"),
    [
        (None, 1, "cuda:1", False),
        (None, 2, "cuda", True),
        (None, 2, "cpu", True),
        (None, 9, "cuda", True),  # how many GPUs there are is seen when torch is there
        ("2", 2, "cuda", False),  # this is one of the two
        ("2", 1, "cuda", False),  # started by accelerate
        ("1", 2, "cuda", True),  # by torchrun, as one
    ],
)
def test_when_they_are_started(
    monkeypatch: pytest.MonkeyPatch, launched: str | None, count: int, device: str, expected: bool
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(8)), raising=False)
    if launched is not None:
        monkeypatch.setenv("WORLD_SIZE", launched)
        monkeypatch.setenv("RANK", "0")
    assert are_wanted(argparse.Namespace(processes=count, device=device)) is expected


def test_what_has_nothing_to_share_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not are_wanted(argparse.Namespace())
    assert not are_wanted(argparse.Namespace(processes=2, device="cpu", plan=True))
    monkeypatch.setenv("WORLD_SIZE", "2")  # left over: no launcher leaves out RANK
    assert are_wanted(argparse.Namespace(processes=2, device="cpu"))


def test_the_folder_one_is_in_is_not_searched_for_modules(tmp_path: Path) -> None:
    """As where one process is started by the command `s2quant`."""
    (tmp_path / "yaml.py").write_text("raise RuntimeError('not that one')\n")
    (tmp_path / "s2quant").mkdir()
    (tmp_path / "s2quant" / "__init__.py").write_text("raise RuntimeError('not that one')\n")
    done = subprocess.run(
        [*processes.command(), "quantize", "none.yaml", "--model", "none", "--plan"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "none.yaml" in done.stderr


@pytest.mark.parametrize(
    ("launched", "count", "device", "said"),
    [
        (None, 0, "cpu", r"--processes 0(.|\n)*positive"),
        (None, 9, "cpu", r"--processes 9 on 8 cores(.|\n)*start fewer"),
        ("2", 3, "cpu", r"--processes 3 in one of 2(.|\n)*without the launcher"),
        (None, 2, "cuda:1", r"--processes 2 on cuda:1(.|\n)*say --device cuda"),
    ],
)
def test_what_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, launched: str | None, count: int, device: str, said: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(8)), raising=False)
    if launched is not None:
        monkeypatch.setenv("WORLD_SIZE", launched)
        monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=said):
        are_wanted(argparse.Namespace(processes=count, device=device))


def test_two_processes_quantize_as_one(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_folder: Path,
    tiny_quantized: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """And a second time both refuse the folder that is there, with one message."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = ["quantize", str(RECIPE), "--model", str(tiny_folder), "--out", str(tmp_path / "two"), "--processes", "2"]
    assert main(words) == 0
    assert capfd.readouterr().out.count("verified") == 1
    assert read_json(tmp_path / "two" / "manifest.json")["num_processes"] == 2
    assert len(open_checkpoint(tmp_path / "two").entries) == len(open_checkpoint(tiny_quantized).entries)
    for name in ("model.safetensors", "config.json", "s2quant/calibration.safetensors"):
        assert sha256_file(tmp_path / "two" / name) == sha256_file(tiny_quantized / name), name
    assert main(words) == 2
    assert capfd.readouterr().err.count("exists already") == 1


class DistBackendError(RuntimeError):
    """Named as torch's, which it is told by."""


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (
            RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]"),
            True,
        ),
        (DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (DistBackendError("NCCL error: unhandled cuda error, CUDA out of memory"), False),
        (RuntimeError("Connection closed by peer"), False),  # not theirs
        (RuntimeError("gloo: unsupported type"), False),
    ],
)
def test_which_errors_are_of_a_lost_process(error: Exception, is_lost: bool) -> None:
    assert is_lost_process(error) is is_lost


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_is_killed_while_they_quantize(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_folder: Path,
    tiny_quantized: Path,
    capfd: pytest.CaptureFixture[str],
    rank: int,
) -> None:
    """No traceback of the one that lost it, a word of how to go on, and the same bytes then."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    kills = f"""
import os, signal, sys
from s2quant.cli import main
from s2quant.quantize import loop
plain = loop.Stream.advance
def advance(self, stage):
    if os.environ["RANK"] == "{rank}" and stage.name.endswith("1"):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, stage)
loop.Stream.advance = advance
sys.exit(main(sys.argv[1:]))
"""
    out = tmp_path / "two"
    words = ["quantize", str(RECIPE), "--model", str(tiny_folder), "--out", str(out), "--processes", "2"]
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setattr(processes, "command", lambda: [sys.executable, "-c", kills])
        assert main(words) == 137
    said = capfd.readouterr().err
    assert f"process {rank} of 2 was ended by SIGKILL" in said and "go on with --resume" in said
    assert "Traceback" not in said
    assert main([*words, "--resume"]) == 0
    assert sha256_file(out / "model.safetensors") == sha256_file(tiny_quantized / "model.safetensors")
