"""Checkpoint folders for tests, changed by hand with safetensors' and json's own writers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WQKV = "text_model.model.layers.0.attention.wqkv"
W2 = "text_model.model.layers.0.feed_forward.w2"
NORM = "text_model.model.norm.weight"


def link_copy(source: Path, target: Path) -> Path:
    """Copy a folder by hard links; change its files with the functions below only, they never write in place."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def replace_bytes(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None], name: str = SINGLE) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    (folder / name).unlink()
    save_file(tensors, folder / name)


def change_json(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "config.json") -> None:
    table = json.loads((folder / name).read_text("utf-8"))
    change(table)
    replace_bytes(folder / name, json.dumps(table).encode())


def shard(folder: Path, num_shards: int = 3) -> dict[str, str]:
    """Cut model.safetensors into shards with an index; gives the weight map."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {}
    for number in range(num_shards):
        names = sorted(tensors)[number::num_shards]
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def to_v2(tensors: dict[str, Tensor]) -> None:
    """Store zeros as they are, not minus one, and scales as bf16 (rounded)."""
    for name in tensors:
        if name.endswith(".qzeros"):
            assert bool((tensors[name] == 0x77777777).all())
            tensors[name] = tensors[name] + 0x11111111
        if name.endswith(".scales"):
            tensors[name] = tensors[name].to(torch.bfloat16)


def listing(folder: Path) -> set[str]:
    """Everything below a folder, hidden names too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
