"""Export profiles: the same weights in the layout that another engine reads.

- native: the release's own layout, rewritten from the tensors (v1 zeros, float16 scales, natural order).
- bf16: every quantized linear dequantized to bfloat16 under its original name, so that any engine that speaks the
  original can speak the quantized weights. This is for listening; it saves no memory.
- vllm-omni: a packed wqkv of the Slow AR is split into q, k and v, and the configuration speaks of vLLM's run-time
  names. s2quant itself does not read this layout.
- sglang-omni: the native tensors, and a configuration that also speaks of its fused gate and up.

Whatever the profile, the folder is opened again and every module compared with the source. The recipe goes along, and
the source's manifest stands in the export's own; the calibration set does not: an engine's downloader would take it for
weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCardData
from safetensors import safe_open
from torch import Tensor

from s2quant.checkpoint.layout import expected_tensors
from s2quant.checkpoint.reader import PACKED, Checkpoint, Module, open_checkpoint, scan
from s2quant.checkpoint.streamed import StreamedShards, packed_entries
from s2quant.checkpoint.writer import ShardWriter, carry_files, check_carried
from s2quant.errors import UserError, VerificationError
from s2quant.export.card import how_made, licence_of
from s2quant.export.config_files import describe_modules, merged_config
from s2quant.export.engines import ENGINES, engine_config, engine_notes, read_packings, split_names
from s2quant.export.quantized import DETAILS
from s2quant.export.tensors import Convert, dequantized, is_split, packed, split
from s2quant.export.verify import carried_faults, hash_faults
from s2quant.files import atomic_folder, check_new, read_json, read_text, sha256_text, write_json
from s2quant.packing import QuantizedWeight, unpack
from s2quant.records import folder_hashes, input_facts, made_by, manifest, read_manifest

Profile = Literal["native", "bf16", "vllm-omni", "sglang-omni"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A profile.

    Args:
        convert: What becomes of a packed module.
        what: One sentence about it.
        weights: How its weights and those of the source go together, for a card that has the source's figures.
    """

    convert: Convert
    what: str
    weights: str


PROFILES: Mapping[str, Layout] = {
    "native": Layout(
        convert=packed,
        what="GPTQ-packed, in the layout of the original checkpoint.",
        weights="the same weights, written anew in the layout of the original checkpoint",
    ),
    "bf16": Layout(
        convert=dequantized,
        what="Dequantized to bfloat16 under the original names, so that any engine of the original can load it.",
        weights="the same weights, here dequantized to bfloat16",
    ),
    "vllm-omni": Layout(
        convert=split,
        what="GPTQ-packed, q, k and v apart, as vllm-omni loads it.",
        weights="the same weights in another layout; vllm-omni itself was not measured",
    ),
    "sglang-omni": Layout(
        convert=packed,
        what="GPTQ-packed under the original names, as sglang-omni loads it.",
        weights="the same weights in another layout; sglang-omni itself was not measured",
    ),
}


def export_checkpoint(model: Path, out: Path, profile: Profile) -> list[str]:
    """Write a checkpoint folder in a profile, then open it again and compare every module.

    Args:
        model: A sound checkpoint folder.
        out: The folder to make.
        profile: A key of PROFILES.

    Returns:
        What the user should know of the engine; sentences.

    Raises:
        UserError: The folder cannot be used, the profile is unknown, or its engine cannot load such a checkpoint.
        VerificationError: A module read back differs.
    """
    if profile not in PROFILES:
        raise UserError(f"profile {profile!r}", f"one of {', '.join(PROFILES)}", "name one of these")
    check_new(out)
    checkpoint = open_checkpoint(model)
    check_carried(model)
    quantization = _quantization(checkpoint, profile)
    notes = engine_notes(profile, quantization or {}) if profile in ENGINES else []
    hashes = folder_hashes(model)
    source, recipe, lost = _origin(model, hashes)
    notes += lost
    with atomic_folder(out) as folder:
        _write_shards(folder, checkpoint, PROFILES[profile].convert)
        carry_files(model, folder)
        write_json(folder / "config.json", merged_config(checkpoint.config.raw, quantization))
        if quantization is not None:
            write_json(folder / "quantize_config.json", quantization)
        made = "" if recipe is None else f"\n{_carry_recipe(recipe, source, folder)}"
        (folder / "README.md").write_text(_readme(model, profile, notes) + made, encoding="utf-8")
        record = manifest("export", {"model": hashes}, "cpu", None, profile=profile, source=source or None)
        write_json(folder / "manifest.json", record | {"files_sha256": folder_hashes(folder)})
        _verify(folder, checkpoint, profile)
    return notes


