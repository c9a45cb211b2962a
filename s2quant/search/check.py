"""What a quantized folder really does to the held-out speech, beside what was predicted for it.

`s2quant quantize` calibrates each linear on what the ones before it leave, so that later linears make up for earlier
ones, and on more speech: it can do better than the sum of single damages. If it was calibrated on the held-out
sequences themselves, that flatters it, and is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from s2quant.calibrate.sequences import load_set
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.export.calibration import Report, num_held_out
from s2quant.export.quantized import DETAILS
from s2quant.recipe import load_recipe
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
        num_seen: How many of these the folder was calibrated on: its damage is then flattered. None: not known.
    """

    name: str
    num_bytes: int
    kl: float | None
    kl_together: float | None
    num_held: int
    num_seen: int | None


def check_folder(table: Sensitivity, folder: Path, held: Held, report: Report) -> Checked:
    """Measure a quantized folder on the held-out speech.

    Args:
        table: What was measured.
        folder: The folder.
        held: The bf16 model's answers.
        report: Told of progress.

    Returns:
        What the folder does.

    Raises:
        UserError: The folder cannot be read, or is of a model of another size.
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
        num_seen=_num_seen(folder, held, checkpoint.config.num_codebooks),
    )


def _num_seen(folder: Path, held: Held, num_codebooks: int) -> int | None:
    """Count the held-out sequences that the folder was calibrated on; None where it does not say on what."""
    path = folder / DETAILS / "calibration.safetensors"
    if not path.exists():
        return None
    calibration, recipe = load_set(path, num_codebooks), load_recipe(folder / DETAILS / "recipe.yaml")
    number = len(calibration.sequences) - num_held_out(len(calibration.sequences), recipe.calibration.holdout)
    used = {sequence.numpy().tobytes() for sequence in calibration.sequences[:number]}
    return sum(one.tokens.numpy().tobytes() in used for one in held.sequences)
