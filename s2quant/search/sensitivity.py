"""`s2quant sensitivity`: the damage of every linear at every bit width, in one pass over the model.

The bf16 model speaks a few calibration lines. Most of them are used for Hessians (of the bf16 model's own inputs, since
all but one linear stay as they are); the last ones are held out, and on these the damage is measured. Block by block,
every unit is quantized to every candidate width and put into the model, the rest of the model is run again from there
(`s2quant.search.damage`), and the record is kept: a run that was stopped goes on, and ends with the same bytes.

At the end some combinations are measured as a whole (all linears at one width, the recipe itself), and set against the
sums of their single damages: how far damages add up is an assumption of every search, so it is printed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2quant.calibrate.sequences import CalibrationSet, make_batches, save_set
from s2quant.checkpoint.reader import Checkpoint, open_checkpoint
from s2quant.codec import load_codec
from s2quant.errors import UserError
from s2quant.evaluate.tokens import METRIC_VERSION, TokenSequence
from s2quant.export.calibration import Report, calibration_lines, calibration_set, keeps_groups, set_key
from s2quant.export.memory import calibration_slots
from s2quant.files import atomic_folder, check_new, disk_errors, partial_folder, read_json, write_json
from s2quant.prompt import Tokenizer
from s2quant.quantize.exchange import Exchange
from s2quant.quantize.plan import Plan, make_plan
from s2quant.quantize.store import RUN_VERSION, SPEECH, StageStore
from s2quant.recipe import BITS, Recipe, load_recipe
from s2quant.records import folder_hashes, manifest, versions
from s2quant.report.sensitivity import write_sensitivity_report
from s2quant.runtime.load import device_name, load_model, parse_device
from s2quant.search.clock import Clock
from s2quant.search.damage import Held, held_sequences, hold, measure_model
from s2quant.search.store import link_candidates, load_record
from s2quant.search.table import SCHEMA_VERSION, check_pandas, load_sensitivity, write_csv
from s2quant.search.together import KEYS, combinations, measure_together
from s2quant.search.units import Unit, find_units
from s2quant.search.walk import Job, measure_units

NUM_SEQUENCES = 40
NUM_HELD = 8


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions:
    """What `s2quant sensitivity` is asked for.

    Args:
        recipe: The recipe file: settings, calibration, and what the results are compared with.
        model: The bf16 checkpoint folder.
        out: The folder to make.
        device: Where to work; the whole model must fit.
        dtype: "float32" or "bfloat16", in which the model is run to measure the damage; see `s2quant.search.damage`.
        bits: Candidate widths.
        num_sequences: Lines that are spoken.
        num_held: How many of the sequences, the last ones, measure the damage; the others make the Hessians.
        calibration: A stored calibration set to use, or to make for later use; None keeps it with the run.
        resume: Whether to go on with a stopped run.
        eval_folder: Texts that calibration must not contain; None skips the check.
        num_slots: Utterances in progress at a time while lines are spoken; None: see
            `s2quant.export.memory.calibration_slots`.
        keep_weights: Whether the folder keeps the quantized candidates.
    """

    recipe: Path
    model: Path
    out: Path
    device: str = "cpu"
    dtype: str = "float32"
    bits: tuple[int, ...] = BITS
    num_sequences: int = NUM_SEQUENCES
    num_held: int = NUM_HELD
    calibration: Path | None = None
    resume: bool = False
    eval_folder: Path | None = None
    num_slots: int | None = None
    keep_weights: bool = True


def measure_sensitivity(
    options: SensitivityOptions, report: Report = lambda phase, done, total: None
) -> Mapping[str, Any]:
    """Measure a model's linears.

    Args:
        options: What to do.
        report: Told of progress.

    Returns:
        The object of sensitivity.json.

    Raises:
        UserError: Something in the input cannot be used; nothing stands under the final name.
    """
    clock = Clock()
    finished = options.resume and (options.out / "manifest.json").exists()
    if not finished:
        check_new(options.out)
    _check_options(options)
    check_pandas()
    recipe, device = load_recipe(options.recipe), parse_device(options.device)
    if recipe.calibration.codes != "speak":
        raise UserError(
            f"recipe {recipe.name} has calibration.codes {recipe.calibration.codes!r}",
            "speak: the damage is measured on speech",
            "name a recipe that lets the model speak",
        )
    checkpoint = open_checkpoint(options.model)
    if checkpoint.is_quantized:
        raise UserError(f"{options.model} is quantized already", "a bf16 checkpoint", "name the original")
    plan = make_plan(recipe, checkpoint.config)
    units, left_out = find_units(plan, options.bits)
    lines = calibration_lines(recipe, options.eval_folder, options.num_sequences)
    num_slots = calibration_slots(options.num_slots, checkpoint, recipe.calibration, lines, device, num_groups=1)
    options = replace(options, num_slots=num_slots)
    Tokenizer.load(options.model, checkpoint.config)
    report("hashing the model", 0, 1)
    model_sha256 = folder_hashes(options.model)
    key = set_key(recipe, lines, model_sha256)
    identity = _identity(options, recipe, model_sha256, key, device)
    if finished:
        return _finished(options.out, identity)
    folder = partial_folder(options.out)
    is_new = not folder.exists()
    store = StageStore.open(folder, identity, options.resume)
    try:
        calibration = calibration_set(
            options.calibration or folder / "calibration.safetensors",
            recipe, checkpoint, lines, key, device, num_slots, Exchange(), report,
            groups_folder=folder / SPEECH,
        )  # fmt: skip
        residual_size = min(load_codec(options.model).config.residual_size, checkpoint.config.codebook_size)
        split = split_held(calibration, recipe, checkpoint, residual_size, options.num_held)
    except UserError as error:
        if is_new and not keeps_groups(folder, error):  # so that there is nothing to resume
            shutil.rmtree(folder)
        raise
    clock.stop("calibration", device)
    num_before = len(store.names())
    model = load_model(checkpoint, device, options.dtype)
    held = hold(model, split.held, residual_size)
    floor = _floor(options, checkpoint, held, device)
    job = Job(
        checkpoint=checkpoint,
        batches=make_batches(split.used, recipe.calibration.batch_size, checkpoint.config.pad_id),
        held=held,
        units=units,
        bits=options.bits,
        store=store,
        device=device,
        weights=recipe.calibration.weights,
        strict=recipe.strict,
    )
    measure_units(job, report)
    clock.stop("linears", device)
    together = _together(units, options.bits, store, hold(model, split.held, residual_size), report)
    del model
    clock.stop("combinations", device)
    took = {"num_measured": len(store.names()) - num_before} | clock.facts()
    table = _table(options, plan, units, left_out, store, identity, split, calibration.dropped, residual_size)
    table |= {"floor": floor, "together": together}
    report("writing", 0, 1)
    _write(options, checkpoint, recipe, calibration, store, table, identity, device, took)
    report("done", 1, 1)
    return table


def _check_options(options: SensitivityOptions) -> None:
    bits = options.bits
    if not bits or any(b not in BITS for b in bits) or list(bits) != sorted(set(bits)):
        raise UserError(f"--bits {','.join(map(str, bits))}", f"rising numbers out of {BITS}", "for example --bits 4,8")
    if not 1 <= options.num_held < options.num_sequences:
        raise UserError(
            f"--held {options.num_held} of --sequences {options.num_sequences}",
            "at least one sequence held out, and at least one other",
            "raise --sequences or lower --held",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Calibration sequences by what they are for.

    Args:
        used: int64 [1+N, T] each, for Hessians.
        held: For the damage.
        dropped: Held-out sequences that cannot be scored, by reason.
    """

    used: Sequence[Tensor]
    held: Sequence[TokenSequence]
    dropped: Mapping[str, int]


