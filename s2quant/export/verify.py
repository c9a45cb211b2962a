"""Look at a checkpoint folder again: what is in it and whether it is sound.

`inspect_folder` never raises for a damaged folder; it lists the faults. `verify_quantized` compares a folder just
written with what was made in memory and with the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2quant.checkpoint.foreign import check_layout
from s2quant.checkpoint.reader import Checkpoint, Module, open_checkpoint, scan
from s2quant.checkpoint.writer import CARRIED
from s2quant.codec import load_codec
from s2quant.errors import UserError, VerificationError
from s2quant.export.config_files import merged_config
from s2quant.files import read_json, sha256_file, side_by_side
from s2quant.packing import QuantizedWeight
from s2quant.prompt import Tokenizer
from s2quant.quantize.keeping import weight_sha256
from s2quant.quantize.plan import Plan

CARDS = ("README.md", "NOTICE")  # written or edited on the way to the hub, so no hash of them is kept


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `s2quant inspect` prints.

    Args:
        modules: Every module recognised.
        num_tensors: Tensors in the shards.
        num_bytes: Their bytes.
        faults: What is wrong, one sentence each.
    """

    modules: tuple[Module, ...]
    num_tensors: int
    num_bytes: int
    faults: tuple[str, ...]

    @property
    def num_quantized(self) -> int:
        """Quantized linears."""
        return sum(module.bits is not None for module in self.modules)

    @property
    def num_dense(self) -> int:
        """Linears in floating point."""
        return sum(module.kind == "linear" and module.bits is None for module in self.modules)

    def to_json(self) -> dict[str, Any]:
        """Compose the object of `inspect --json`.

        Returns:
            Plain values.
        """
        return {
            "modules": [
                {
                    "name": module.name,
                    "kind": module.kind,
                    "dtype": module.dtype,
                    "bits": module.bits,
                    "group_size": module.group_size,
                    "bytes": module.num_bytes,
                }
                for module in self.modules
            ],
            "quantized": self.num_quantized,
            "dense": self.num_dense,
            "tensors": self.num_tensors,
            "tensor_bytes": self.num_bytes,
            "faults": list(self.faults),
        }


def inspect_folder(folder: Path, values: bool = True) -> Inspection:
    """Look at a folder, damaged or not.

    Args:
        folder: A checkpoint folder.
        values: Whether to read every tensor and check its values, too.

    Returns:
        What is in it and what is wrong.

    Raises:
        UserError: There is no such folder, or it has the layout of another engine.
    """
    check_layout(folder)
    found = scan(folder)
    faults = list(found.faults)
    if not faults and values:
        checkpoint = Checkpoint(found)
        read = side_by_side(lambda name: _fault_of(lambda: checkpoint.weight(name)), checkpoint.modules)
        faults += chain.from_iterable(read)
    faults += _fault_of(lambda: Tokenizer.load(folder, found.config))
    faults += _fault_of(lambda: load_codec(folder))
    return Inspection(
        modules=tuple(found.modules.values()),
        num_tensors=len(found.entries),
        num_bytes=sum(entry.num_bytes for entry in found.entries.values()),
        faults=tuple(faults),
    )


def hash_faults(record: Mapping[str, Any], hashes: Mapping[str, str]) -> list[str]:
    """Compare a folder's files with what its manifest says of them.

    Args:
        record: The manifest.
        hashes: sha256 of the files that are there.

    Returns:
        One sentence per file that is missing or differs; files that the manifest does not name are let pass.
    """
    known = record.get("files_sha256", {})
    if not isinstance(known, Mapping):
        return ["manifest.json: files_sha256 is no JSON object"]
    faults = []
    for name in sorted(known.keys() - set(CARDS)):
        if name not in hashes:
            faults.append(f"{name} is in manifest.json, but not in the folder")
        elif hashes[name] != known[name]:
            faults.append(f"{name} is not the file that manifest.json has the hash of")
    return faults


def _fault_of(check: Any) -> list[str]:
    try:
        check()
    except UserError as error:
        return [error.got]
    return []


