"""Shards that are written tensor by tensor: what safetensors reads, hashes, limits, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from s2quant.checkpoint.reader import INDEX, SINGLE
from s2quant.checkpoint.streamed import NAMES, StreamedShards
from s2quant.files import read_json, sha256_file

TENSORS = {
    "b.qweight": torch.arange(12, dtype=torch.int32).view(3, 4),
    "a.scales": torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).half(),
    "c.weight": torch.randn(5, 4).T.bfloat16(),  # not contiguous
    "d.bias": torch.randn(7),
}


def write(folder: Path, limit: int = 10**9) -> dict[str, str]:
    folder.mkdir()
    entries = [(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    with StreamedShards(folder, entries, limit) as shards:
        for name, tensor in TENSORS.items():
            shards.add(name, tensor)
        return shards.finish()


def test_safetensors_reads_what_was_added_in_order(tmp_path: Path) -> None:
    hashes = write(tmp_path / "one")
    path = tmp_path / "one" / SINGLE
    assert hashes == {SINGLE: sha256_file(path)}
    found = load_file(path)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert all(found[name].dtype == TENSORS[name].dtype for name in TENSORS)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and list(file.offset_keys()) == list(TENSORS)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0 and data[8:9] == b"{"
    assert data[8 + length :] == b"".join(
        tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in TENSORS.values()
    )


def test_shards_are_cut_at_the_limit(tmp_path: Path) -> None:
    hashes = write(tmp_path / "many", limit=80)  # 48 + 24 bytes, 40 + 28
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(hashes) == sorted([*names, INDEX])
    assert hashes == {path.name: sha256_file(path) for path in (tmp_path / "many").iterdir()}
    index = read_json(tmp_path / "many" / INDEX)
    assert index["metadata"] == {"total_parameters": 51, "total_size": 140}
    assert index["weight_map"] == dict(zip(TENSORS, [names[0]] * 2 + [names[1]] * 2, strict=True))
    assert [list(load_file(tmp_path / "many" / name)) for name in names] == [list(TENSORS)[:2], list(TENSORS)[2:]]


def test_other_tensors_than_announced_are_refused(tmp_path: Path) -> None:
    entries = [("a", "F32", (2,)), ("b", "I32", (1,))]
    for name, tensor in (("b", torch.zeros(1, dtype=torch.int32)), ("a", torch.zeros(3)), ("a", torch.zeros(2).half())):
        with StreamedShards(tmp_path, entries) as shards, pytest.raises(AssertionError):
            shards.add(name, tensor)
    with StreamedShards(tmp_path, entries) as shards:
        shards.add("a", torch.zeros(2))
        with pytest.raises(AssertionError, match="1 tensors are missing"):
            shards.finish()
    with pytest.raises(AssertionError, match="y would begin at byte 2"):
        StreamedShards(tmp_path, [("x", "F16", (1,)), ("y", "I32", (1,))])
    with pytest.raises(AssertionError, match="x"):
        StreamedShards(tmp_path, [("x", "F16", (2,)), ("x", "I32", (1,))])