def _origin(model: Path, hashes: Mapping[str, str]) -> tuple[dict[str, Any], str | None, list[str]]:
    """Read the source's manifest and recipe, neither if they are not those of its files, and what to say of that."""
    try:
        source = read_manifest(model)
    except UserError as error:
        return {}, None, [f"does not say how it was made, as the source's manifest is none of ours: {error.got}"]
    faults = hash_faults(source, hashes)
    if faults:
        return {}, None, [f"does not say how it was made, as the source has changed since: {'; '.join(faults)}"]
    path, known = model / DETAILS / "recipe.yaml", input_facts(made_by(source), "recipe").get("sha256")
    if known is None or not path.is_file():
        return source, None, []
    recipe = read_text(path)
    if sha256_text(recipe) == known:
        return source, recipe, []
    return source, None, ["has no recipe, as that of the source is not the one that its manifest.json has the hash of"]


def _carry_recipe(recipe: str, source: Mapping[str, Any], folder: Path) -> str:
    """Write the recipe into a folder, and give the card's section on it."""
    (folder / DETAILS).mkdir()
    (folder / DETAILS / "recipe.yaml").write_text(recipe, encoding="utf-8")
    facts = input_facts(made_by(source), "recipe")
    more = "what else it was made from, versions, device and seed are in `manifest.json`, under `source`."
    return how_made(str(facts.get("name")), str(facts.get("sha256")), recipe, more)


def _quantization(checkpoint: Checkpoint, profile: Profile) -> dict[str, Any] | None:
    """Take over the quantization_config, or make one from the tensors; the format is the one written here."""
    known = checkpoint.config.raw.get("quantization_config")
    path = checkpoint.folder / "quantize_config.json"
    if profile == "vllm-omni" or profile == "sglang-omni":
        made = engine_config(profile, checkpoint.config, read_packings(checkpoint))
        return made | ({"meta": known["meta"]} if isinstance(known, dict) and "meta" in known else {})
    if profile == "bf16" or not checkpoint.is_quantized:
        return None
    if not isinstance(known, dict):
        known = read_json(path) if path.is_file() else describe_modules(checkpoint.iter_modules())
    return known | {"format": "gptq", "checkpoint_format": "gptq"}


def _write_shards(folder: Path, checkpoint: Checkpoint, convert: Convert) -> None:
    """Write the tensors; those of linears that stay packed under their names as quantizing writes them."""
    packings = {
        module.name: (module.bits, module.group_size)
        for module in checkpoint.modules.values()
        if module.bits is not None and module.group_size is not None
    }
    if convert is not packed or not packings:
        writer = ShardWriter(folder)
        for name, tensor in _tensors(checkpoint, convert):
            writer.add(name, tensor)
        writer.finish()
        return
    with StreamedShards(folder, packed_entries(checkpoint, packings)[2]) as shards:
        for name, tensor in _tensors(checkpoint, convert):
            shards.add(name, tensor)
        shards.finish()


def _tensors(checkpoint: Checkpoint, convert: Convert) -> Iterator[tuple[str, Tensor]]:
    specs = expected_tensors(checkpoint.config).values()
    for spec in sorted(specs, key=lambda spec: spec.name not in checkpoint.entries):  # packed ones at the end
        if spec.name in checkpoint.entries:
            yield spec.name, checkpoint.tensor(spec.name)
            continue
        weight = checkpoint.weight(spec.module)
        assert isinstance(weight, QuantizedWeight)
        yield from convert(spec.module, weight, checkpoint.config).items()


