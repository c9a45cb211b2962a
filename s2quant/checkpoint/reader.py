"""Open a checkpoint folder, bf16 or quantized, strictly.

What a module is, is decided by the keys found: `.weight` is dense, `.qweight` is GPTQ-packed; bits and group
size follow from the shapes, v1 or v2 zeros from the nibbles. No list in a JSON file is trusted for that. Every
missing, left-over, misshapen or mistyped key is named in one message. Refused: pickled weights (`model.pth`),
asymmetric zeros, dtypes other than 16- and 32-bit floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.foreign import check_layout
from s2quant.checkpoint.layout import Kind, TensorSpec, expected_tensors
from s2quant.errors import UserError, shorten_list
from s2quant.files import read_json
from s2quant.packing import QuantizedWeight, unpack

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"BF16": 2, "F16": 2, "F32": 4}
SIZES = FLOATS | {"I32": 4, "I64": 8, "I8": 1, "U8": 1, "BOOL": 1, "F64": 8, "I16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
PACKED = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor as a safetensors header describes it.

    Args:
        file: The shard's file name.
        dtype: safetensors' name of the dtype.
        shape: The shape.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * SIZES.get(self.dtype, 1)


@dataclass(frozen=True, kw_only=True)
class Module:
    """One weight-bearing module as found on disk.

    Args:
        name: Name on disk, without suffix.
        kind: "linear", "embedding", "norm" or "bias".
        dtype: dtype of the weight, or of the scales when quantized.
        bits: Bits per weight when quantized, otherwise None.
        group_size: Input channels per scale when quantized, otherwise None.
        num_bytes: Bytes of all its tensors.
        shape: Shape of the dense weight.
    """

    name: str
    kind: Kind
    dtype: str
    bits: int | None
    group_size: int | None
    num_bytes: int
    shape: tuple[int, ...]


@dataclass(kw_only=True)
class Scan:
    """What is in a folder and what is wrong with it; nothing is raised for a damaged checkpoint.

    Args:
        folder: The folder.
        config: Its configuration, if readable.
        entries: Tensors by name.
        modules: Modules recognised.
        faults: One sentence per fault.
    """

    folder: Path
    config: S2Config | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    modules: dict[str, Module] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def scan(folder: Path) -> Scan:
    """Read config, index and safetensors headers of a folder, without loading any tensor.

    Args:
        folder: A checkpoint folder.

    Returns:
        What was found, with every fault.

    Raises:
        UserError: There is no such folder.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder", "a checkpoint folder (config.json, *.safetensors)", "check the path"
        )
    found = Scan(folder=folder)
    try:
        found.config = S2Config.load(folder)
    except UserError as error:
        found.faults.append(error.got)
    _read_headers(found)
    if found.config is not None and found.entries:
        _recognise(found, expected_tensors(found.config))
    return found


