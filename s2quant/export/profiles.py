"""Export profiles: the same weights in the layout that another engine reads.

- native: the release's own layout, rewritten from the tensors (v1 zeros, float16 scales, natural order).
- bf16: every quantized linear dequantized to bfloat16 under its original name, so that any engine that speaks the
  original can speak the quantized weights. This is for listening; it saves no memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from s2quant.checkpoint.layout import expected_tensors
from s2quant.checkpoint.reader import Checkpoint, open_checkpoint, scan
from s2quant.checkpoint.writer import ShardWriter, carry_files, check_carried
from s2quant.errors import UserError, VerificationError
from s2quant.export.card import LICENSE_NOTICE
from s2quant.export.config_files import describe_modules, merged_config
from s2quant.export.verify import carried_faults
from s2quant.files import atomic_folder, check_new, read_json, write_json
from s2quant.packing import QuantizedWeight, pack
from s2quant.records import folder_hashes, manifest

Profile = Literal["native", "bf16"]


def export_checkpoint(model: Path, out: Path, profile: Profile) -> None:
    """Write a checkpoint folder in a profile, then open it again and compare every module.

    Args:
        model: A sound checkpoint folder.
        out: The folder to make.
        profile: "native" or "bf16".

    Raises:
        UserError: The folder cannot be used, or the profile is unknown.
        VerificationError: A module read back differs.
    """
    if profile not in _PROFILES:
        raise UserError(f"profile {profile!r}", f"one of {', '.join(_PROFILES)}", "name one of these")
    check_new(out)
    checkpoint = open_checkpoint(model)
    check_carried(model)
    convert = _PROFILES[profile]
    quantization = _quantization(checkpoint) if profile == "native" and checkpoint.is_quantized else None
    with atomic_folder(out) as folder:
        writer = ShardWriter(folder)
        for name, tensor in _tensors(checkpoint, convert):
            writer.add(name, tensor)
        writer.finish()
        carry_files(model, folder)
        write_json(folder / "config.json", merged_config(checkpoint.config.raw, quantization))
        if quantization is not None:
            write_json(folder / "quantize_config.json", quantization)
        (folder / "README.md").write_text(_readme(model.name, profile), encoding="utf-8")
        record = manifest("export", {"model": folder_hashes(model)}, "cpu", None, profile=profile)
        write_json(folder / "manifest.json", record | {"files_sha256": folder_hashes(folder)})
        _verify(folder, checkpoint, convert is _dequantized)


def _quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    """Take over the quantization_config, or make one from the tensors; the format is the one written here."""
    known = checkpoint.config.raw.get("quantization_config")
    path = checkpoint.folder / "quantize_config.json"
    if not isinstance(known, dict):
        known = read_json(path) if path.is_file() else describe_modules(checkpoint.iter_modules())
    return known | {"format": "gptq", "checkpoint_format": "gptq"}


def _packed(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    half = weight if weight.scales.dtype == torch.float16 else _half_scales(module, weight)
    return {f"{module}.{part}": tensor for part, tensor in pack(half).items()}


def _half_scales(module: str, weight: QuantizedWeight) -> QuantizedWeight:
    """Store bf16 scales as float16 where nothing is lost; otherwise keep them, both are 16 bits."""
    half = weight.scales.to(torch.float16)
    return (
        dataclasses.replace(weight, scales=half)
        if bool((half.to(weight.scales.dtype) == weight.scales).all())
        else weight
    )


def _dequantized(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    return {f"{module}.weight": weight.dequantize(torch.bfloat16)}


_PROFILES: dict[str, Callable[[str, QuantizedWeight], dict[str, Tensor]]] = {"native": _packed, "bf16": _dequantized}


def _tensors(
    checkpoint: Checkpoint, convert: Callable[[str, QuantizedWeight], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    for spec in expected_tensors(checkpoint.config).values():
        if spec.name in checkpoint.entries:
            yield spec.name, checkpoint.tensor(spec.name)
            continue
        weight = checkpoint.weight(spec.module)
        assert isinstance(weight, QuantizedWeight)
        yield from convert(spec.module, weight).items()


def _verify(folder: Path, source: Checkpoint, dequantized: bool) -> None:
    """Open the folder just written and compare it with the source: all values, counts, bytes, files carried over."""
    found = scan(folder)
    if found.faults:
        raise VerificationError(str(folder), found.faults)
    written = Checkpoint(found)
    faults = carried_faults(folder, source.folder)
    for name, module in source.modules.items():
        packed = module.bits is not None
        expected = source.dense(name, dtype=torch.bfloat16 if packed and dequantized else torch.float32)
        try:
            same = torch.equal(written.dense(name, dtype=torch.float32), expected.float())
        except UserError as error:
            faults.append(error.got)
            continue
        if not same:
            faults.append(f"{name}: the exported weight differs")
        now = written.modules[name]
        if dequantized:
            num_bytes = math.prod(module.shape) * 2 if packed else module.num_bytes
            good = (now.bits, now.num_bytes) == (None, num_bytes)
        else:
            good = (now.bits, now.group_size, now.num_bytes) == (module.bits, module.group_size, module.num_bytes)
        if not good:
            faults.append(f"{name}: {now.bits} bits, {now.num_bytes:,} bytes, from {module.bits}, {module.num_bytes:,}")
    if faults:
        raise VerificationError(str(folder), faults)


def _readme(name: str, profile: str) -> str:
    what = {
        "native": "GPTQ-packed, in the layout of the original checkpoint.",
        "bf16": "Dequantized to bfloat16 under the original names, so that any engine of the original can load it.",
    }[profile]
    return f"# {name}, profile {profile}\n\n{what}\n\nExported by s2quant.\n\n{LICENSE_NOTICE}\n"
