"""Several processes of pocketsphinx, which holds Python's lock while it decodes and uses one core.

Every process has a decoder of its own and every clip starts from the same state, so transcripts are those of one
decoder alone, in whatever order clips are heard and by how many processes.
"""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from s2quant.errors import UserError
from s2quant.evaluate import sphinx_worker

Worker = subprocess.Popen[bytes]


class SphinxPool:
    """Processes that listen; they end when the pool is no longer used.

    Args:
        model: The n-gram language model.
        size: Number of processes.
    """

    def __init__(self, model: Path, size: int) -> None:
        words = [sys.executable, "-P", str(Path(sphinx_worker.__file__)), str(model)]
        self.workers = [
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for _ in range(size)
        ]
        self.idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.close = weakref.finalize(self, _end, self.workers)

    def hear(self, clips: Sequence[bytes]) -> list[str]:
        """Write down clips.

        Args:
            clips: 16-bit PCM at 16 kHz each.

        Returns:
            Their transcripts, in order.

        Raises:
            UserError: A process has ended.
        """
        with ThreadPoolExecutor(len(self.workers)) as threads:
            return list(threads.map(self._hear, clips))

    def _hear(self, pcm: bytes) -> str:
        worker = self.idle.get()
        try:
            assert worker.stdin is not None and worker.stdout is not None
            try:
                sphinx_worker.send(worker.stdin, pcm)
                answer = sphinx_worker.receive(worker.stdout)
            except BrokenPipeError:
                answer = None
            if answer is None:
                raise UserError(
                    f"a process of pocketsphinx ended with status {worker.wait()}",
                    "one that listens to the end",
                    "go on with --resume; with too little memory, use fewer processes at a time",
                )
            return answer.decode("utf-8")
        finally:
            self.idle.put(worker)


def _end(workers: Sequence[Worker]) -> None:
    """Let processes end, and wait for them."""
    for worker in workers:
        assert worker.stdin is not None and worker.stdout is not None
        with suppress(BrokenPipeError):  # it has ended
            worker.stdin.close()
    for worker in workers:
        assert worker.stdout is not None
        worker.wait()
        worker.stdout.close()
