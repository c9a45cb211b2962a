"""Shards, index, files carried over; what is written is read by safetensors itself."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from folder_cases import INDEX, SINGLE
from safetensors import safe_open
from safetensors.torch import load_file

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.checkpoint.writer import CARRIED, ShardWriter, carry_files, check_carried
from s2quant.errors import UserError
from s2quant.export.random import tiny_config, write_random
from s2quant.files import atomic_folder

KILO = {f"t{n}": torch.full((250,), float(n)) for n in range(10)}  # 1000 bytes each


def write(folder: Path, limit: int) -> ShardWriter:
    writer = ShardWriter(folder, max_shard_bytes=limit)
    for name, tensor in KILO.items():
        writer.add(name, tensor)
    writer.finish()
    return writer


def test_one_shard(tmp_path: Path) -> None:
    writer = write(tmp_path, 10_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SINGLE]
    assert (writer.num_tensors, writer.num_parameters, writer.num_bytes) == (10, 2500, 10_000)
    tensors = load_file(tmp_path / SINGLE)
    assert all(torch.equal(tensors[name], KILO[name]) for name in KILO)
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("limit", "counts"),
    [(9_999, [9, 1]), (4_000, [4, 4, 2]), (3_999, [3, 3, 3, 1]), (1_000, [1] * 10), (10, [1] * 10)],
)
def test_cut_at_the_limit(tmp_path: Path, limit: int, counts: list[int]) -> None:
    write(tmp_path, limit)
    index = json.loads((tmp_path / INDEX).read_text("utf-8"))
    assert index["metadata"] == {"total_parameters": 2500, "total_size": 10_000}
    files = [f"model-{n + 1:05d}-of-{len(counts):05d}.safetensors" for n in range(len(counts))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, INDEX])
    assert list(index["weight_map"]) == list(KILO)
    assert list(index["weight_map"].values()) == [
        f for f, count in zip(files, counts, strict=True) for _ in range(count)
    ]
    for file in files:
        tensors = load_file(tmp_path / file)
        assert set(tensors) == {name for name, where in index["weight_map"].items() if where == file}
        assert all(torch.equal(tensors[name], KILO[name]) for name in tensors)


def test_transposed_and_sliced_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    writer = ShardWriter(tmp_path)
    writer.add("t", base.T)
    writer.add("s", base[:, 1])
    writer.finish()
    tensors = load_file(tmp_path / SINGLE)
    assert torch.equal(tensors["t"], base.T)
    assert torch.equal(tensors["s"], base[:, 1])


def test_natural_order_and_total_at_the_tiny_size(tmp_path: Path, tiny_folder: Path) -> None:
    write_random(tiny_config(), tmp_path / "cut", seed=0, max_shard_bytes=4_000_000)
    index = json.loads((tmp_path / "cut" / INDEX).read_text("utf-8"))
    names = list(index["weight_map"])
    assert names[0] == "text_model.model.embeddings.weight"
    assert names[-1] == "audio_decoder.output.weight"
    layers = [name.split(".")[3] for name in names if name.startswith("text_model.model.layers.")]
    assert layers == sorted(layers, key=int)
    whole, cut = open_checkpoint(tiny_folder), open_checkpoint(tmp_path / "cut")
    assert index["metadata"]["total_size"] == sum(entry.num_bytes for entry in whole.entries.values())
    assert index["metadata"]["total_size"] == 2 * index["metadata"]["total_parameters"]
    for name in whole.entries:
        assert torch.equal(whole.tensor(name), cut.tensor(name))
    shards = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    assert len(shards) == len(set(index["weight_map"].values())) > 2


def test_permissions_are_the_users_own(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            write(folder, 4_000)
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text("x")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}


def test_nothing_under_the_final_name_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as folder:
        writer = ShardWriter(folder, max_shard_bytes=2_000)
        for number, (name, tensor) in enumerate(KILO.items()):
            writer.add(name, tensor / (5 - number) if number != 5 else tensor * (1 // 0))
    assert list(tmp_path.iterdir()) == []


def test_carried_byte_for_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    content = {name: bytes(range(256)) + name.encode() + b"\r\n\xff" for name in CARRIED if name != "LICENSE.md"}
    for name, data in (content | {"model.safetensors": b"no", "README.md": b"no", "config.json": b"no"}).items():
        (source / name).write_bytes(data)
    assert set(carry_files(source, target)) == set(content)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == content


def test_files_that_a_checkpoint_needs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError) as error:
        check_carried(tmp_path)
    assert "codec.pth is missing" in error.value.got
    assert "tokenizer_config.json is missing" in error.value.got
    assert "tokenizer.json is missing" not in error.value.got
