"""sensitivity.json as plain data, read strictly, and the same figures as a CSV."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from s2quant.errors import UserError, shorten_list
from s2quant.files import read_json, sha256_file
from s2quant.recipe import BITS, LinearSettings
from s2quant.search.units import Unit

SCHEMA_VERSION = 1
FILE = "sensitivity.json"


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What a run measured.

    Args:
        folder: Where it is.
        sha256: Of sensitivity.json.
        units: The units, in natural order.
        damage: Nats per frame by unit and bits; None where it is not finite.
        fixed_bytes: Bytes of everything that is in no unit.
        dense_bytes: Bytes of the bf16 checkpoint.
        raw: The whole object.
    """

    folder: Path
    sha256: str
    units: tuple[Unit, ...]
    damage: Mapping[str, Mapping[int, float | None]]
    fixed_bytes: int
    dense_bytes: int
    raw: Mapping[str, Any]


def load_sensitivity(folder: Path) -> Sensitivity:
    """Read what `s2quant sensitivity` wrote.

    Args:
        folder: The folder.

    Returns:
        The measurements.

    Raises:
        UserError: The folder holds no such measurements, or damaged ones; all faults are listed.
    """
    check_measured(folder)
    raw = read_json(folder / FILE)
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder / FILE}: schema_version {raw.get('schema_version')!r}",
            f"{SCHEMA_VERSION}",
            "measure again with this version of `s2quant sensitivity`",
        )
    faults: list[str] = []
    units: list[Unit] = []
    damage: dict[str, dict[int, float | None]] = {}
    rows = raw.get("units")
    for row in rows if isinstance(rows, list) else []:
        try:
            unit, found = _unit(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            name = row.get("name") if isinstance(row, dict) else row
            faults.append(f"unit {name!r}: {type(error).__name__} {error}")
            continue
        if unit.name in damage:
            faults.append(f"unit {unit.name!r} comes twice")
        units.append(unit)
        damage[unit.name] = found
    sizes = {key: raw.get(key) for key in ("fixed_bytes", "dense_bytes")}
    faults += [f"{key} is {size!r}" for key, size in sizes.items() if not _is_size(size)]
    if faults or not units:
        raise UserError(
            f"{folder / FILE}:\n{shorten_list(faults or ['no units'])}",
            "the measurements as they were written",
            "measure again, or restore the file",
        )
    return Sensitivity(
        folder=folder,
        sha256=sha256_file(folder / FILE),
        units=tuple(units),
        damage=damage,
        fixed_bytes=raw["fixed_bytes"],
        dense_bytes=raw["dense_bytes"],
        raw=raw,
    )


def check_measured(folder: Path) -> None:
    """Refuse a folder that is not what `s2quant sensitivity` makes.

    Args:
        folder: The folder.

    Raises:
        UserError: It is not there, or has no sensitivity.json.
    """
    if not (folder / FILE).is_file():
        raise UserError(
            f"{folder} has no {FILE}" if folder.is_dir() else f"{folder} is not a folder",
            "a folder that `s2quant sensitivity` made",
            "name that folder (its --out), or measure first: s2quant sensitivity RECIPE --model DIR --out DIR",
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _unit(row: Mapping[str, Any]) -> tuple[Unit, dict[int, float | None]]:
    settings = row["settings"]
    known = {field.name for field in fields(LinearSettings)} - {"bits"}
    if set(settings) != known:
        raise ValueError(f"settings {sorted(settings)}, not {sorted(known)}")
    damage: dict[int, float | None] = {}
    sizes: dict[int, int] = {}
    for candidate in row["candidates"]:
        bits, kl = candidate["bits"], candidate["kl"]
        if bits not in BITS or bits in sizes:
            raise ValueError(f"bits {bits!r}")
        if kl is not None and not (isinstance(kl, int | float) and math.isfinite(kl) and kl >= 0):
            raise ValueError(f"kl {kl!r}")
        if not _is_size(candidate["num_bytes"]):
            raise ValueError(f"num_bytes {candidate['num_bytes']!r}")
        damage[bits], sizes[bits] = kl, candidate["num_bytes"]
    if not _is_size(row["dense_bytes"]) or not sizes:
        raise ValueError(f"dense_bytes {row['dense_bytes']!r} with {len(sizes)} candidates")
    unit = Unit(
        name=row["name"],
        modules=tuple(row["modules"]),
        part=row["part"],
        layer=row["layer"],
        kind=row["kind"],
        settings=LinearSettings(**settings),
        dense_bytes=row["dense_bytes"],
        num_bytes=sizes,
        recipe_bits=row["recipe_bits"],
    )
    return unit, damage


def write_csv(path: Path, table: Mapping[str, Any]) -> None:
    """Write one row per unit and width, by pandas.

    Args:
        path: The file.
        table: The object of sensitivity.json.
    """
    pandas = importlib.import_module("pandas")
    rows = []
    for unit in table["units"]:
        about = {key: unit[key] for key in ("name", "part", "layer", "kind", "dense_bytes", "recipe_bits")}
        for candidate in unit["candidates"]:
            row = {key: value for key, value in candidate.items() if key != "kl_codebooks"}
            books = {f"kl_codebook_{number}": kl for number, kl in enumerate(candidate["kl_codebooks"])}
            rows.append(about | row | books)
    frame = pandas.DataFrame(rows).astype({"layer": "Int64", "recipe_bits": "Int64"})
    frame.to_csv(path, index=False)


def check_pandas() -> None:
    """Refuse to begin where the CSV could not be written at the end.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        importlib.import_module("pandas")
    except ImportError as error:
        raise UserError(
            "the package pandas, which writes the CSV, is not installed",
            "the packages of s2quant[quantize] and s2quant[eval]",
            "pip install 's2quant[quantize,eval]'",
        ) from error
