"""Compare two checkpoint folders without any audio: what differs, in bytes, bits and weights.

Weights are read module by module, dequantized, and compared a few rows at a time, so memory does not grow with the
model. The error of a module is ||B - A|| / ||A|| over all its weights: 0 means equal values, whatever their storage.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from s2quant.checkpoint.reader import Checkpoint, Module, open_checkpoint
from s2quant.checkpoint.writer import CARRIED
from s2quant.files import sha256_file
from s2quant.packing import QuantizedWeight

ROW_VALUES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ModuleDifference:
    """One module that both folders have.

    Args:
        name: Name on disk.
        storage: How A and B store it, e.g. "BF16" or "4 bit g32".
        num_bytes: Bytes in A and B.
        error: ||B - A|| / ||A||; None when the shapes differ or A is all zeros and B is not.
    """

    name: str
    storage: tuple[str, str]
    num_bytes: tuple[int, int]
    error: float | None

    @property
    def is_same(self) -> bool:
        """Whether storage and values are the same."""
        return self.storage[0] == self.storage[1] and self.error == 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `s2quant compare` prints.

    Args:
        modules: Modules of both, in natural order.
        only: Names of modules in A only and in B only.
        config: Fields of config.json that differ: dotted name, value in A, value in B; None where it is absent.
        files: Other files that differ or are in one folder only.
        num_bytes: Tensor bytes in A and B.
        bits_per_weight: Bits per weight of all linears in A and B, scales and g_idx counted.
    """

    modules: tuple[ModuleDifference, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    config: tuple[tuple[str, Any, Any], ...]
    files: tuple[str, ...]
    num_bytes: tuple[int, int]
    bits_per_weight: tuple[float, float]

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return all(module.is_same for module in self.modules) and not (
            self.only[0] or self.only[1] or self.config or self.files
        )

    def to_json(self) -> dict[str, Any]:
        """Compose the object of `compare --json`.

        Returns:
            Plain values.
        """
        return dataclasses.asdict(self) | {"same": self.is_same}


def compare_folders(
    a: Path, b: Path, report: Callable[[str, int, int], None] = lambda phase, done, total: None
) -> Comparison:
    """Compare two checkpoints.

    Args:
        a: One folder.
        b: The other.
        report: Told of progress.

    Returns:
        All that differs, and each common module's error.

    Raises:
        UserError: A folder is absent or damaged.
    """
    one, other = open_checkpoint(a), open_checkpoint(b)
    common = [name for name in one.modules if name in other.modules]
    modules = []
    for done, name in enumerate(common):
        report("comparing", done, len(common))
        modules.append(_difference(one, other, name))
    return Comparison(
        modules=tuple(modules),
        only=(
            tuple(name for name in one.modules if name not in other.modules),
            tuple(name for name in other.modules if name not in one.modules),
        ),
        config=_config_differences(one.config.raw, other.config.raw),
        files=tuple(name for name in CARRIED if _file_hash(a / name) != _file_hash(b / name)),
        num_bytes=(_num_bytes(one), _num_bytes(other)),
        bits_per_weight=(_bits_per_weight(one), _bits_per_weight(other)),
    )


def _difference(one: Checkpoint, other: Checkpoint, name: str) -> ModuleDifference:
    a, b = one.modules[name], other.modules[name]
    return ModuleDifference(
        name=name,
        storage=(_storage(a), _storage(b)),
        num_bytes=(a.num_bytes, b.num_bytes),
        error=relative_error(one.weight(name), other.weight(name)) if a.shape == b.shape else None,
    )


def relative_error(a: Tensor | QuantizedWeight, b: Tensor | QuantizedWeight) -> float | None:
    """Compute ||B - A|| / ||A|| over all elements.

    Args:
        a: A weight, dense or quantized.
        b: Another of the same shape.

    Returns:
        The error; None when A is all zeros and B is not.
    """
    first, second = _values(a), _values(b)
    step = max(1, ROW_VALUES // max(1, first[0].numel()))
    difference = norm = 0.0
    for start in range(0, first.shape[0], step):
        rows = first[start : start + step].double()
        norm += float(rows.square().sum())
        difference += float((second[start : start + step].double() - rows).square().sum())
    if difference == 0:
        return 0.0
    return math.sqrt(difference / norm) if norm else None


def _values(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def _storage(module: Module) -> str:
    return module.dtype if module.bits is None else f"{module.bits} bit g{module.group_size}"


def _num_bytes(checkpoint: Checkpoint) -> int:
    return sum(entry.num_bytes for entry in checkpoint.entries.values())


def _bits_per_weight(checkpoint: Checkpoint) -> float:
    linears = [module for module in checkpoint.iter_modules() if module.kind == "linear"]
    return 8 * sum(module.num_bytes for module in linears) / sum(math.prod(module.shape) for module in linears)


def _config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    one, other = _flat(a), _flat(b)
    names = list(one) + [name for name in other if name not in one]
    return tuple(
        (name, one.get(name), other.get(name))
        for name in names
        if (name in one) != (name in other) or one[name] != other[name]
    )


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested fields with dots; `dynamic` stays whole because its keys are patterns."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and key != "dynamic":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _file_hash(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None