def split_held(
    calibration: CalibrationSet, recipe: Recipe, checkpoint: Checkpoint, residual_size: int, num_held: int
) -> Split:
    """Hold the last sequences out.

    Args:
        calibration: The set.
        recipe: Says how it was spoken.
        checkpoint: The model that spoke it.
        residual_size: Entries of a residual codebook that exist in the codec.
        num_held: How many sequences are held out.

    Returns:
        The sequences, by what they are for.

    Raises:
        UserError: Too few clips are left, or none of those held out can be scored.
    """
    number = len(calibration.sequences) - num_held
    if number < 1:
        raise UserError(
            f"{len(calibration.sequences)} clips, {num_held} of them to be held out; dropped: "
            f"{dict(calibration.dropped) or 'none'}",
            "at least one more clip than are held out",
            "raise --sequences, or calibration.max_frames in the recipe",
        )
    held, dropped = held_sequences(
        calibration.ids[number:],
        calibration.sequences[number:],
        checkpoint.config,
        residual_size,
        recipe.calibration.require_end,
        recipe.calibration.max_frames,
    )
    if not held:
        raise UserError(
            f"none of the {num_held} held-out sequences can be scored: {dropped}",
            "sequences with frames at their end",
            "raise --held, or calibration.max_positions in the recipe",
        )
    return Split(used=calibration.sequences[:number], held=held, dropped=dropped)


