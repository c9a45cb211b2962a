"""What speaks for a recipe that was found: sizes, damages predicted and measured, the bound, hashes of the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2quant.recipe import Recipe
from s2quant.search.table import Sensitivity
from s2quant.search.units import DENSE_BITS


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Args:
        name: Of the recipe.
        num_bytes: Tensor bytes, as planned.
        dense_bytes: Of the bf16 checkpoint.
        kl: Predicted damage, nats per frame.
        bound: What no choice can be below: nats per frame for a budget, bytes for a target.
        kl_together: Measured as a whole; None without the model.
        allowed: What could be chosen, in words; the bound is of that.
        num_units: Units by bits.
    """

    name: str
    num_bytes: int
    dense_bytes: int
    kl: float
    bound: float
    kl_together: float | None
    allowed: str
    num_units: Mapping[int, int]


def evidence(
    goal: str, table: Sensitivity, found: Found, compared: Sequence[Mapping[str, Any]], origin: Recipe, is_target: bool
) -> list[str]:
    """Say what speaks for a recipe; no date, so that the same input gives the same file.

    Args:
        goal: The size or damage that was asked for, with its unit.
        table: What was measured.
        found: What was found.
        compared: Combinations to hold it against, from `named_points`.
        origin: The recipe that the measurements started from.
        is_target: Whether the goal is a damage.

    Returns:
        Lines of the recipe's comment.
    """
    calibration, hashes = table.raw["calibration"], table.raw["model"]["sha256"]
    share = 100 * found.num_bytes / found.dense_bytes
    counts = ", ".join(
        f"{count} in {'bf16' if bits == DENSE_BITS else f'{bits} bit'}" for bits, count in found.num_units.items()
    )
    if not is_target:
        bound = f"no choice allowed is below {found.bound:.6g}{_gap(found.kl, found.bound)}"
    else:
        bound = f"no choice allowed is smaller than {found.bound:,.0f} bytes{_gap(found.num_bytes, found.bound)}"
    lines = [
        f"Found by s2quant search: the least {'size' if is_target else 'damage'} it can find within {goal}.",
        f"allowed: {found.allowed}",
        f"size: {found.num_bytes:,} tensor bytes, {share:.2f} % of bf16's {found.dense_bytes:,}",
        f"linears (w1 and w3 of a block as one): {counts}",
        f"predicted damage: {found.kl:.6g} nats per frame, single damages added up; {bound}",
    ]
    if found.kl_together is not None:
        lines.append(
            f"measured as a whole: {found.kl_together:.6g} nats per frame"
            f"{'' if not found.kl else f', {found.kl_together / found.kl:.2f} of the prediction'}"
        )
    lines += [
        f"compare {row['name']}: {row['num_bytes']:,} bytes, predicted {_nats(row['kl'])}, as a whole "
        f"{_nats(row['kl_together'])}; no choice allowed is below {_nats(row['kl_best'])} at that size"
        for row in compared
    ]
    lines += [
        f"measured on {calibration['num_held_frames']} frames of {calibration['num_held_scored']} sequences, held out "
        f"from {calibration['num_used']} for the Hessians; {table.raw['device']}",
        f"origin: recipe {origin.name}, sha256 {origin.sha256}",
        f"sensitivity.json: sha256 {table.sha256}",
    ]
    weights = [name for name in sorted(hashes) if name == "config.json" or name.endswith(".safetensors")]
    return lines + [f"model {name}: sha256 {hashes[name]}" for name in weights]


def _gap(value: float, bound: float) -> str:
    return f" (gap {100 * (value / bound - 1):.2f} %)" if bound > 0 else ""


def _nats(value: float | None) -> str:
    return "not known" if value is None else f"{value:.6g}"
