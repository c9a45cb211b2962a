"""Write the safetensors shards of a checkpoint folder and carry the other files over.

Shards are cut at a byte limit in the order in which tensors are added; one shard is called `model.safetensors`,
several are numbered and get an index. The caller works inside `files.atomic_folder`, so an unfinished folder
never has its final name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from s2quant.checkpoint.reader import INDEX, SINGLE
from s2quant.errors import UserError, shorten_list
from s2quant.files import write_json

MAX_SHARD_BYTES = 5_000_000_000
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "codec.pth",
    "LICENSE.md",
)
NEEDED = ("tokenizer.json", "tokenizer_config.json", "codec.pth")  # without these a checkpoint cannot speak


class ShardWriter:
    """Collect tensors and write them as shards of bounded size.

    Args:
        folder: An existing folder.
        max_shard_bytes: A shard is closed before it would grow beyond this.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.num_tensors = 0
        self.num_parameters = 0
        self.num_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; it is held until its shard is full.

        Args:
            name: Name on disk.
            tensor: The tensor, any device; copied to the CPU.
        """
        assert name not in self._pending and all(name not in shard for shard in self._shards), name
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self.num_tensors += 1
        self.num_parameters += tensor.numel()
        self.num_bytes += size

    def finish(self) -> None:
        """Write the last shard, give all shards their final names and write the index."""
        self._flush()
        if len(self._shards) == 1:
            (self.folder / _temporary(0)).rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self.folder / _temporary(number)).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        metadata = {"total_parameters": self.num_parameters, "total_size": self.num_bytes}
        write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": weight_map})

    def _flush(self) -> None:
        if not self._pending:
            return
        save_file(self._pending, self.folder / _temporary(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def check_carried(source: Path) -> None:
    """Refuse a folder without the files that a checkpoint made from it will need; nothing is read.

    Args:
        source: A checkpoint folder.

    Raises:
        UserError: Files are missing; all are listed.
    """
    absent = [f"{name} is missing" for name in NEEDED if not (source / name).is_file()]
    if absent:
        raise UserError(
            f"checkpoint {source}:\n{shorten_list(absent)}",
            "the tokenizer and the codec beside the weights: they are carried over",
            "restore the folder from its source",
        )


def carry_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, codec, chat template and licence byte for byte.

    Args:
        source: A checkpoint folder.
        target: An existing folder.

    Returns:
        The names copied; absent optional files are left out.
    """
    names = [name for name in CARRIED if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _temporary(number: int) -> str:
    return f"shard-{number:05d}.partial"
