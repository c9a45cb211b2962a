"""Candidates on disk: one file per unit and bits, with the packed weights and what they do to speech.

The same files are the memory of a run in progress and the finished folder's `candidates/`, so that whatever
combination is found can be put together again, exactly as measured, without quantizing anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from s2quant.errors import UserError
from s2quant.packing import QuantizedWeight
from s2quant.quantize.store import StageStore

FOLDER = "candidates"


def candidate_name(unit: str, bits: int) -> str:
    """Name a candidate.

    Args:
        unit: The unit's name.
        bits: Its bits.

    Returns:
        The name of its file, without the suffix.
    """
    return f"{unit}@{bits}"


def load_record(store: StageStore, unit: str, bits: int) -> dict[str, Any]:
    """Get what was measured of a candidate.

    Args:
        store: Where it is kept.
        unit: The unit's name.
        bits: Its bits.

    Returns:
        The record.

    Raises:
        UserError: The file is corrupt.
    """
    _, records = store.load(candidate_name(unit, bits), {})
    return dict(records[0])


def load_dense(
    store: StageStore, unit: str, modules: tuple[str, ...], bits: int, group_size: int, like: Tensor
) -> dict[str, Tensor]:
    """Get the weights of a candidate, dequantized.

    Args:
        store: Where it is kept.
        unit: The unit's name.
        modules: Its linears.
        bits: Its bits.
        group_size: Its group.
        like: Of the dtype and on the device that are wanted.

    Returns:
        Dense [M, K] by module name.

    Raises:
        UserError: The file is absent or corrupt, or was kept without weights.
    """
    if not store.has(candidate_name(unit, bits)):
        raise UserError(
            f"{store.stages} has no {candidate_name(unit, bits)}",
            "a folder with the quantized candidates",
            "run `s2quant sensitivity` without --no-weights, or leave out --model",
        )
    weights, _ = store.load(candidate_name(unit, bits), dict.fromkeys(modules, (bits, group_size)), like.device)
    return {name: dense_of(weight, like) for name, weight in weights.items()}


def dense_of(weight: QuantizedWeight, like: Tensor) -> Tensor:
    """Dequantize a weight.

    Args:
        weight: The weight.
        like: Of the dtype and on the device that are wanted.

    Returns:
        [M, K].
    """
    return weight.to(like.device).dequantize(like.dtype)


def open_candidates(folder: Path) -> StageStore:
    """Open the candidates of a finished folder.

    Args:
        folder: What `s2quant sensitivity` made.

    Returns:
        The store, for reading.
    """
    store = StageStore(folder)
    store.stages = folder / FOLDER
    return store


def link_candidates(store: StageStore, folder: Path, names: Mapping[str, tuple[int, ...]]) -> None:
    """Put the candidates of a run into the folder that it makes, by hard links where the disk has them.

    Args:
        store: The run's store; kept as it is, so that a run that is killed here can go on.
        folder: The folder in the making.
        names: Bits by unit.
    """
    (folder / FOLDER).mkdir()
    for unit, choices in names.items():
        for bits in choices:
            file = f"{candidate_name(unit, bits)}.safetensors"
            try:
                os.link(store.stages / file, folder / FOLDER / file)
            except OSError:  # a disk without hard links: the bytes are the same
                shutil.copyfile(store.stages / file, folder / FOLDER / file)
