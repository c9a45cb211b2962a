"""The large files of a quantized folder, written and hashed in threads while the stages are still being finished."""

from __future__ import annotations

import shutil
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from torch import Tensor

from s2quant.checkpoint.reader import Checkpoint
from s2quant.checkpoint.streamed import Described, StreamedShards, packed_entries
from s2quant.checkpoint.writer import carry_files
from s2quant.files import disk_errors, sha256_file
from s2quant.quantize.plan import Plan
from s2quant.quantize.stages import stage_of
from s2quant.quantize.store import StageStore

POLL_S = 0.02


class _Ended(Exception):
    """Nobody wants the files any more."""


class Follower:
    """Writes the large files of a run's output beside the run. Leaving it early ends and removes what it has written.

    Args:
        out: The final folder, for messages.
        checkpoint: The source.
        plan: Which modules are packed.
        store: The stages, as they are finished.
        max_shard_bytes: Shard limit.
    """

    def __init__(self, out: Path, checkpoint: Checkpoint, plan: Plan, store: StageStore, max_shard_bytes: int) -> None:
        self._out, self._checkpoint, self._plan, self._store = out, checkpoint, plan, store
        self._max_shard_bytes = max_shard_bytes
        self._ended = threading.Event()
        self._thread = ThreadPoolExecutor(2)

    def __enter__(self) -> Follower:
        packings = {}
        for name, planned in self._plan.quantized.items():
            assert planned.settings is not None
            packings[name] = planned.settings.bits, planned.settings.group_size
        described = packed_entries(self._checkpoint, packings)
        with disk_errors(self._out):
            self._folder = Path(tempfile.mkdtemp(prefix=".files.partial-", dir=self._store.folder))
        self._carried: Future[dict[str, str]] = self._thread.submit(self._carry)
        self._shards: Future[dict[str, str]] = self._thread.submit(self._follow, *described)
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        self._ended.set()
        self._thread.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def move(self, folder: Path) -> dict[str, str]:
        """Wait for the files, when all stages are finished, and move them.

        Args:
            folder: Where to, on the same disk.

        Returns:
            sha256 by file name.

        Raises:
            UserError: The disk refused.
        """
        hashes = {**self._carried.result(), **self._shards.result()}
        for name in hashes:
            (self._folder / name).rename(folder / name)
        return hashes

    def _carry(self) -> dict[str, str]:
        with disk_errors(self._out):
            names = carry_files(self._checkpoint.folder, self._folder)
            return {name: sha256_file(self._folder / name) for name in names}

    def _follow(self, kept: list[str], modules: list[str], entries: list[Described]) -> dict[str, str]:
        with disk_errors(self._out), StreamedShards(self._folder, entries, self._max_shard_bytes) as shards:
            for name in kept:
                self._go_on()
                shards.add(name, self._checkpoint.passing(name))
            for module in modules:
                for part, tensor in self._tensors(module).items():
                    self._go_on()
                    shards.add(f"{module}.{part}", tensor)
            return shards.finish()

    def _go_on(self) -> None:
        if self._ended.is_set():
            raise _Ended

    def _tensors(self, module: str) -> dict[str, Tensor]:
        """Wait for a module's stage, and read its packed tensors."""
        stage = stage_of(module)
        while not self._store.has(stage):
            if self._ended.wait(POLL_S):
                raise _Ended
        return self._store.tensors(module, stage)
