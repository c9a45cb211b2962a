"""The calibration set of a run: found, or spoken by the model, alone or shared among processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2quant.calibrate.lines import CalibrationLine, check_disjoint, read_lines, select_lines, voice_hashes
from s2quant.calibrate.sequences import (
    CalibrationSet,
    calibration_key,
    load_set,
    make_batches,
    make_sequences,
    save_set,
)
from s2quant.calibrate.spoken import SpokenGroups
from s2quant.checkpoint.reader import Checkpoint
from s2quant.codec import load_codec, read_codec_config
from s2quant.errors import DiskError, OutOfMemory, UserError
from s2quant.files import check_new, sha256_text
from s2quant.prompt import Tokenizer
from s2quant.quantize.exchange import Exchange
from s2quant.quantize.store import RUN_VERSION, SPEECH
from s2quant.recipe import Recipe
from s2quant.records import hashed_files, versions
from s2quant.runtime.engine import RELEASED_RESIDUAL_SIZE, Engine
from s2quant.runtime.load import device_name, load_model

Report = Callable[[str, int, int], None]
"""Called with a phase, the steps done and the steps in all."""


def calibration_lines(recipe: Recipe, eval_folder: Path | None, num_sequences: int | None) -> list[CalibrationLine]:
    """Choose the lines of a run.

    Args:
        recipe: The recipe.
        eval_folder: Texts that calibration must not contain; None skips the check.
        num_sequences: Instead of the recipe's number.

    Returns:
        The lines, in order.

    Raises:
        UserError: The source is not there or cannot be read, or shares a text with the evaluation.
    """
    source = recipe.calibration.source
    if not (source.startswith("hf:") or Path(source).is_absolute() or recipe.calibration_path.is_file()):
        raise UserError(
            f"recipe {recipe.path}: its calibration.source {source}, which is relative to the recipe, is not there",
            f"{recipe.calibration_path}; a stored set (--calibration) is used only where these lines are its own",
            "put the source there (a quantized folder keeps the recipe without it), or copy the recipe and give "
            "calibration.source an absolute path",
        )
    lines = read_lines(source if source.startswith("hf:") else recipe.calibration_path)
    if eval_folder is not None:
        check_disjoint(lines, eval_folder)
    return select_lines(lines, num_sequences or recipe.calibration.num_sequences, recipe.calibration.seed)


def calibration_set(
    path: Path,
    recipe: Recipe,
    checkpoint: Checkpoint,
    lines: Sequence[CalibrationLine],
    key: str,
    device: torch.device,
    num_slots: int,
    exchange: Exchange,
    report: Report,
    codec_device: torch.device | None = None,
    groups_folder: Path | None = None,
) -> CalibrationSet:
    """Find the calibration set, or let the model speak it and keep it.

    Args:
        path: Where it is, or will be.
        recipe: As `spoken_set`.
        checkpoint: As `spoken_set`.
        lines: As `spoken_set`.
        key: From `calibration_key`.
        device: As `spoken_set`.
        num_slots: As `spoken_set`.
        exchange: As `spoken_set`.
        report: As `spoken_set`.
        codec_device: As `spoken_set`.
        groups_folder: As `spoken_set`.

    Returns:
        The set.

    Raises:
        UserError: The file found is not this set, or lines cannot be spoken.
    """
    if exchange.agree(path.exists()):
        return stored_set(path, key, checkpoint)
    exchange.once(lambda: check_new(path))
    made = spoken_set(recipe, checkpoint, lines, device, num_slots, exchange, report, codec_device, groups_folder)
    return kept_set(made, key, path, exchange)


def spoken_set(
    recipe: Recipe,
    checkpoint: Checkpoint,
    lines: Sequence[CalibrationLine],
    device: torch.device,
    num_slots: int,
    exchange: Exchange,
    report: Report,
    codec_device: torch.device | None = None,
    groups_folder: Path | None = None,
    wait: Callable[[], None] = lambda: None,
) -> CalibrationSet:
    """Let the model speak the calibration set.

    Args:
        recipe: The recipe.
        checkpoint: The bf16 model.
        lines: From `calibration_lines`.
        device: Where the model speaks.
        num_slots: Utterances in progress at a time.
        exchange: The processes that share the lines; all get the whole set.
        report: Told of progress.
        codec_device: Where the voices of lines are encoded; None: on the device.
        groups_folder: Where groups of lines are kept as they are spoken, for a run that is stopped; None: nowhere.
        wait: Called between loading the model and speaking.

    Returns:
        The set, as yet without a key.

    Raises:
        UserError: Lines cannot be spoken.
    """
    codec = None
    if any(line.voice is not None for line in lines):
        codec = load_codec(checkpoint.folder, device=codec_device or device)
    report("calibration speech", 0, len(lines))
    residual_size = RELEASED_RESIDUAL_SIZE
    if (checkpoint.folder / "codec.pth").exists():  # a checkpoint without one still calibrates
        residual_size = read_codec_config(checkpoint.folder).residual_size
    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config)
    model = load_model(checkpoint, device)
    engine = Engine(model, tokenizer, codec, num_slots=num_slots, residual_size=residual_size)
    wait()
    groups = None
    if groups_folder is not None:
        key = _groups_key(recipe, checkpoint, lines, device, num_slots, codec_device)
        groups = SpokenGroups(folder=groups_folder, key=key)
    return make_sequences(
        engine,
        lines,
        recipe.calibration,
        "",
        recipe.calibration_path.parent,
        lambda done: report("calibration speech", done, len(lines)),
        exchange.owns_by_size,
        exchange.gather,
        groups,
    )


def set_key(recipe: Recipe, lines: Sequence[CalibrationLine], model_sha256: Mapping[str, str]) -> str:
    """Hash all that a recipe's calibration set depends on.

    Args:
        recipe: The recipe.
        lines: From `calibration_lines`.
        model_sha256: Hashes of the model's files.

    Returns:
        As `calibration_key`.

    Raises:
        UserError: A recording that a line names is not there.
    """
    voices = voice_hashes(lines, recipe.calibration_path.parent)
    return calibration_key(lines, recipe.calibration, model_sha256, voices)


def keeps_groups(folder: Path, error: UserError) -> bool:
    """Tell whether a run that failed while it spoke has groups of lines to go on from.

    Args:
        folder: `OUT.partial`.
        error: What it failed by.

    Returns:
        Whether there are any, and another try may get over the error.
    """
    return isinstance(error, DiskError | OutOfMemory) and any((folder / SPEECH).glob("[!.]*.safetensors"))


def remove_groups(folder: Path) -> None:
    """Remove the groups of lines that were spoken, and the folder if nothing else is in it.

    Args:
        folder: `OUT.partial`, if it is there.
    """
    shutil.rmtree(folder / SPEECH, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def _groups_key(
    recipe: Recipe,
    checkpoint: Checkpoint,
    lines: Sequence[CalibrationLine],
    device: torch.device,
    num_slots: int,
    codec_device: torch.device | None,
) -> str:
    """Hash all that the speech of a group depends on, the model by the sizes and times of its files."""
    about = {file.name: file.stat() for file in hashed_files(checkpoint.folder)}
    stamps = {name: f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}" for name, stat in about.items()}
    uses_cpu = "cpu" in (device.type, (codec_device or device).type)
    facts = {
        "run_version": RUN_VERSION,
        "calibration_key": set_key(recipe, lines, stamps),
        "num_slots": num_slots,
        "device": device_name(device),
        "num_threads": torch.get_num_threads() if uses_cpu else None,
        "versions": versions(),
    }
    return sha256_text(json.dumps(facts, sort_keys=True))


def kept_set(made: CalibrationSet, key: str, path: Path, exchange: Exchange) -> CalibrationSet:
    """Give a set its key, and keep it.

    Args:
        made: From `spoken_set`.
        key: From `calibration_key`.
        path: Where it will be.
        exchange: The processes that have it.

    Returns:
        The set.

    Raises:
        UserError: The disk refuses.
    """
    whole = replace(made, key=key)
    exchange.once(lambda: save_set(whole, path))
    return whole


def stored_set(path: Path, key: str, checkpoint: Checkpoint) -> CalibrationSet:
    """Read a calibration set and refuse one of another run.

    Args:
        path: The file.
        key: From `calibration_key`.
        checkpoint: The model.

    Returns:
        The set.

    Raises:
        UserError: The file is unreadable or was made from something else.
    """
    found = load_set(path, checkpoint.config.num_codebooks)
    if found.key != key:
        raise UserError(
            f"{path} was made from other lines, settings or weights (key {found.key[:12]}, not {key[:12]})",
            "a calibration set of this model and recipe",
            "remove it or name another --calibration",
        )
    return found


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


def split_batches(calibration: CalibrationSet, recipe: Recipe, pad_id: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Pad the sequences into batches, those held out at the end.

    Args:
        calibration: The set.
        recipe: Says batch size and the share held out.
        pad_id: Token id of the padding.

    Returns:
        Batches of tokens and mask, and how many of them, at the end, are held out.
    """
    sequences, settings = calibration.sequences, recipe.calibration
    split = len(sequences) - num_held_out(len(sequences), settings.holdout)
    used = make_batches(sequences[:split], settings.batch_size, pad_id)
    held = make_batches(sequences[split:], settings.batch_size, pad_id)
    return used + held, len(held)


def num_held_out(num_sequences: int, holdout: float) -> int:
    """Count the sequences, the last ones of a set, that enter no Hessian.

    Args:
        num_sequences: Sequences of the set.
        holdout: The recipe's fraction.

    Returns:
        Their number: fewer than there are, and at least one of several where any are asked for.
    """
    number = min(num_sequences - 1, round(num_sequences * holdout))
    return max(1, number) if holdout and num_sequences > 1 else number