def verify_quantized(
    folder: Path,
    source: Path,
    plan: Plan,
    records: Sequence[Mapping[str, Any]],
    digest: Callable[[Path], str] = sha256_file,
) -> None:
    """Open a folder just written and compare it with what it should be.

    Quantized modules are compared with their records, all others with the source.

    Args:
        folder: The folder.
        source: The checkpoint that was quantized.
        plan: What was planned.
        records: One per quantized module, with the hash of its weight as it was in memory.
        digest: Gives the sha256 of a file of either folder that is carried over.

    Raises:
        UserError: The source cannot be read any more.
        VerificationError: Anything differs; every difference is listed.
    """
    original = open_checkpoint(source)
    found = scan(folder)
    faults = list(found.faults) + _config_faults(folder, original)
    with ThreadPoolExecutor(1) as beside:  # one of the files is large
        carried = beside.submit(carried_faults, folder, source, digest)
        if not found.faults:
            faults += _module_faults(Checkpoint(found), original, plan, records)
        faults += carried.result()
    if faults:
        raise VerificationError(str(folder), faults)


def _module_faults(
    checkpoint: Checkpoint, original: Checkpoint, plan: Plan, records: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Compare every module with its record, or with the source."""
    faults = []
    hashes = {record["module"]: record["weight_sha256"] for record in records}
    if set(hashes) != set(plan.quantized):
        faults.append(f"records of {len(hashes)} modules, {len(plan.quantized)} planned")
    faults += _against_plan(checkpoint, plan)

    def weight_faults(name: str) -> list[str]:
        return _weight_faults(checkpoint, original, name, hashes.get(name))

    return faults + list(chain.from_iterable(side_by_side(weight_faults, checkpoint.modules)))


def _weight_faults(checkpoint: Checkpoint, original: Checkpoint, name: str, expected: str | None) -> list[str]:
    """Compare one module with the hash of what was in memory, or with the source when there is none."""
    try:
        weight = checkpoint.weight(name)
    except UserError as error:
        return [error.got]
    if isinstance(weight, QuantizedWeight):
        same = weight_sha256(weight) == expected
        return [] if same else [f"{name}: quantized weight differs from the one in memory"]
    if expected is not None:
        return [f"{name}: not quantized, but there is a record of it"]
    before = original.weight(name) if name in original.modules else None
    same = isinstance(before, Tensor) and before.dtype == weight.dtype and torch.equal(before, weight)
    return [] if same else [f"{name}: weight differs from the source's"]


def _config_faults(folder: Path, original: Checkpoint) -> list[str]:
    """Compare both JSON files with the source's config.json and with each other."""
    try:
        config, quantization = read_json(folder / "config.json"), read_json(folder / "quantize_config.json")
    except UserError as error:
        return [error.got]
    faults = []
    if merged_config(config, None) != merged_config(original.config.raw, None):
        faults.append("config.json: fields differ from those of the source")
    if config.get("quantization_config") != quantization:
        faults.append("config.json: quantization_config is not the object of quantize_config.json")
    return faults


def carried_faults(folder: Path, source: Path, digest: Callable[[Path], str] = sha256_file) -> list[str]:
    """Compare the files that are carried over byte for byte.

    Args:
        folder: The folder written.
        source: The folder they came from.
        digest: Gives the sha256 of a file of either folder.

    Returns:
        One sentence per file that is missing or differs.
    """
    names = [name for name in CARRIED if (source / name).is_file()]
    paths = [place / name for name in names if (folder / name).is_file() for place in (source, folder)]
    digests = dict(zip(paths, side_by_side(digest, paths), strict=True))
    faults = []
    for name in names:
        if folder / name not in digests:
            faults.append(f"{name} is missing")
        elif digests[source / name] != digests[folder / name]:
            faults.append(f"{name} differs from the one in {source}")
    return faults


def _against_plan(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    faults = []
    num_bytes = sum(entry.num_bytes for entry in checkpoint.entries.values())
    if len(checkpoint.entries) != plan.num_tensors:
        faults.append(f"{len(checkpoint.entries)} tensors, {plan.num_tensors} planned")
    if num_bytes != plan.num_bytes:
        faults.append(f"{num_bytes:,} tensor bytes, {plan.num_bytes:,} planned")
    for planned in plan.modules:
        found = checkpoint.modules.get(planned.name)
        if found is None:
            faults.append(f"{planned.name} is planned, but not in the folder")
            continue
        bits = planned.settings.bits if planned.settings else None
        group_size = planned.settings.group_size if planned.settings else None
        if (found.bits, found.group_size) != (bits, group_size):
            faults.append(f"{planned.name}: {found.bits} bits, group {found.group_size}; planned {bits}, {group_size}")
    return faults
