"""`s2quant search`: from measured damages to a recipe, with what speaks for it.

The damage of a recipe is predicted as the sum of the single damages of its linears. With the model at hand the found
combination is also measured as a whole, on the same held-out speech and with the very weights that were measured one
by one, and both figures are printed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2quant.calibrate.sequences import load_set
from s2quant.checkpoint.config import S2Config
from s2quant.checkpoint.layout import linears
from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError, shorten_list
from s2quant.export.calibration import Report
from s2quant.files import atomic_file, check_new
from s2quant.quantize.plan import make_plan
from s2quant.recipe import Rule, load_recipe
from s2quant.records import folder_hashes
from s2quant.runtime.load import load_model, parse_device
from s2quant.search.check import Checked, check_folder, check_origin, check_sizes
from s2quant.search.curve import make_curve, named_points, write_curve
from s2quant.search.damage import Held, hold
from s2quant.search.evidence import Found, evidence
from s2quant.search.rules import recipe_text, source_from
from s2quant.search.sensitivity import split_held
from s2quant.search.solve import Choice, Item, Solution, least_damage, least_size, walk
from s2quant.search.store import open_candidates
from s2quant.search.table import Sensitivity, check_measured, check_pandas, load_sensitivity
from s2quant.search.together import measure_together
from s2quant.search.units import DENSE_BITS

DEFAULT_BITS = (4, 8)
NUM_CHECKED = 8  # points of the curve that are measured as a whole


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What `s2quant search` is asked for.

    Args:
        folder: What `s2quant sensitivity` made.
        out: The recipe to write; None where only the curve is wanted.
        budget: The most tensor bytes, as `quantize --plan` counts them.
        target_kl: The most damage, nats per frame.
        bits: Widths to choose from; None: those of 4 and 8 that were measured. bf16 is always a choice.
        keep: Patterns of modules that stay in bf16.
        model: The bf16 checkpoint, to measure what is found as a whole; None leaves it at the prediction.
        device: Where to measure it.
        source: The calibration source, where it is not where it was.
        curve: Whether to compute the curve into the folder and its report.
        check: Quantized folders of the model, to measure what they really do.
    """

    folder: Path
    out: Path | None
    budget: int | None = None
    target_kl: float | None = None
    bits: tuple[int, ...] | None = None
    keep: tuple[str, ...] = ()
    model: Path | None = None
    device: str = "cpu"
    source: Path | None = None
    curve: bool = False
    check: tuple[Path, ...] = ()


def search(
    options: SearchOptions, report: Report = lambda phase, done, total: None
) -> tuple[Found | None, list[Checked]]:
    """Find a recipe, the curve, or both; hold quantized folders against what was predicted.

    Args:
        options: What to do.
        report: Told of progress.

    Returns:
        What was found (None where no recipe was wanted), and what the folders do.

    Raises:
        UserError: Something in the input cannot be used, or nothing meets the budget or target.
    """
    _check_goal(options)
    table = load_sensitivity(options.folder)
    items = make_items(table, options.bits, options.keep)
    solution = None if options.out is None else _solve(options, table, items)
    for folder in options.check:
        check_sizes(table, folder)
        check_origin(table, folder)
    held = None if options.model is None else _hold(table, options.model, options.device, report)
    points = list(walk(items, table.fixed_bytes))
    named = named_points(table, points)
    widths = {choice.bits for item in items for choice in item.choices}
    compared = [row for row in named if set(row["bits"]) <= widths]  # of widths that could have been chosen
    allowed = _allowed(items, options.keep)
    found = None if solution is None else _find(options, table, compared, solution, allowed, held, report)
    checked = [check_folder(table, folder, held, report) for folder in options.check] if held is not None else []
    if options.curve:
        rows = [one for one in (found, *checked) if one is not None]
        keys = ("name", "num_bytes", "kl", "kl_together")
        curve = make_curve(table, points, named, [{key: getattr(one, key) for key in keys} for one in rows])
        if held is not None:
            _measure_curve(table, points, curve, held, report)
        write_curve(options.folder, curve | {"allowed": allowed})
    report("done", 1, 1)
    return found, checked