def _read_headers(found: Scan) -> None:
    folder = found.folder
    weight_map: dict[str, str] | None = None
    if (folder / INDEX).is_file():
        try:
            table = read_json(folder / INDEX).get("weight_map")
        except UserError as error:
            found.faults.append(error.got)
            return
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            found.faults.append(f"{INDEX}: weight_map is missing or not names to files")
            return
        weight_map = table
        files = sorted(set(table.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        pickled = " (model.pth is not read: convert it to safetensors)" if (folder / "model.pth").exists() else ""
        found.faults.append(f"neither {INDEX} nor {SINGLE} is in {folder}{pickled}")
        return
    readable = []
    for name in files:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            found.faults.append(f"shard {name} is missing")
            continue
        try:
            with safe_open(path, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    part = shard.get_slice(key)
                    if key in found.entries:
                        found.faults.append(f"{key} is in {found.entries[key].file} and in {name}")
                    found.entries[key] = Entry(file=name, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
            readable.append(name)
        except (SafetensorError, OSError) as error:
            found.faults.append(f"shard {name} is truncated or corrupt: {error}")
    if weight_map is not None:
        found.faults += _against_index(found, weight_map, readable)


def _against_index(found: Scan, weight_map: dict[str, str], readable: list[str]) -> list[str]:
    """List keys that are not where the index puts them; shards that cannot be read have their own fault."""
    faults = []
    for key, file in weight_map.items():
        entry = found.entries.get(key)
        if entry is None and file in readable:
            faults.append(f"{key} is in the index but not in {file}")
        elif entry is not None and entry.file != file:
            faults.append(f"{key} is in {entry.file}, but the index puts it in {file}")
    return faults + [
        f"{key} is in {entry.file} but not in the index"
        for key, entry in found.entries.items()
        if key not in weight_map
    ]


def _recognise(found: Scan, expected: dict[str, TensorSpec]) -> None:
    """Sort the entries into modules and note everything that does not fit."""
    left = dict(found.entries)
    for name, spec in expected.items():
        entry = left.pop(name, None)
        packed = {part: left.pop(f"{spec.module}.{part}") for part in PACKED if f"{spec.module}.{part}" in left}
        if spec.kind != "linear" and packed:
            found.faults.append(f"{spec.module} is no linear ({spec.kind}) but has packed tensors {sorted(packed)}")
        elif entry is not None and packed:
            found.faults.append(f"{spec.module} has both .weight and {sorted(packed)}")
        elif entry is not None:
            _dense(found, spec, entry)
        elif packed:
            _quantized(found, spec, packed)
        else:
            found.faults.append(f"{name} is missing")
    found.faults += [f"{name} is left over: no module of this model has it" for name in sorted(left)]


def _dense(found: Scan, spec: TensorSpec, entry: Entry) -> None:
    if entry.shape != spec.shape:
        found.faults.append(f"{spec.name} has shape {list(entry.shape)}, not {list(spec.shape)}")
    if entry.dtype not in FLOATS:
        found.faults.append(f"{spec.name} has dtype {entry.dtype}, not one of {sorted(FLOATS)}")
    name = spec.name if spec.kind == "bias" else spec.module
    found.modules[name] = Module(
        name=name,
        kind=spec.kind,
        dtype=entry.dtype,
        bits=None,
        group_size=None,
        num_bytes=entry.num_bytes,
        shape=spec.shape,
    )


def _quantized(found: Scan, spec: TensorSpec, packed: dict[str, Entry]) -> None:
    absent = [part for part in PACKED if part not in packed]
    if absent:
        found.faults.append(f"{spec.module} is quantized but lacks {', '.join('.' + part for part in absent)}")
        return
    flat = [part for part in ("qweight", "qzeros", "scales") if len(packed[part].shape) != 2]
    if flat:
        found.faults += [f"{spec.module}.{part} has shape {list(packed[part].shape)}, not two sizes" for part in flat]
        return
    out_features, in_features = spec.shape
    rows, groups = packed["qweight"].shape[0], packed["scales"].shape[0]
    bits, rest = divmod(rows * 32, in_features)
    group_size, group_rest = divmod(in_features, groups) if groups else (0, 1)
    faults = []
    if rest or bits not in (2, 3, 4, 8):
        faults.append(
            f"{spec.module}.qweight has {rows} rows, which is no 2-, 3-, 4- or 8-bit packing of {in_features} inputs"
        )
    if group_rest:
        faults.append(f"{spec.module}.scales has {groups} rows, which does not divide {in_features} inputs")
    if not faults:
        want = {
            "qweight": (rows, out_features),
            "qzeros": (groups, out_features * bits // 32),
            "scales": (groups, out_features),
            "g_idx": (in_features,),
        }
        faults += [
            f"{spec.module}.{part} has shape {list(packed[part].shape)}, not {list(want[part])}"
            for part in PACKED
            if packed[part].shape != want[part]
        ]
    dtypes = {"qweight": ("I32",), "qzeros": ("I32",), "g_idx": ("I32",), "scales": ("F16", "BF16")}
    faults += [
        f"{spec.module}.{part} has dtype {packed[part].dtype}, not {' or '.join(dtypes[part])}"
        for part in PACKED
        if packed[part].dtype not in dtypes[part]
    ]
    found.faults += faults
    found.modules[spec.module] = Module(
        name=spec.module,
        kind=spec.kind,
        dtype=packed["scales"].dtype,
        bits=bits,
        group_size=group_size,
        num_bytes=sum(entry.num_bytes for entry in packed.values()),
        shape=spec.shape,
    )


class Checkpoint:
    """A sound checkpoint folder whose tensors are read on demand.

    Args:
        found: A scan without faults.
    """

    def __init__(self, found: Scan) -> None:
        assert found.config is not None and not found.faults
        self.folder = found.folder
        self.config = found.config
        self.entries = found.entries
        self.modules = found.modules
        self._shards: dict[str, Any] = {}

    @property
    def is_quantized(self) -> bool:
        """Whether any module is packed."""
        return any(module.bits is not None for module in self.modules.values())

    def tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor.

        Args:
            name: Name on disk, with its suffix.
            device: Where to put it.

        Returns:
            The tensor in the dtype on disk.
        """
        file = self.entries[name].file
        shard = self._shards.get(file)  # kept here, as another thread may close it
        if shard is None:
            shard = self._shards[file] = safe_open(self.folder / file, framework="pt")
        return shard.get_tensor(name).to(device)

    def passing(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read a tensor that is soon let go, through a mapping that goes with it and not with the whole shard.

        Args:
            name: Name on disk, with its suffix.
            device: Where to put it.

        Returns:
            The tensor in the dtype on disk.
        """
        with safe_open(self.folder / self.entries[name].file, framework="pt") as shard:
            return shard.get_tensor(name).to(device)

    def close(self, file: str | None = None) -> None:
        """Let go of files, and of their pages in memory; they are opened again when they are needed.

        Args:
            file: A shard's name; None means all.
        """
        if file is None:
            self._shards.clear()
        else:
            self._shards.pop(file, None)

    def keys(self, module: str) -> list[str]:
        """List the tensors that a module has on disk.

        Args:
            module: Module name on disk.

        Returns:
            Their names: keys of `entries`.
        """
        info = self.modules[module]
        if info.kind == "bias":
            return [module]
        return [f"{module}.{part}" for part in (PACKED if info.bits is not None else ("weight",))]

    def weight(self, module: str, device: torch.device | str = "cpu") -> Tensor | QuantizedWeight:
        """Read one module's weight.

        Args:
            module: Module name on disk.
            device: Where to put it.

        Returns:
            The dense weight in the dtype on disk, or the unpacked quantized weight.

        Raises:
            UserError: The packed tensors are not a sound symmetric packing, or a dense value is not finite.
        """
        info = self.modules[module]
        if info.bits is None:
            weight = self.tensor(module if info.kind == "bias" else f"{module}.weight", device)
            if not _is_finite(weight):
                bad = int((~torch.isfinite(weight)).sum())
                raise UserError(
                    f"{module} has {bad} NaN or infinite weights", "finite weights", "get the checkpoint again"
                )
            return weight
        assert info.group_size is not None
        packed = {part: self.passing(f"{module}.{part}", device) for part in PACKED}
        return unpack(packed, bits=info.bits, group_size=info.group_size, name=module)

    def dense(self, module: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """Read one module's weight, dequantized if it is packed.

        Args:
            module: Module name on disk.
            device: Where to put it.
            dtype: Wanted dtype; None keeps that on disk (bfloat16 for a packed one).

        Returns:
            The dense weight.

        Raises:
            UserError: As `weight`.
        """
        weight = self.weight(module, device)
        if isinstance(weight, QuantizedWeight):
            return weight.dequantize(dtype or torch.bfloat16)
        return weight if dtype is None else weight.to(dtype)

    def iter_modules(self, prefix: str = "") -> Iterator[Module]:
        """Go through the modules in natural order.

        Args:
            prefix: Only names that start so.

        Yields:
            The modules.
        """
        yield from (module for name, module in self.modules.items() if name.startswith(prefix))


def _is_finite(weight: Tensor) -> bool:
    """Tell whether there is neither NaN nor infinity, without memory of the weight's size."""
    low, high = torch.aminmax(weight)  # NaN if any is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Open a checkpoint folder.

    Args:
        folder: The folder.

    Returns:
        The checkpoint, every key accounted for.

    Raises:
        UserError: The folder is absent or damaged; every fault is listed.
    """
    check_layout(Path(folder))
    found = scan(Path(folder))
    if found.faults:
        raise UserError(
            f"checkpoint {folder}:\n{shorten_list(found.faults)}",
            "every tensor that config.json calls for, and no other",
            "restore the folder from its source; `s2quant inspect` lists every fault",
        )
    return Checkpoint(found)