def _verify(folder: Path, source: Checkpoint, profile: Profile) -> None:
    """Open the folder just written and compare it with the source: all values, counts, bytes, files carried over."""
    if profile == "vllm-omni":
        _verify_split(folder, source)
        return
    found = scan(folder)
    if found.faults:
        raise VerificationError(str(folder), found.faults)
    written = Checkpoint(found)
    faults = carried_faults(folder, source.folder)
    is_dense = profile == "bf16"
    for name, module in source.modules.items():
        is_packed = module.bits is not None
        expected = source.dense(name, dtype=torch.bfloat16 if is_packed and is_dense else torch.float32)
        try:
            same = torch.equal(written.dense(name, dtype=torch.float32), expected.float())
        except UserError as error:
            faults.append(error.got)
            continue
        if not same:
            faults.append(f"{name}: the exported weight differs")
        now = written.modules[name]
        if is_dense:
            num_bytes = math.prod(module.shape) * 2 if is_packed else module.num_bytes
            good = (now.bits, now.num_bytes) == (None, num_bytes)
        else:
            good = (now.bits, now.group_size, now.num_bytes) == (module.bits, module.group_size, module.num_bytes)
        if not good:
            faults.append(f"{name}: {now.bits} bits, {now.num_bytes:,} bytes, from {module.bits}, {module.num_bytes:,}")
    if faults:
        raise VerificationError(str(folder), faults)


def _verify_split(folder: Path, source: Checkpoint) -> None:
    """Compare a folder whose wqkv are taken apart; the parts dequantized and put together are the source's weight."""
    entries = scan(folder).entries  # the layout is not the original's, so the scan's faults say nothing
    shards = {entry.file: safe_open(folder / entry.file, framework="pt") for entry in entries.values()}
    faults = carried_faults(folder, source.folder)
    left = set(entries)
    for name, module in source.modules.items():
        names = split_names(name) if module.bits is not None and is_split(name) else [name]
        if module.bits is None:
            keys = {name: [name if module.kind == "bias" else f"{name}.weight"]}
        else:
            keys = {one: [f"{one}.{part}" for part in PACKED] for one in names}
        wanted = [key for some in keys.values() for key in some]
        left -= set(wanted)
        absent = [key for key in wanted if key not in entries]
        if absent:
            faults += [f"{key} is missing" for key in absent]
            continue
        tensors = {one: [shards[entries[key].file].get_tensor(key) for key in some] for one, some in keys.items()}
        try:
            parts = [_dense(module, one, some) for one, some in tensors.items()]
        except UserError as error:
            faults.append(error.got)
            continue
        if not torch.equal(torch.cat(parts), source.dense(name, dtype=torch.float32)):
            faults.append(f"{name}: the exported weight differs")
    faults += [f"{name} is left over" for name in sorted(left)]
    if faults:
        raise VerificationError(str(folder), faults)


def _dense(module: Module, name: str, tensors: list[Tensor]) -> Tensor:
    """Give the float32 weight of a part of a module, read from its tensors."""
    if module.bits is None or module.group_size is None:
        return tensors[0].float()
    packed_part = dict(zip(PACKED, tensors, strict=True))
    weight = unpack(packed_part, bits=module.bits, group_size=module.group_size, checkpoint_format="gptq", name=name)
    return weight.dequantize(torch.float32)


def _readme(model: Path, profile: str, notes: list[str]) -> str:
    said = "".join(f"It {note}.\n\n" for note in notes)
    terms = licence_of(model)
    fields = ModelCardData(**terms.fields).to_yaml()
    return (
        f"---\n{fields}\n---\n\n# {model.name}, profile {profile}\n\n{PROFILES[profile].what}\n\n{said}"
        f"Exported by s2quant.\n\n{terms.notice}\n"
    )
