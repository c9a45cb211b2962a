"""What is chosen by itself: a linear, or linears that engines fuse and that must therefore agree.

Engines run q, k and v as one linear (on disk they are one already) and w1 and w3 as another; the parts of one have
the same bits and groups. So wqkv, wo, w2, the Fast AR's output and the pair w1+w3 are units. Linears that cannot be
packed are left out, each with its reason: they stay in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from s2quant.checkpoint.layout import FAST
from s2quant.errors import UserError, shorten_list
from s2quant.packing import packed_bytes
from s2quant.quantize.plan import DENSE_BYTES, Plan, settings_faults
from s2quant.recipe import LinearSettings

FUSED = ("feed_forward.w1", "feed_forward.w3")
DENSE_BITS = 16


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Linears that are quantized alike.

    Args:
        name: The linear's name on disk; of w1 and w3 the name of w1 with `+w3`.
        modules: Names on disk.
        part: "slow" or "fast".
        layer: Its block, or None outside the blocks.
        kind: wqkv, wo, w1+w3, w2 or output.
        settings: How it is quantized, but for the bits.
        dense_bytes: Bytes in bfloat16.
        num_bytes: Bytes on disk by bits.
        recipe_bits: Bits that the recipe gives it; None where it keeps it.
    """

    name: str
    modules: tuple[str, ...]
    part: str
    layer: int | None
    kind: str
    settings: LinearSettings
    dense_bytes: int
    num_bytes: Mapping[int, int]
    recipe_bits: int | None

    def with_bits(self, bits: int) -> LinearSettings:
        """Give the settings of a choice.

        Args:
            bits: The bits.

        Returns:
            The settings.
        """
        return replace(self.settings, bits=bits)

    def to_json(self) -> dict[str, Any]:
        """Compose the unit's part of sensitivity.json, without bits.

        Returns:
            Plain values.
        """
        settings = {key: value for key, value in asdict(self.settings).items() if key != "bits"}
        return {
            "name": self.name,
            "modules": list(self.modules),
            "part": self.part,
            "layer": self.layer,
            "kind": self.kind,
            "settings": settings,
            "dense_bytes": self.dense_bytes,
            "recipe_bits": self.recipe_bits,
        }


def find_units(plan: Plan, bits: Sequence[int]) -> tuple[list[Unit], dict[str, str]]:
    """Sort a model's linears into units.

    Settings are those of the rule that quantizes a linear, or the recipe's base for a linear that it keeps.

    Args:
        plan: The recipe on the model.
        bits: The candidates.

    Returns:
        Units in natural order, and why each linear that cannot be packed is left out.

    Raises:
        UserError: The recipe treats parts of a fused linear differently, or nothing can be packed.
    """
    left_out: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    linears = {module.name: module for module in plan.modules if module.kind == "linear"}
    settings = {name: module.settings or plan.recipe.base for name, module in linears.items()}
    for name, module in linears.items():
        faults = settings_faults(name, module.kind, module.shape, settings[name])
        if faults:
            left_out[name] = "; ".join(faults)
        else:
            groups.setdefault(_unit_name(name), []).append(name)
    units, faults = [], []
    for unit, names in groups.items():
        if len({_verdict(plan, name) for name in names}) > 1:
            faults.append(f"{' and '.join(names)} are quantized differently, or only one of them is")
            continue
        sizes = [linears[name].shape for name in names]
        choice, planned = settings[names[0]], linears[names[0]].settings
        units.append(
            Unit(
                name=unit,
                modules=tuple(names),
                part="fast" if unit.startswith(f"{FAST}.") else "slow",
                layer=_layer(unit),
                kind=unit.rpartition(".")[2],
                settings=choice,
                dense_bytes=sum(DENSE_BYTES * rows * columns for rows, columns in sizes),
                num_bytes={b: sum(packed_bytes(m, k, b, choice.group_size) for m, k in sizes) for b in bits},
                recipe_bits=planned.bits if planned is not None else None,
            )
        )
    if faults or not units:
        raise UserError(
            f"recipe {plan.recipe.name} on this model:\n{shorten_list(faults or list(left_out.values()))}",
            "linears that can be packed, w1 and w3 of a block treated alike: engines run them as one",
            "mend the recipe",
        )
    return units, left_out


def _verdict(plan: Plan, name: str) -> LinearSettings | None:
    return plan.quantized[name].settings if name in plan.quantized else None


def _unit_name(module: str) -> str:
    prefix = next((module.removesuffix(part) for part in FUSED if module.endswith(f".{part}")), None)
    return module if prefix is None else f"{prefix}feed_forward.w1+w3"


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None
