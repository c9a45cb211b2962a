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
from pathlib import Path
from types import FrameType

from s2quant.errors import UserError

COMMAND = (sys.executable, "-m", "s2quant.cli")
GRACE_S = 20.0  # for the other processes to end by themselves, when one has failed or the user has interrupted
KILL_S = 10.0  # for those that are told to end
POLL_S = 0.05
LAST_BYTES = 20_000  # of what a process wrote


def add_processes(command: argparse.ArgumentParser) -> None:
    """Add --processes.

    Args:
        command: The command's parser.
    """
    command.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="share the work among N processes, with the same results; on GPUs each has one of its own (1)",
    )  # fmt: skip


def are_wanted(options: argparse.Namespace) -> bool:
    """Tell whether a command is to be started in several processes, of which this is none yet.

    Args:
        options: The command's; --processes is only known to some.

    Returns:
        False where a launcher has started as many already.

    Raises:
        UserError: The number is none, differs from a launcher's, or the processes would have one GPU.
    """
    count, device = getattr(options, "processes", 1), getattr(options, "device", "cpu")
    if count < 1:
        raise UserError(f"--processes {count}", "a positive number", "correct it")
    launched = os.environ.get("WORLD_SIZE")
    if count > 1 and launched is not None and launched != str(count):
        raise UserError(
            f"--processes {count} in one of {launched} processes of a launcher",
            "one of the two",
            "leave --processes out, or start s2quant without the launcher",
        )
    if count > 1 and device.startswith("cuda:"):
        raise UserError(
            f"--processes {count} on {device}",
            "a GPU for each process",
            "say --device cuda: each process takes the next one (CUDA_VISIBLE_DEVICES chooses which there are)",
        )
    return count > 1 and launched is None


def run_processes(count: int, words: Sequence[str]) -> int:
    """Run a command in several processes and wait for all.

    Only the first has this process's input. What the others write to stderr is shown when they failed and the first
    did not fail in the same way; an error that all have is shown once.

    Args:
        count: Their number.
        words: The words after `s2quant`.

    Returns:
        The exit status of the one that failed first; 0: none did.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s2quant-")))
        group: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, group)
        before = signal.signal(signal.SIGTERM, _stop)
        stack.callback(signal.signal, signal.SIGTERM, before)
        port = _free_port()
        logs = [None, *(folder / f"{rank}.txt" for rank in range(1, count))]
        for rank, log in enumerate(logs):
            stderr = None if log is None else stack.enter_context(log.open("wb"))
            group.append(
                subprocess.Popen(
                    [*COMMAND, *words],
                    env=os.environ | _told(rank, count, port),
                    stdin=None if log is None else subprocess.DEVNULL,
                    stderr=stderr,
                )
            )
        failed = _wait(group)
        ended = [process.poll() for process in group]
        _end(group)
        if failed is None:
            return 0
        log, status = logs[failed], ended[failed]
        assert status is not None
        if log is not None and ended[0] != status:
            said = log.read_bytes()[-LAST_BYTES:].decode("utf-8", errors="replace")
            print(f"process {failed} of {count} (exit status {status}):\n{said}", file=sys.stderr)
        return status if status > 0 else 128 - status


def _told(rank: int, count: int, port: int) -> Mapping[str, str]:
    """Compose what a process is told in its environment."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": threads,
        **{name: str(number) for name, number in numbers.items()},
    }


def _wait(group: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all, or GRACE_S longer than for the first that fails; give the number of that one."""
    failed: int | None = None
    until = float("inf")
    while time.monotonic() < until and any(process.poll() is None for process in group):
        try:
            time.sleep(POLL_S)
        except KeyboardInterrupt:  # the terminal has told all
            until = min(until, time.monotonic() + GRACE_S)
        if failed is None:
            failed = next((rank for rank, process in enumerate(group) if process.poll()), None)
            if failed is not None:
                until = min(until, time.monotonic() + GRACE_S)
    if failed is None:  # the last one, or one that an interrupt did not reach
        failed = next((rank for rank, process in enumerate(group) if process.poll() != 0), None)
    return failed


def _end(group: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that still run."""
    for process in group:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + KILL_S
    for process in group:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _stop(number: int, frame: FrameType | None) -> None:
    """Let a signal that would end this process at once end it in order, so that it ends the others."""
    sys.exit(128 + number)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
