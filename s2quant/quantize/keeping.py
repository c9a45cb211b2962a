"""Finished stages are hashed and written while the next one is worked on.

On a GPU that is done on a stream of its own, so that nothing that is being computed waits for a copy to the host.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import torch

from s2quant.packing import QuantizedWeight
from s2quant.quantize.copies import to_host
from s2quant.quantize.store import StageStore

T = TypeVar("T")
NUM_HASHERS = 2  # beside the thread that writes


class Keeper:
    """Hashes and keeps finished stages beside other work. Leaving it waits for what was begun.

    Args:
        store: Where stages are kept; None: this process keeps nothing.
        device: Where the weights are.
    """

    def __init__(self, store: StageStore | None, device: torch.device) -> None:
        self._store, self._device = store, device
        self._hashers, self._writer = ThreadPoolExecutor(NUM_HASHERS), ThreadPoolExecutor(1)
        self._hashes: dict[str, Future[str]] = {}
        self._threads = threading.local()  # one stream each, as a stream's memory is not given to others

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        self._writer.shutdown()
        self._hashers.shutdown()

    def hash(self, name: str, weight: QuantizedWeight) -> None:
        """Begin to hash a weight.

        Args:
            name: Its module.
            weight: Not to be changed any more.
        """
        if self._store is not None:
            self._hashes[name] = self._hashers.submit(self._beside(), weight_sha256, weight)

    def keep(
        self, stage: str, weights: Mapping[str, QuantizedWeight], records: Sequence[Mapping[str, Any]]
    ) -> Future[list[dict[str, Any]]] | None:
        """Begin to write a stage, whose weights have all been given to `hash`.

        Args:
            stage: Its name.
            weights: By module; not to be changed any more.
            records: One per module.

        Returns:
            The records with the weights' hashes, when they are written; None where nothing is kept.
        """
        store, hashes = self._store, self._hashes
        if store is None:
            return None
        self._hashes = {}

        def write() -> list[dict[str, Any]]:
            whole = [{**record, "weight_sha256": hashes[record["module"]].result()} for record in records]
            store.save(stage, weights, whole)
            return whole

        return self._writer.submit(self._beside(), write)

    def _beside(self) -> Callable[..., Any]:
        """Make what runs a function after all that the GPU has been asked for so far, beside all that follows."""
        if self._device.type != "cuda":
            return lambda function, *args: function(*args)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))

        def run(function: Callable[..., T], *args: Any) -> T:
            if not hasattr(self._threads, "stream"):
                self._threads.stream = torch.cuda.Stream(self._device)
            stream = self._threads.stream
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                result = function(*args)
                stream.synchronize()
            return result

        return run


def weight_sha256(weight: QuantizedWeight) -> str:
    """Hash a quantized weight, so that what is read back can be compared with what was made.

    Args:
        weight: The quantized weight.

    Returns:
        sha256 of its tensors, each with its name, type and sizes.
    """
    digest = hashlib.sha256()
    for name, values in weight.tensors.items():
        digest.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
        digest.update(to_host(values).view(torch.uint8).numpy().data)
    return digest.hexdigest()