def _identity(
    options: SensitivityOptions, recipe: Recipe, model_sha256: Mapping[str, str], key: str, device: torch.device
) -> dict[str, Any]:
    """Name all that the result depends on."""
    return {
        "run_version": RUN_VERSION,
        "recipe_sha256": recipe.sha256,
        "model_sha256": dict(model_sha256),
        "calibration_key": key,
        "bits": list(options.bits),
        "num_held": options.num_held,
        "keep_weights": options.keep_weights,
        "num_slots": options.num_slots,
        "device": device_name(device),
        "dtype": options.dtype,
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _finished(out: Path, identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take what this very run has finished, and clear away what was kept to resume it."""
    if read_json(out / "manifest.json").get("identity") != identity:
        raise UserError(
            f"{out} exists already and was made from other input or with other options",
            "a path that is free, or the folder that this run was making",
            "remove it or name another --out",
        )
    if partial_folder(out).exists():
        with disk_errors(out):
            shutil.rmtree(partial_folder(out))
    load_sensitivity(out)
    return read_json(out / "sensitivity.json")


def _floor(
    options: SensitivityOptions, checkpoint: Checkpoint, held: Held, device: torch.device
) -> dict[str, Any] | None:
    """Measure what bfloat16 arithmetic alone does; None where all is measured in it."""
    if options.dtype == "bfloat16":
        return None
    found = measure_model(held, load_model(checkpoint, device, torch.bfloat16))
    return {key: found[key] for key in KEYS}


def _together(
    units: Sequence[Unit], bits: Sequence[int], store: StageStore, held: Held, report: Report
) -> list[dict[str, Any]]:
    """Measure combinations as a whole, and set them against the sums of their single damages."""
    wanted = combinations(units, bits)
    rows = []
    for number, (name, choice) in enumerate(wanted.items()):
        report("combinations", number, len(wanted))
        records = [load_record(store, unit, b)["kl"] for unit, b in choice.items()]
        total = None if any(kl is None for kl in records) else sum(records)
        rows.append({"name": name, "kl_sum": total} | measure_together(units, choice, store, held))
    return rows


def _table(
    options: SensitivityOptions,
    plan: Plan,
    units: Sequence[Unit],
    left_out: Mapping[str, str],
    store: StageStore,
    identity: Mapping[str, Any],
    split: Split,
    clips_dropped: Mapping[str, int],
    residual_size: int,
) -> dict[str, Any]:
    rows = []
    for unit in units:
        candidates = [load_record(store, unit.name, bits) for bits in options.bits]
        rows.append(unit.to_json() | {"candidates": candidates})
    return {
        "schema_version": SCHEMA_VERSION,
        "metric_version": METRIC_VERSION,
        "model": {"folder": options.model.name, "sha256": identity["model_sha256"]},
        "recipe": {
            "name": plan.recipe.name,
            "sha256": plan.recipe.sha256,
            "calibration_source": _source(plan.recipe, options.out),
        },
        "calibration": {
            "key": identity["calibration_key"],
            "num_used": len(split.used),
            "num_used_positions": sum(one.shape[1] for one in split.used),
            "num_held": options.num_held,
            "num_held_scored": len(split.held),
            "num_held_frames": sum(one.num_frames for one in split.held),
            "num_held_ended": sum(one.ended for one in split.held),
            "dropped": dict(split.dropped),
            "clips_dropped": dict(clips_dropped),
            "seed": plan.recipe.calibration.seed,
        },
        "residual_size": residual_size,
        "bits": list(options.bits),
        "device": identity["device"],
        "dtype": identity["dtype"],
        "dense_bytes": plan.dense_bytes,
        "fixed_bytes": plan.dense_bytes - sum(unit.dense_bytes for unit in units),
        "left_out": dict(left_out),
        "units": rows,
    }


def _source(recipe: Recipe, out: Path) -> str:
    """Name the calibration source so that it is found from the folder made."""
    source = recipe.calibration.source
    return source if source.startswith("hf:") else os.path.relpath(recipe.calibration_path, out.resolve())


def _write(
    options: SensitivityOptions,
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: CalibrationSet,
    store: StageStore,
    table: Mapping[str, Any],
    identity: Mapping[str, Any],
    device: torch.device,
    took: Mapping[str, Any],
) -> None:
    record = manifest(
        "sensitivity",
        {
            "model": {"folder": options.model.name, "sha256": identity["model_sha256"]},
            "recipe": {"name": recipe.name, "sha256": recipe.sha256},
            "calibration": {"key": identity["calibration_key"]},
        },
        device_name(device),
        recipe.calibration.seed,
        identity=dict(identity),
        process=dict(took),
    )
    with atomic_folder(options.out, within=store.folder) as folder:
        write_json(folder / "sensitivity.json", table)
        write_csv(folder / "sensitivity.csv", table)
        (folder / "recipe.yaml").write_text(recipe.text, encoding="utf-8")
        write_json(folder / "config.json", checkpoint.config.raw)
        save_set(calibration, folder / "calibration.safetensors")
        if options.keep_weights:
            link_candidates(store, folder, {row["name"]: options.bits for row in table["units"]})
        write_json(folder / "manifest.json", record)
        write_sensitivity_report(folder)
    with disk_errors(options.out):
        shutil.rmtree(store.folder)