def _check_goal(options: SearchOptions) -> None:
    """Refuse what makes no sense before anything is read."""
    wants_recipe = options.budget is not None or options.target_kl is not None
    if options.budget is not None and options.target_kl is not None:
        raise UserError("--budget and --target-kl", "one of them", "leave one out")
    if wants_recipe != (options.out is not None) or not (wants_recipe or options.curve or options.check):
        raise UserError(
            "no goal" if not wants_recipe else "no --out",
            "--budget or --target-kl with --out, or --curve, or --check",
            "say what to look for and where to write the recipe",
        )
    if options.check and options.model is None:
        raise UserError("--check without --model", "the bf16 checkpoint to compare with", "add --model DIR")
    if options.curve:
        check_pandas()
    if options.out is not None:
        check_new(options.out)
        _name(options.out)


def make_items(table: Sensitivity, bits: Sequence[int] | None, keep: Sequence[str]) -> list[Item]:
    """List what a search may choose.

    Args:
        table: What was measured.
        bits: Widths to choose from; None: those of 4 and 8 that were measured.
        keep: Patterns of modules that stay in bf16.

    Returns:
        The units. bf16 is a choice of each, without damage; a width whose damage is not finite is none.

    Raises:
        UserError: A width was not measured, or a pattern matches nothing.
    """
    measured = tuple(table.raw["bits"])
    chosen = tuple(bits) if bits is not None else tuple(b for b in DEFAULT_BITS if b in measured)
    absent = [b for b in chosen if b not in measured]
    if absent or not chosen:
        raise UserError(
            f"bits {', '.join(map(str, absent or DEFAULT_BITS))}",
            f"widths that were measured: {', '.join(map(str, measured))}",
            "correct --bits, or measure again with them",
        )
    rules = [Rule(pattern=pattern, settings=None) for pattern in keep]
    idle = [rule.pattern for rule in rules if not any(rule.matches(m) for unit in table.units for m in unit.modules)]
    if idle:
        raise UserError(
            f"--keep matches none of the linears that were measured:\n{shorten_list(idle)}",
            "patterns of module names",
            "for example --keep 'audio_decoder.**'",
        )
    items = []
    for unit in table.units:
        choices = [Choice(bits=DENSE_BITS, num_bytes=unit.dense_bytes, damage=0.0)]
        if not any(rule.matches(module) for rule in rules for module in unit.modules):
            for width in chosen:
                damage = table.damage[unit.name].get(width)
                if damage is not None:
                    choices.append(Choice(bits=width, num_bytes=unit.num_bytes[width], damage=damage))
        items.append(Item(name=unit.name, choices=tuple(choices)))
    return items


def _name(out: Path) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", out.stem) or out.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"--out {out.name}",
            "a .yaml file named by lower-case letters, digits, '-' and '.': the recipe gets its name",
            "for example --out recipes/s2-pro-found.yaml",
        )
    return out.stem


def _hold(table: Sensitivity, folder: Path, device: str, report: Report) -> Held:
    """Load the model and the held-out speech."""
    target = parse_device(device)
    checkpoint = open_checkpoint(folder)
    report("hashing the model", 0, 1)
    if folder_hashes(folder) != table.raw["model"]["sha256"]:
        raise UserError(
            f"{folder} is not the model that was measured",
            f"the files of {table.raw['model']['folder']}, byte for byte",
            "name that folder, or measure this model",
        )
    recipe = load_recipe(table.folder / "recipe.yaml")
    calibration = load_set(table.folder / "calibration.safetensors", checkpoint.config.num_codebooks)
    residual_size = table.raw["residual_size"]
    split = split_held(calibration, recipe, checkpoint, residual_size, table.raw["calibration"]["num_held"])
    report("measuring as a whole", 0, 1)
    return hold(load_model(checkpoint, target, table.raw["dtype"]), split.held, residual_size)


def _solve(options: SearchOptions, table: Sensitivity, items: Sequence[Item]) -> Solution:
    """Choose, and refuse what could not be written, before a model is loaded."""
    assert options.out is not None
    source_from(table.raw["recipe"]["calibration_source"], table.folder, options.out, options.source)
    if options.budget is not None:
        return least_damage(items, table.fixed_bytes, options.budget)
    assert options.target_kl is not None
    return least_size(items, table.fixed_bytes, options.target_kl)


