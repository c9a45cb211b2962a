"""Commands of s2quant in one process or in several, each within its time, and when the files that they write appeared.

Several processes are started by `accelerate launch` or by `--processes`, as a user starts them. The commands print no
progress when nobody watches, so the seconds of their phases are read from their folders: a phase ends when its files
change no more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = Path(__file__).resolve().parent / "preloaded.py"
LAUNCHERS = ("accelerate", "s2quant")
POLL_S = 0.1
END_S = 40  # of a launcher that is told to end: it waits up to 30 s for its processes before it kills them
LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """How commands are started.

    Args:
        num_processes: Of a command that is shared.
        preload: Libraries of torch operations that every process loads first.
        log: What the commands print is appended to it.
        launcher: Starts several: one of LAUNCHERS.
        profile: Where every process writes what its host did; None: nowhere.
        parts: Where every process writes how long the parts of quantizing took; None: nowhere.
        trace: Where every process writes what its GPU waited for while quantizing; None: nowhere.
    """

    num_processes: int
    preload: Sequence[Path]
    log: Path
    launcher: str = LAUNCHERS[0]
    profile: Path | None = None
    parts: Path | None = None
    trace: Path | None = None

    def command(self, words: Sequence[str], shared: bool) -> list[str]:
        """Compose the command line of `s2quant WORDS`, in one process or shared."""
        program = ["-m", "s2quant.cli"]
        if self.preload or self.profile or self.parts or self.trace:
            watched = {"--profile": self.profile, "--parts": self.parts, "--trace": self.trace}
            before = [word for name, folder in watched.items() if folder for word in (name, str(folder.resolve()))]
            program = [str(PRELOADED), *before, *(str(library.resolve()) for library in self.preload), "--"]
        if not shared:
            return [sys.executable, *program, *words]
        if self.launcher == "s2quant":
            assert program[0] == "-m", "what is watched or preloaded is started by accelerate"
            return [sys.executable, *program, *words, "--processes", str(self.num_processes)]
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(self.num_processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        return [sys.executable, *launch, "--main_process_port", str(free_port()), *program, *words]

    def environment(self) -> dict[str, str]:
        """Give every process the same number of threads, on which results may depend, alone or not."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.num_processes)),
            "GPTQMODEL_DISABLE_PACK_EXT": "1",  # it would compile
            "HF_HUB_OFFLINE": "1",
        }

    def run(
        self,
        words: Sequence[str],
        shared: bool = False,
        limit_s: float = 600,
        phases: Mapping[str, Sequence[Path]] | None = None,
    ) -> dict[str, Any]:
        """Run a command.

        Args:
            words: After `s2quant`.
            shared: Whether by several processes.
            limit_s: Its time; then it is ended, with its processes.
            phases: Patterns of the files that a phase writes, by phase, in order.

        Returns:
            processes, seconds, status (None: out of time), phases_s by phase, per_file_s by phase (from the first of
            its files to the last), and the last lines of what it said if it failed.
        """
        command = self.command(words, shared)
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            begin = log.tell()
            watch = Watch(phases or {})
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )
            with watch:
                status = _wait(process, limit_s)
        found: dict[str, Any] = {
            "processes": self.num_processes if shared else 1,
            "seconds": time.perf_counter() - watch.started,
            "status": status,
            "phases_s": watch.seconds(),
            "per_file_s": watch.seconds_per_file(),
        }
        if status != 0:
            said = self.log.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
            found["said"] = said[-LAST_LINES:]
        return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Wait for a process and what it started; end them when the time is up, or this process is ended itself."""
    try:
        return process.wait(timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            for number, patience in ((signal.SIGTERM, END_S), (signal.SIGKILL, None)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=patience)
                    break


@dataclass
class Watch:
    """Sees when files appear and grow, from another thread.

    Args:
        phases: Patterns by phase; only the last part of a pattern may have wild cards.
    """

    phases: Mapping[str, Sequence[Path]]
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._sizes = dict.fromkeys(self.phases, (0, 0))
        self._first: dict[str, tuple[int, float]] = {}
        self._last: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.look()

    def _look(self) -> None:
        while not self._ended.wait(POLL_S):
            self.look()

    def look(self) -> None:
        """Note what has grown; what is being removed is not news."""
        for name, patterns in self.phases.items():
            sizes = [size for pattern in patterns for size in _sizes(pattern)]
            now = (len(sizes), sum(sizes))
            if now != self._sizes[name] and now[0] >= self._sizes[name][0] and now[1] >= self._sizes[name][1]:
                self._sizes[name] = now
                self._last[name] = time.perf_counter() - self.started
                self._first.setdefault(name, (now[0], self._last[name]))

    def seconds(self) -> dict[str, float]:
        """Give the seconds from the end of one phase to the end of the next; a phase without files is left out."""
        found, before = {}, 0.0
        for name in self.phases:
            if name in self._last:
                found[name] = self._last[name] - before
                before = self._last[name]
        return found

    def seconds_per_file(self) -> dict[str, float]:
        """Give the seconds that each further file of a phase took after the first that was seen."""
        found = {}
        for name, (num_first, first) in self._first.items():
            more = self._sizes[name][0] - num_first
            if more > 0:
                found[name] = (self._last[name] - first) / more
        return found


def _sizes(pattern: Path) -> list[int]:
    found = []
    for path in pattern.parent.glob(pattern.name):
        with contextlib.suppress(OSError):  # it went away
            found.append(path.stat().st_size)
    return found
