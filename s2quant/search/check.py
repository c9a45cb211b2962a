"""What a quantized folder really does to the held-out speech, beside what was predicted for it.

`s2quant quantize` calibrates each linear on what the ones before it leave, so that later linears make up for earlier
ones, and on more speech: it can do better than the sum of single damages. If it was calibrated on the held-out lines
too, that flatters it, and is said. Lines are compared by their text, not by what was spoken: in a calibration set of
another size a line has another seed, and so other frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from s2quant.calibrate.sequences import load_set, text_ids
from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError, shorten_list
from s2quant.evaluate.tokens import TokenSequence
from s2quant.export.calibration import Report, num_held_out
from s2quant.export.quantized import DETAILS
from s2quant.recipe import load_recipe
from s2quant.records import input_facts, made_by, read_manifest
from s2quant.runtime.load import load_model
from s2quant.search.damage import Held, measure_model
from s2quant.search.table import Sensitivity


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a quantized folder does.

    Args:
        name: Of the folder.
        num_bytes: Of its tensors.
        kl: Single damages of its linears added up; None where a width or group was not measured.
        kl_together: Measured, nats per frame; None where it is not finite.
        num_held: Held-out sequences that it was measured on.
        num_seen: Of how many of these it was calibrated on the line: its damage is then flattered. None: not known.
    """

    name: str
    num_bytes: int
    kl: float | None
    kl_together: float | None
    num_held: int
    num_seen: int | None


def check_sizes(table: Sensitivity, folder: Path) -> None:
    """Refuse a folder that cannot be a quantized form of the model that was measured.

    Args:
        table: What was measured.
        folder: The folder.

    Raises:
        UserError: The folder cannot be read, or is of a model of other sizes; all are listed.
    """
    ours, theirs = _sizes(S2Config.load(table.folder)), _sizes(open_checkpoint(folder).config)
    faults = [f"{name} is {theirs[name]}, not {size}" for name, size in ours.items() if theirs[name] != size]
    if faults:
        raise UserError(
            f"{folder} is of another model than the one that was measured:\n{shorten_list(faults)}",
            f"a folder that was made from {table.raw['model']['folder']}",
            "leave it out of --check, or measure its own bf16 checkpoint with `s2quant sensitivity`",
        )


def check_origin(table: Sensitivity, folder: Path) -> None:
    """Refuse a folder whose manifest says that it was made from other weights than those that were measured.

    Args:
        table: What was measured.
        folder: The folder; one that does not say what it was made from passes.

    Raises:
        UserError: It was made from other weights, or its manifest cannot be read.
    """
    made_from = input_facts(made_by(read_manifest(folder)), "model")
    ours, theirs = _weights(table.raw["model"]["sha256"]), _weights(made_from.get("sha256"))
    other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if ours and theirs and other:
        raise UserError(
            f"{folder} was made from other files ({made_from.get('folder')}) than those that were measured:\n"
            f"{shorten_list([f'{name} is another file, by the hash in manifest.json' for name in other])}",
            f"a folder that was made from {table.raw['model']['folder']}",
            "leave it out of --check, or measure its own bf16 checkpoint with `s2quant sensitivity`",
        )


def _weights(hashes: Any) -> dict[str, str]:
    """Keep the hashes of weights: other files change no answer, or, as config.json does, are looked at by value."""
    if not isinstance(hashes, Mapping):
        return {}
    return {name: sha for name, sha in hashes.items() if name.endswith(".safetensors")}


def _sizes(config: S2Config) -> dict[str, Any]:
    """Name what a config says of a model, but for how long a sequence may be, which changes no answer."""
    parts = {"text_config": config.slow, "audio_decoder_config": config.fast}
    sizes = {f"{part}.{key}": value for part, one in parts.items() for key, value in asdict(one).items()}
    names = ("num_codebooks", "semantic_begin_id", "semantic_end_id", "im_end_id", "pad_id")
    sizes |= {name: getattr(config, name) for name in names}
    return {name: value for name, value in sizes.items() if not name.endswith(".max_seq_len")}


def check_folder(table: Sensitivity, folder: Path, held: Held, report: Report) -> Checked:
    """Measure a quantized folder on the held-out speech.

    Args:
        table: What was measured.
        folder: The folder, one that `check_sizes` and `check_origin` let pass.
        held: The bf16 model's answers.
        report: Told of progress.

    Returns:
        What the folder does.

    Raises:
        UserError: The folder cannot be read.
    """
    report(f"measuring {folder.name}", 0, 1)
    checkpoint = open_checkpoint(folder)
    device = held.inputs[0].device
    measured = measure_model(held, load_model(checkpoint, device, table.raw["dtype"], "reference"))
    total: float | None = 0.0
    for unit in table.units:
        modules = {(checkpoint.modules[m].bits, checkpoint.modules[m].group_size) for m in unit.modules}
        bits, group_size = modules.pop()
        damage = 0.0 if bits is None else table.damage[unit.name].get(bits)
        if modules or damage is None or group_size not in (None, unit.settings.group_size) or total is None:
            total = None
        else:
            total += damage
    return Checked(
        name=folder.resolve().name,
        num_bytes=sum(entry.num_bytes for entry in checkpoint.entries.values()),
        kl=total,
        kl_together=measured["kl"],
        num_held=len(held.sequences),
        num_seen=_num_seen(folder, held, checkpoint.config),
    )


def _num_seen(folder: Path, held: Held, config: S2Config) -> int | None:
    """Count the held-out lines that the folder was calibrated on; None where it does not say on what."""
    path = folder / DETAILS / "calibration.safetensors"
    if not path.exists():
        return None
    calibration, recipe = load_set(path, config.num_codebooks), load_recipe(folder / DETAILS / "recipe.yaml")
    number = len(calibration.sequences) - num_held_out(len(calibration.sequences), recipe.calibration.holdout)
    return count_seen(held.sequences, calibration.ids[:number], calibration.sequences[:number], config)


def count_seen(held: Sequence[TokenSequence], ids: Sequence[str], sequences: Sequence[Tensor], config: S2Config) -> int:
    """Count held-out sequences whose line is among others, whatever was spoken for it.

    Args:
        held: The held-out sequences, with the ids of their lines.
        ids: The lines of the others.
        sequences: int64 [1+N, T] each.
        config: Says which tokens are frames.

    Returns:
        How many have the text of one of the others; or have its id, and one text begins with the other: a line of
        several batches is cut where its frames leave no more room.
    """

    def text_of(tokens: Tensor) -> tuple[int, ...]:
        return text_ids(tokens, config.semantic_begin_id, config.semantic_end_id, config.im_end_id)

    texts = {name: text_of(tokens) for name, tokens in zip(ids, sequences, strict=True)}
    whole = set(texts.values())

    def is_seen(one: TokenSequence) -> bool:
        text, other = text_of(one.tokens), texts.get(one.id)
        shorter = min(len(text), len(other or ()))
        return text in whole or (other is not None and text[:shorter] == other[:shorter])

    return sum(is_seen(one) for one in held)
