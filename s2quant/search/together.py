"""Several linears replaced at once: what a recipe does as a whole, against the sum of its parts.

The weights are those that were measured one by one (each calibrated on the bf16 model's inputs), so the comparison is
about adding damages up and about nothing else. `s2quant quantize` calibrates each linear on what the ones before it
leave, so that later ones can make up for earlier ones: its damage is a third number, which `s2quant eval` measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from s2quant.quantize.store import StageStore
from s2quant.search.damage import Held, replaced, summarise
from s2quant.search.store import load_dense
from s2quant.search.units import Unit

KEYS = (
    "kl", "kl_semantic", "kl_residual", "kl_standard_error", "top1_agreement", "end_delta", "end_before_delta",
    "end_drift", "end_before_drift", "hidden_error", "num_not_finite",
)  # fmt: skip


def combinations(units: Sequence[Unit], bits: Sequence[int]) -> dict[str, dict[str, int]]:
    """List the combinations that every run measures.

    Args:
        units: All units.
        bits: The widths measured.

    Returns:
        Bits by unit, for each name: the recipe as it is (if its widths are among those measured), then for each width
        the whole Slow AR and everything.
    """
    found: dict[str, dict[str, int]] = {}
    chosen = {unit.name: unit.recipe_bits for unit in units if unit.recipe_bits is not None}
    if chosen and set(chosen.values()) <= set(bits):
        found["the recipe"] = chosen
    for width in sorted(bits, reverse=True):
        found[f"Slow AR in {width} bit"] = {unit.name: width for unit in units if unit.part == "slow"}
        found[f"all in {width} bit"] = {unit.name: width for unit in units}
    return found


@torch.inference_mode()
def measure_together(units: Sequence[Unit], choice: Mapping[str, int], store: StageStore, held: Held) -> dict[str, Any]:
    """Measure a combination.

    Args:
        units: All units.
        choice: Bits by unit; the others stay in bf16.
        store: The candidates with their weights.
        held: The bf16 model at its first block.

    Returns:
        num_bytes saved against bf16 as bytes_saved, and the damage as `summarise` has it, of the whole model.

    Raises:
        UserError: A candidate is absent or was kept without weights.
    """
    assert held.block == 0
    like = held.inputs[0]
    chosen = [unit for unit in units if unit.name in choice]
    weights: dict[str, Tensor] = {}
    for unit in chosen:
        weights |= load_dense(store, unit.name, unit.modules, choice[unit.name], unit.settings.group_size, like)
    with replaced(held.model, weights):
        found = summarise(held.measure("both"))
    saved = sum(unit.dense_bytes - unit.num_bytes[choice[unit.name]] for unit in chosen)
    return {"bytes_saved": saved} | {key: found[key] for key in KEYS}
