"""The whole job: recipe and model in, a verified quantized checkpoint folder out.

What is finished is kept in `OUT.partial` until the folder stands under its final name, so a run that was stopped at
any moment goes on with `resume`, and ends with the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2quant.calibrate.lines import CalibrationLine, check_disjoint, read_lines, select_lines
from s2quant.calibrate.sequences import (
    CalibrationSet,
    calibration_key,
    load_set,
    make_batches,
    make_sequences,
    save_set,
)
from s2quant.checkpoint.layout import expected_tensors
from s2quant.checkpoint.reader import Checkpoint, open_checkpoint
from s2quant.checkpoint.writer import MAX_SHARD_BYTES, ShardWriter, carry_files, check_carried
from s2quant.codec import load_codec
from s2quant.errors import UserError
from s2quant.export.card import model_card
from s2quant.export.config_files import merged_config, quantization_config
from s2quant.export.verify import verify_quantized
from s2quant.files import atomic_folder, check_new, disk_errors, read_json, write_json
from s2quant.prompt import Tokenizer
from s2quant.quantize.loop import num_stages, quantize_stages
from s2quant.quantize.plan import Plan, make_plan
from s2quant.quantize.store import StageStore
from s2quant.recipe import Recipe, load_recipe
from s2quant.records import folder_hashes, manifest, versions
from s2quant.runtime.engine import Engine
from s2quant.runtime.load import device_name, load_model, parse_device

_MADE_FROM = (("model", "sha256"), ("recipe", "sha256"), ("calibration", "key"))  # in the manifest's inputs
DETAILS = "s2quant"  # subfolder of the checkpoint with recipe, records and calibration set

Report = Callable[[str, int, int], None]
"""Called with a phase, the steps done and the steps in all."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What `s2quant quantize` is asked for.

    Args:
        recipe: The recipe file.
        model: The bf16 checkpoint folder.
        out: The folder to make.
        device: Where to work.
        calibration: A stored calibration set to use, or to make for later use; None keeps it with the run.
        resume: Whether to go on with a stopped run.
        eval_folder: Texts that calibration must not contain; None skips the check when there is no such folder.
        num_sequences: Calibration sequences, instead of the recipe's number.
        num_slots: Utterances in progress at a time while calibration lines are spoken.
        max_shard_bytes: Shard limit of the output.
    """

    recipe: Path
    model: Path
    out: Path
    device: str = "cpu"
    calibration: Path | None = None
    resume: bool = False
    eval_folder: Path | None = None
    num_sequences: int | None = None
    num_slots: int = 8
    max_shard_bytes: int = MAX_SHARD_BYTES


def quantize_checkpoint(
    options: QuantizeOptions, report: Report = lambda phase, done, total: None
) -> Sequence[Mapping[str, Any]]:
    """Quantize a checkpoint by a recipe.

    Args:
        options: What to do.
        report: Told of progress.

    Returns:
        One record per quantized module.

    Raises:
        UserError: Something in the input cannot be used; nothing stands under the final name.
        VerificationError: The folder written is not what was made; nothing stands under the final name.
    """
    finished = options.resume and (options.out / "manifest.json").exists()  # stopped after its last step, or before
    if not finished:
        check_new(options.out)
    recipe = load_recipe(options.recipe)
    device = parse_device(options.device)
    checkpoint = open_checkpoint(options.model)
    if checkpoint.is_quantized:
        raise UserError(f"{options.model} is quantized already", "a bf16 checkpoint", "quantize the original")
    plan = make_plan(recipe, checkpoint.config)
    if not plan.quantized:
        raise UserError(f"recipe {recipe.name} quantizes nothing", "at least one rule that quantizes", "add one")
    lines = _lines(recipe, options)
    check_carried(options.model)
    Tokenizer.load(options.model, checkpoint.config)
    report("hashing the model", 0, 1)
    model_sha256 = folder_hashes(options.model)
    identity = _identity(recipe, model_sha256, lines, device, options)
    if finished:
        return _finished_records(options.out, identity)
    if options.calibration is not None:
        _stored_set(options.calibration, identity["calibration_key"], checkpoint)
    is_new = not partial_folder(options.out).exists()
    store = StageStore.open(partial_folder(options.out), identity, options.resume)
    try:
        calibration = _calibration(options, recipe, checkpoint, lines, model_sha256, store, report)
    except UserError:
        if is_new:  # nothing is finished, so there is nothing to resume
            shutil.rmtree(store.folder)
        raise
    peak_calibration_bytes = _peak_bytes(device)
    batches, num_held = split_batches(calibration, recipe, checkpoint.config.pad_id)
    total, done = num_stages(plan), 0

    def stage_done(name: str) -> None:
        nonlocal done
        done += 1
        report(name, done, total)

    report("quantizing", 0, total)
    records = quantize_stages(checkpoint, plan, batches, num_held, store, device, stage_done)
    report("writing", 0, 1)
    facts = {
        "model": {"folder": options.model.name, "sha256": model_sha256},
        "recipe": {"name": recipe.name, "sha256": recipe.sha256},
        "calibration": calibration_facts(calibration, checkpoint),
    }
    record = manifest(
        "quantize",
        facts,
        device_name(device),
        recipe.calibration.seed,
        peak_device_bytes=_peak_bytes(device),
        peak_calibration_bytes=peak_calibration_bytes,
        num_quantized=len(plan.quantized),
        num_tensors=plan.num_tensors,
        tensor_bytes=plan.num_bytes,
    )
    _write(options, checkpoint, plan, store, records, calibration, record)
    with disk_errors(options.out):
        shutil.rmtree(store.folder)
    report("done", 1, 1)
    return records


def _finished_records(out: Path, identity: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Read the records of a folder that this run finished, and clear away what was kept to resume it."""
    inputs = read_json(out / "manifest.json").get("inputs", {})
    made_from = [inputs.get(name, {}).get(key) for name, key in _MADE_FROM]
    if made_from != [identity[key] for key in ("model_sha256", "recipe_sha256", "calibration_key")]:
        raise UserError(
            f"{out} exists already and was made from another model, recipe or calibration",
            "a path that is free, or the folder that this run was making",
            "remove it or name another --out",
        )
    records: Sequence[Mapping[str, Any]] = read_json(out / DETAILS / "records.json")["modules"]
    if partial_folder(out).exists():
        with disk_errors(out):
            shutil.rmtree(partial_folder(out))
    return records


