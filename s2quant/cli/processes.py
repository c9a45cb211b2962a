"""`--processes N`: a command in several processes of this machine, which share its work.

They are told what `accelerate launch` and torchrun tell theirs (`s2quant.evaluate.ranks` reads it), so those work as
well, and are what several machines need. This starts without importing torch, which takes them seconds before any
process begins; cores are shared out; and what goes wrong is said once.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from s2quant.errors import UserError

# A module of this process's own paths: `python -m` would put the current folder before them.
PROGRAM = "import sys; sys.path[:] = {paths!r}; from s2quant.cli import main; sys.exit(main())"
GRACE_S = 20.0  # for the other processes to end by themselves, when one has failed or the user has interrupted
FORWARD_S = 2.0  # after an interrupt, until those are told that still run: a terminal tells all of them itself
KILL_S = 10.0  # for those that are told to end
POLL_S = 0.05
LAST_BYTES = 20_000  # of what a process wrote
SHOW_CURSOR = "\x1b[?25h"
INTERRUPTED = 128 + signal.SIGINT  # the exit status


def add_processes(command: argparse.ArgumentParser) -> None:
    """Add --processes.

    Args:
        command: The command's parser.
    """
    command.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="share the work among N processes; on GPUs each has one of its own, and results are those of one process, "
        "as they are on a CPU with as many threads a process (OMP_NUM_THREADS)",
    )  # fmt: skip


def are_wanted(options: argparse.Namespace) -> bool:
    """Tell whether a command is to be started in several processes, of which this is none yet.

    Args:
        options: The command's; --processes is only known to some.

    Returns:
        False where a launcher has started as many already, and where there is no work to share.

    Raises:
        UserError: The number is none, more than the cores are, not a launcher's, or the processes would have one GPU.
    """
    count, device = getattr(options, "processes", 1), getattr(options, "device", "cpu")
    if count < 1:
        raise UserError(f"--processes {count}", "a positive number", "correct it")
    if count == 1 or getattr(options, "plan", False):
        return False
    if device == "cpu" and count > max(2, _num_cores()):
        raise UserError(
            f"--processes {count} on {_num_cores()} cores",
            "cores for every process",
            "start fewer: each holds a model, too",
        )
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if launched not in (1, count):
        raise UserError(
            f"--processes {count} in one of {launched} processes of a launcher",
            "one of the two",
            "leave --processes out, or start s2quant without the launcher",
        )
    if device.startswith("cuda:"):
        raise UserError(
            f"--processes {count} on {device}",
            "a GPU for each process",
            "say --device cuda: each process takes the next one (CUDA_VISIBLE_DEVICES chooses which there are)",
        )
    return launched == 1


def run_processes(count: int, words: Sequence[str]) -> int:
    """Run a command in several processes and wait for all.

    Only the first has this process's input and writes to its stderr. What another one wrote is shown when it failed
    in another way than the first, or by what is no message of ours.

    Args:
        count: Their number.
        words: The words after `s2quant`.

    Returns:
        The exit status of the one that was first seen to have failed, 128 and more for a signal; 0: none did.

    Raises:
        KeyboardInterrupt: The user interrupted, and the first of them has not said so.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s2quant-")))
        group = _Group()
        told = _Told()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, told.take))
        stack.callback(group.end)
        environment = os.environ | _shared_environment(count)
        for rank in range(count):
            log = folder / f"{rank}.txt"
            group.start(words, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log if rank else None)
        failed = _wait(group.processes, told)
        statuses = [process.poll() for process in group.processes]  # of those that ended by themselves
        group.end()
        is_stopped = told.end is not None or told.interrupts  # what they say of that is no news
        for sentence in [] if is_stopped else _news(statuses, folder):
            print(sentence, file=sys.stderr)
        if statuses[0] is None and sys.stderr.isatty():
            print(SHOW_CURSOR, end="", file=sys.stderr)  # which a bar had hidden
    if told.end is not None:
        return 128 + told.end
    if told.interrupts and any(status != 0 for status in statuses) and statuses[0] != INTERRUPTED:
        raise KeyboardInterrupt
    status = 0 if failed is None else statuses[failed]
    assert status is not None  # only what a signal or a failure has cut short has none
    return status if status >= 0 else 128 - status


@dataclass(kw_only=True)
class _Told:
    """Signals that this process got: noted, so that none comes between a process's start and its being known."""

    end: int | None = None
    interrupts: list[float] = field(default_factory=list)

    def take(self, number: int, frame: FrameType | None) -> None:
        """Note one."""
        if number == signal.SIGINT:
            self.interrupts.append(time.monotonic())
        else:
            self.end = number


class _Group:
    """The processes."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, words: Sequence[str], environment: Mapping[str, str], log: Path | None) -> None:
        """Start one; its stderr goes to the log, if there is one, and then it has no input either."""
        stdin, stderr = None, None
        if log is not None:
            stdin, stderr = subprocess.DEVNULL, log.open("wb")
        try:
            process = subprocess.Popen([*command(), *words], env=environment, stdin=stdin, stderr=stderr)
        finally:
            if stderr is not None:
                stderr.close()  # the process has its own
        self.processes.append(process)

    def end(self) -> None:
        """End those that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + KILL_S
        for process in self.processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def command() -> list[str]:
    """Compose what starts s2quant as this process was, but for its words."""
    return [sys.executable, "-P", "-c", PROGRAM.format(paths=sys.path)]


def _shared_environment(count: int) -> Mapping[str, str]:
    """Compose what all processes are told alike."""
    return {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, _num_cores() // count)),
    }


def _num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait(processes: Sequence[subprocess.Popen[bytes]], told: _Told) -> int | None:
    """Wait for all, or GRACE_S longer than for the first that fails; give the number of that one."""
    failed: int | None = None
    until, forwarded = float("inf"), False
    while told.end is None and time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(POLL_S)
        now = time.monotonic()
        if failed is None:
            failed = next((rank for rank, process in enumerate(processes) if process.poll()), None)
            until = until if failed is None else min(until, now + GRACE_S)
        if told.interrupts:
            until = min(until, told.interrupts[0] + GRACE_S)
            if not forwarded and now > told.interrupts[0] + FORWARD_S:
                forwarded = True
                for process in processes:
                    if process.poll() is None:
                        process.send_signal(signal.SIGINT)
        if len(told.interrupts) > 1:  # the user is in a hurry
            break
    if failed is None:  # the last one
        failed = next((rank for rank, process in enumerate(processes) if process.poll()), None)
    return failed


def _news(statuses: Sequence[int | None], folder: Path) -> list[str]:
    """Say what the first process has not said, about processes that failed by themselves."""
    found: list[str] = []
    for rank, status in enumerate(statuses):
        who = f"process {rank} of {len(statuses)}"
        if status is None or status == 0:
            continue
        if status < 0:
            found.append(f"{who} was ended by {signal.Signals(-status).name}")
        if rank == 0:
            continue
        said = (folder / f"{rank}.txt").read_bytes()[-LAST_BYTES:].decode("utf-8", errors="replace").strip()
        is_known = status == statuses[0] and "Traceback" not in said
        if said and not is_known and not any(said in other for other in found):
            found.append(f"{who} (exit status {status}):\n{said}")
    return found


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
