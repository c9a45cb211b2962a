"""Write the safetensors shards of a checkpoint tensor by tensor, each hashed as it is written.

safetensors writes a file in one go, from tensors that are all there. Here a file begins as soon as sizes are known, and
nothing of it is held: its header comes first (https://github.com/huggingface/safetensors, "Format"), then the tensors
in the order in which they were announced.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from s2quant.checkpoint.layout import expected_tensors
from s2quant.checkpoint.reader import INDEX, SINGLE, SIZES, Checkpoint, Entry
from s2quant.checkpoint.writer import MAX_SHARD_BYTES
from s2quant.files import sha256_file, write_json
from s2quant.packing import packed_shapes

Described = tuple[str, str, tuple[int, ...]]
"""A tensor's name, safetensors' name of its type, and its shape."""
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int32: "I32"}
ALIGNMENT = 8  # of the data, in bytes
MOST_UNHASHED = 4  # tensors that are written and wait to be hashed


def packed_entries(
    checkpoint: Checkpoint, packings: Mapping[str, tuple[int, int]]
) -> tuple[list[str], list[str], list[Described]]:
    """Describe a checkpoint's tensors as they are when some of its linears are packed, in the order of their files.

    Those that are not packed come first: when a model is quantized, they are there from the beginning.

    Args:
        checkpoint: The model, quantized or not.
        packings: bits and group_size of the linears that are packed.

    Returns:
        Names of tensors that are not packed, names of modules that are, and all tensors as `StreamedShards` takes them.
    """
    specs = expected_tensors(checkpoint.config).values()
    is_packed = {spec.name: spec.kind == "linear" and spec.module in packings for spec in specs}
    kept = [spec.name for spec in specs if not is_packed[spec.name]]
    modules = [spec.module for spec in specs if is_packed[spec.name]]
    entries = [(name, checkpoint.entries[name].dtype, checkpoint.entries[name].shape) for name in kept]
    for module in modules:
        rows, columns = checkpoint.modules[module].shape
        for part, (dtype, shape) in packed_shapes(rows, columns, *packings[module], module).items():
            entries.append((f"{module}.{part}", NAMES[dtype], shape))
    return kept, modules, entries


class StreamedShards:
    """Shards of bounded size that are written one tensor after the other. To be left as a context, also on errors.

    Args:
        folder: An existing folder.
        entries: What will be added, in this order. A tensor's place has to be a multiple of its type's size.
        max_shard_bytes: A shard ends before it would grow beyond this.
    """

    def __init__(self, folder: Path, entries: Sequence[Described], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        all_of_them = [(name, Entry(file="", dtype=dtype, shape=shape)) for name, dtype, shape in entries]
        self._shards = _cut(all_of_them, max_shard_bytes)
        self._files = _names(len(self._shards))
        self._waiting = deque(
            (file, name) for file, shard in zip(self._files, self._shards, strict=True) for name in shard
        )
        self._open: tuple[str, BinaryIO] | None = None
        self._digests = {file: hashlib.sha256() for file in self._files}
        self._hasher = ThreadPoolExecutor(1)
        self._unhashed: deque[Future[None]] = deque()

    def __enter__(self) -> StreamedShards:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: object, _traceback: TracebackType | None) -> None:
        try:
            self._close()
        finally:
            self._hasher.shutdown(cancel_futures=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Args:
            name: Its name on disk.
            tensor: The tensor, on the CPU.
        """
        file, expected = self._waiting.popleft()
        entry = self._shards[self._files.index(file)][name] if name == expected else None
        found = (NAMES.get(tensor.dtype), tuple(tensor.shape))
        assert entry is not None and found == (entry.dtype, entry.shape), (name, found, expected, entry)
        if self._open is None or self._open[0] != file:
            self._close()
            self._open = file, (self.folder / file).open("wb")
            self._write(file, _header(self._shards[self._files.index(file)]))
        self._write(file, tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def finish(self) -> dict[str, str]:
        """Write the index, if there are several shards.

        Returns:
            sha256 by file name, of the shards and the index.
        """
        assert not self._waiting, f"{len(self._waiting)} tensors are missing"
        self._close()
        while self._unhashed:
            self._unhashed.popleft().result()
        found = {file: digest.hexdigest() for file, digest in self._digests.items()}
        if len(self._files) > 1:
            entries = [entry for shard in self._shards for entry in shard.values()]
            sizes = {"total_parameters": sum(_count(entry) for entry in entries)}
            sizes["total_size"] = sum(entry.num_bytes for entry in entries)
            pairs = zip(self._files, self._shards, strict=True)
            weight_map = {name: file for file, shard in pairs for name in shard}
            write_json(self.folder / INDEX, {"metadata": sizes, "weight_map": weight_map})
            found[INDEX] = sha256_file(self.folder / INDEX)
        return found

    def _write(self, file: str, data: Any) -> None:
        """Write bytes behind those before, and have them hashed meanwhile."""
        assert self._open is not None
        if len(self._unhashed) == MOST_UNHASHED:
            self._unhashed.popleft().result()
        self._unhashed.append(self._hasher.submit(self._digests[file].update, data))
        self._open[1].write(data)

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def _cut(entries: Sequence[tuple[str, Entry]], max_shard_bytes: int) -> list[dict[str, Entry]]:
    """Cut tensors into shards, in order."""
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        assert all(name not in shard for shard in shards), name
        assert size % SIZES[entry.dtype] == 0, f"{name} would begin at byte {size}, with a type of {entry.dtype}"
        shards[-1][name] = entry
        size += entry.num_bytes
    return shards


def _names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def _header(shard: dict[str, Entry]) -> bytes:
    """Describe the tensors of a shard, in the file's order."""
    header = dict(_described(shard))
    data = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode("utf-8")
    data += b" " * (-len(data) % ALIGNMENT)
    return len(data).to_bytes(8, "little") + data


def _described(shard: dict[str, Entry]) -> Iterator[tuple[str, dict[str, Any]]]:
    end = 0
    for name, entry in shard.items():
        start, end = end, end + entry.num_bytes
        yield name, {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}


def _count(entry: Entry) -> int:
    return entry.num_bytes // SIZES[entry.dtype]