def _peak_bytes(device: torch.device) -> int | None:
    """Read the peak of the GPU's memory since the last call, and start again; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def partial_folder(out: Path) -> Path:
    """Name the folder of a run in progress.

    Args:
        out: The final folder.

    Returns:
        `OUT.partial` beside it.
    """
    return out.absolute().with_name(out.name + ".partial")


def calibration_facts(calibration: CalibrationSet, checkpoint: Checkpoint) -> dict[str, Any]:
    """Summarise a calibration set for the manifest.

    Args:
        calibration: The set.
        checkpoint: The model it was made with.

    Returns:
        Counts and the key.
    """
    config = checkpoint.config
    return {
        "key": calibration.key,
        "num_sequences": len(calibration.sequences),
        "num_positions": calibration.num_positions,
        "num_frames": calibration.num_frames(config.semantic_begin_id, config.semantic_end_id),
        "dropped": dict(calibration.dropped),
    }


def _lines(recipe: Recipe, options: QuantizeOptions) -> list[CalibrationLine]:
    source = recipe.calibration.source
    lines = read_lines(source if source.startswith("hf:") else recipe.calibration_path)
    if options.eval_folder is not None:
        check_disjoint(lines, options.eval_folder)
    return select_lines(lines, options.num_sequences or recipe.calibration.num_sequences, recipe.calibration.seed)


def _identity(
    recipe: Recipe,
    model_sha256: Mapping[str, str],
    lines: Sequence[CalibrationLine],
    device: torch.device,
    options: QuantizeOptions,
) -> dict[str, Any]:
    """Name all that the bytes of the result depend on."""
    return {
        "recipe_sha256": recipe.sha256,
        "model_sha256": dict(model_sha256),
        "calibration_key": calibration_key(lines, recipe.calibration, model_sha256),
        "num_slots": options.num_slots,
        "device": device_name(device),
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _calibration(
    options: QuantizeOptions,
    recipe: Recipe,
    checkpoint: Checkpoint,
    lines: Sequence[CalibrationLine],
    model_sha256: Mapping[str, str],
    store: StageStore,
    report: Report,
) -> CalibrationSet:
    """Find the calibration set, or let the model speak it."""
    key = calibration_key(lines, recipe.calibration, model_sha256)
    path = options.calibration or store.folder / "calibration.safetensors"
    found = _stored_set(path, key, checkpoint)
    if found is not None:
        return found
    device = parse_device(options.device)
    codec = None
    if any(line.voice is not None for line in lines):
        codec = load_codec(checkpoint.folder, device=device)
    report("calibration speech", 0, len(lines))
    engine = Engine(
        load_model(checkpoint, device),
        Tokenizer.load(checkpoint.folder, checkpoint.config),
        codec,
        num_slots=options.num_slots,
    )
    voices = recipe.calibration_path.parent
    made = make_sequences(
        engine, lines, recipe.calibration, key, voices, lambda done: report("calibration speech", done, len(lines))
    )
    save_set(made, path)
    return made


def _stored_set(path: Path, key: str, checkpoint: Checkpoint) -> CalibrationSet | None:
    """Read a calibration set, if there is one; refuse one of another run."""
    if not path.exists():
        check_new(path)
        return None
    found = load_set(path, checkpoint.config.num_codebooks)
    if found.key != key:
        raise UserError(
            f"{path} was made from other lines, settings or weights (key {found.key[:12]}, not {key[:12]})",
            "a calibration set of this model and recipe",
            "remove it or name another --calibration",
        )
    return found


def split_batches(
    calibration: CalibrationSet, recipe: Recipe, pad_id: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
    """Pad the sequences into batches, those held out at the end.

    Args:
        calibration: The set.
        recipe: Says batch size and the share held out.
        pad_id: Token id of the padding.

    Returns:
        Batches of tokens and mask, and how many of them, at the end, are held out.
    """
    sequences, settings = calibration.sequences, recipe.calibration
    num_held = min(len(sequences) - 1, round(len(sequences) * settings.holdout))
    if settings.holdout and len(sequences) > 1:
        num_held = max(1, num_held)
    split = len(sequences) - num_held
    used = make_batches(sequences[:split], settings.batch_size, pad_id)
    held = make_batches(sequences[split:], settings.batch_size, pad_id)
    return used + held, len(held)


def _write(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    plan: Plan,
    store: StageStore,
    records: Sequence[Mapping[str, Any]],
    calibration: CalibrationSet,
    record: Mapping[str, Any],
) -> None:
    """Write the folder, open it again and verify it, then give it its name."""
    quantization = quantization_config(plan)
    facts = record["inputs"]["calibration"]
    sentence = (
        f"{facts['num_sequences']} sequences, {facts['num_positions']} positions, {facts['num_frames']} of them audio "
        f"frames spoken by the bf16 model; dropped clips: {facts['dropped'] or 'none'}"
    )
    with atomic_folder(options.out, within=store.folder) as folder:
        write_shards(folder, checkpoint, plan, store, options.max_shard_bytes)
        carry_files(options.model, folder)
        write_json(folder / "config.json", merged_config(checkpoint.config.raw, quantization))
        write_json(folder / "quantize_config.json", quantization)
        (folder / "README.md").write_text(model_card(plan, records, sentence, quantization), encoding="utf-8")
        details = folder / DETAILS
        details.mkdir()
        (details / "recipe.yaml").write_text(plan.recipe.text, encoding="utf-8")
        write_json(details / "records.json", {"modules": list(records)})
        save_set(calibration, details / "calibration.safetensors")
        write_json(folder / "manifest.json", dict(record) | {"files_sha256": folder_hashes(folder)})
        verify_quantized(folder, options.model, plan, records)


def write_shards(
    folder: Path, checkpoint: Checkpoint, plan: Plan, store: StageStore, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write all tensors, packed ones from the store and the others as they are in the source.

    Args:
        folder: Where to.
        checkpoint: The source.
        plan: Which modules are packed.
        store: The finished stages.
        max_shard_bytes: Shard limit.
    """
    writer = ShardWriter(folder, max_shard_bytes)
    for spec in expected_tensors(checkpoint.config).values():
        planned = plan.quantized.get(spec.module) if spec.kind == "linear" else None
        if planned is None:
            writer.add(spec.name, checkpoint.tensor(spec.name))
            continue
        for part, tensor in store.tensors(spec.module).items():
            writer.add(f"{spec.module}.{part}", tensor)
    writer.finish()