def _find(
    options: SearchOptions,
    table: Sensitivity,
    compared: Sequence[Mapping[str, Any]],
    solution: Solution,
    allowed: str,
    held: Held | None,
    report: Report,
) -> Found:
    assert options.out is not None
    together = None
    if held is not None:
        together = measure_together(table.units, _bits(solution), open_candidates(table.folder), held)["kl"]
        report("measuring as a whole", 1, 1)
    widths = [one.bits for one in solution.choices.values()]
    found = Found(
        name=_name(options.out),
        num_bytes=solution.num_bytes,
        dense_bytes=table.dense_bytes,
        kl=solution.damage,
        bound=solution.bound,
        kl_together=together,
        allowed=allowed,
        num_units={bits: widths.count(bits) for bits in sorted(set(widths))},
    )
    _write(options, table, compared, solution, found)
    return found


def _measure_curve(
    table: Sensitivity, points: Sequence[Solution], curve: Mapping[str, Any], held: Held, report: Report
) -> None:
    """Measure some points of the curve as a whole, in place, evenly spread from the second to the last."""
    number = min(NUM_CHECKED, len(points) - 1)
    chosen = {round(1 + n * (len(points) - 2) / max(1, number - 1)) for n in range(number)}
    for done, index in enumerate(sorted(chosen)):
        report("measuring the curve", done, len(chosen))
        found = measure_together(table.units, _bits(points[index]), open_candidates(table.folder), held)
        curve["points"][index]["kl_together"] = found["kl"]


def _allowed(items: Sequence[Item], keep: Sequence[str]) -> str:
    """Say what could be chosen."""
    widths = sorted({choice.bits for item in items for choice in item.choices} - {DENSE_BITS})
    kept = f"; in bf16 by --keep: {', '.join(keep)}" if keep else ""
    return f"every linear in {', '.join(f'{bits} bit' for bits in widths)} or bf16{kept}"


def _bits(solution: Solution) -> dict[str, int]:
    """List the quantized units of a solution with their bits."""
    return {name: one.bits for name, one in solution.choices.items() if one.bits != DENSE_BITS}


def _write(
    options: SearchOptions,
    table: Sensitivity,
    compared: Sequence[Mapping[str, Any]],
    solution: Solution,
    found: Found,
) -> None:
    """Write the recipe, and hold it against the choice before it gets its name."""
    assert options.out is not None
    config = S2Config.load(table.folder)
    origin = load_recipe(table.folder / "recipe.yaml")
    verdicts = {name: None for name in linears(config)} | {
        module: unit.with_bits(solution.choices[unit.name].bits)
        for unit in table.units
        for module in unit.modules
        if solution.choices[unit.name].bits != DENSE_BITS
    }
    goal = f"{options.budget:,} bytes" if options.budget is not None else f"{options.target_kl:g} nats per frame"
    text = recipe_text(
        found.name,
        f"Found by s2quant search from {origin.name}: within {goal}.",
        verdicts,
        origin,
        source_from(table.raw["recipe"]["calibration_source"], table.folder, options.out, options.source),
        evidence(goal, table, found, compared, origin, options.target_kl is not None),
    )
    with atomic_file(options.out) as partial:
        partial.write_text(text, encoding="utf-8")
        plan = make_plan(load_recipe(partial), config)
        made = {module.name: module.settings for module in plan.modules if module.kind == "linear"}
        assert made == verdicts, [name for name in verdicts if made[name] != verdicts[name]]
        assert plan.num_bytes == solution.num_bytes, (plan.num_bytes, solution.num_bytes)


def plan_bytes(recipe: Path, folder: Path) -> int:
    """Count the bytes of another recipe on the model that was measured.

    Args:
        recipe: The recipe.
        folder: What `s2quant sensitivity` made.

    Returns:
        Tensor bytes, as `quantize --plan` counts them.

    Raises:
        UserError: The recipe cannot be read or does not fit the model, or the folder holds no measurements.
    """
    check_measured(folder)
    return make_plan(load_recipe(recipe), S2Config.load(folder)).num_bytes
