"""A plan: a recipe applied to a model, module by module, with bytes, before any work.

Legend: M out_features, K in_features, G groups.

First match wins. Every linear must be matched; a rule, or one of a rule's alternatives, that matches no module is
an error, so that a recipe cannot silently miss a renamed layer; so is a rule that earlier ones leave nothing to.
Only config.json is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import FAST, Kind, expected_tensors
from s2quant.errors import UserError, shorten_list
from s2quant.packing import packed_bytes, packed_shapes
from s2quant.recipe import LinearSettings, Recipe, expand_braces, pattern_to_regex

DENSE_BYTES = 2  # bfloat16, as on disk


@dataclass(frozen=True, kw_only=True)
class PlannedModule:
    """What is to become of one module.

    Args:
        name: Name on disk.
        kind: "linear", "embedding", "norm" or "bias".
        shape: Shape of the dense weight.
        settings: How it is quantized, or None when it is kept.
        num_bytes: Bytes on disk afterwards.
        dense_bytes: Bytes on disk in bfloat16.
        num_tensors: Tensors on disk afterwards.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    settings: LinearSettings | None
    num_bytes: int
    dense_bytes: int
    num_tensors: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe applied to a model.

    Args:
        recipe: The recipe.
        config: The model's configuration.
        modules: Every module in natural order.
    """

    recipe: Recipe
    config: S2Config
    modules: tuple[PlannedModule, ...]

    @property
    def quantized(self) -> dict[str, PlannedModule]:
        """Modules to be quantized, by name."""
        return {module.name: module for module in self.modules if module.settings is not None}

    @property
    def dense_linears(self) -> dict[str, PlannedModule]:
        """Linears to be kept, by name."""
        return {m.name: m for m in self.modules if m.kind == "linear" and m.settings is None}

    @property
    def num_tensors(self) -> int:
        """Tensors on disk afterwards."""
        return sum(module.num_tensors for module in self.modules)

    @property
    def num_bytes(self) -> int:
        """Tensor bytes on disk afterwards."""
        return sum(module.num_bytes for module in self.modules)

    @property
    def dense_bytes(self) -> int:
        """Tensor bytes of the bfloat16 checkpoint."""
        return sum(module.dense_bytes for module in self.modules)


def make_plan(recipe: Recipe, config: S2Config) -> Plan:
    """Apply a recipe to a model.

    Args:
        recipe: The recipe.
        config: The model's configuration.

    Returns:
        The plan.

    Raises:
        UserError: The recipe does not fit the model; every offender is listed.
    """
    specs = expected_tensors(config)
    names = {spec.name if spec.kind == "bias" else spec.module: spec for spec in specs.values()}
    faults = _rule_faults(recipe, list(names))
    modules = []
    for name, spec in names.items():
        rule = next((rule for rule in recipe.rules if rule.matches(name)), None)
        if rule is None and spec.kind == "linear":
            faults.append(f"no rule matches the linear {name}")
        settings = rule.settings if rule is not None else None
        if settings is not None:
            faults += settings_faults(name, spec.kind, spec.shape, settings)
        modules.append((name, spec, settings))
    if faults:
        raise UserError(
            f"recipe {recipe.name} on this model:\n{shorten_list(faults)}",
            "rules that match every linear, each at least one module, with sizes that divide",
            "mend the recipe; a model of other sizes needs a recipe of its own",
        )
    planned = tuple(_planned(name, spec.kind, spec.shape, settings) for name, spec, settings in modules)
    return Plan(recipe=recipe, config=config, modules=planned)


def _planned(name: str, kind: Kind, shape: tuple[int, ...], settings: LinearSettings | None) -> PlannedModule:
    dense = DENSE_BYTES
    for size in shape:
        dense *= size
    if settings is None:
        num_bytes, num_tensors = dense, 1
    else:
        num_bytes = packed_bytes(shape[0], shape[1], settings.bits, settings.group_size)
        num_tensors = len(packed_shapes(shape[0], shape[1], settings.bits, settings.group_size))
    return PlannedModule(
        name=name,
        kind=kind,
        shape=shape,
        settings=settings,
        num_bytes=num_bytes,
        dense_bytes=dense,
        num_tensors=num_tensors,
    )


def _rule_faults(recipe: Recipe, names: list[str]) -> list[str]:
    """Find rules that match nothing, in whole or in one of their alternatives, or that decide nothing."""
    faults = []
    taken: set[str] = set()
    for rule in recipe.rules:
        matched: set[str] = set()
        for pattern in expand_braces(rule.pattern):
            regex = re.compile(pattern_to_regex(pattern))
            found = {name for name in names if regex.fullmatch(name)}
            if not found:
                faults.append(f"{pattern} matches no module of this model")
            matched |= found
        if matched and matched <= taken:
            faults.append(f"{rule.pattern} decides nothing: earlier rules take all its modules")
        taken |= matched
    return faults


def settings_faults(name: str, kind: Kind, shape: tuple[int, ...], settings: LinearSettings) -> list[str]:
    """Say why a module cannot be quantized with some settings.

    Args:
        name: Name on disk.
        kind: What it is.
        shape: Shape of the dense weight.
        settings: The settings.

    Returns:
        One sentence per reason; none when it can.
    """
    if kind != "linear":
        return [f"{name} is no linear ({kind}); only linears are quantized"]
    if name == f"{FAST}.project_in":
        return [f"{name} has a bias, which a packed linear does not hold; keep it"]
    out_features, in_features = shape
    faults = []
    if in_features % settings.group_size:
        faults.append(f"{name}: group_size {settings.group_size} does not divide its {in_features} inputs")
    if in_features % 32 or out_features % 32:
        faults.append(f"{name}: {out_features}x{in_features} does not pack into int32: both must be multiples of 32")
    return faults
