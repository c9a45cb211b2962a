"""The report of a sensitivity run: heat maps, a ranked table, what adds up, and the curve once it was computed.

Reads sensitivity.json, manifest.json and curve.json (if it is there) and measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from s2quant.errors import UserError
from s2quant.files import atomic_file, read_json
from s2quant.report.format import adaptive, finite, fixed, shown
from s2quant.report.heat import heat_maps
from s2quant.report.pages import environment
from s2quant.report.pareto import named_rows, pareto_chart
from s2quant.report.tables import Table

FILE = "sensitivity.json"
CURVE = "curve.json"
NUM_RANKED = 25


def write_sensitivity_report(folder: Path) -> None:
    """Write report.md and report.html of a sensitivity run, over older ones.

    Args:
        folder: What `s2quant sensitivity` made.

    Raises:
        UserError: Something is absent or not of that kind, or the disk refuses.
    """
    table, record = read_json(folder / FILE), read_json(folder / "manifest.json")
    curve = read_json(folder / CURVE) if (folder / CURVE).exists() else None
    env = environment()
    loader = env.loader
    assert loader is not None
    try:
        facts = _facts(table, record, curve)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / FILE}: {type(error).__name__} {error}",
            "what `s2quant sensitivity` and `s2quant search` write",
            "measure again",
        ) from error
    css = Markup(loader.get_source(env, "page.css")[0])  # ours, not user data
    pages = {
        "report.md": env.get_template("sensitivity.md.j2").render(**facts),
        "report.html": env.get_template("sensitivity.html.j2").render(**facts, css=css),
    }
    for name, page in pages.items():
        with atomic_file(folder / name, overwrite=True) as partial:
            partial.write_text(page, encoding="utf-8")


def _facts(table: Mapping[str, Any], record: Mapping[str, Any], curve: Mapping[str, Any] | None) -> dict[str, Any]:
    units = table["units"]
    calibration = table["calibration"]
    num_dropped = sum(calibration.get("clips_dropped", {}).values())  # none in tables of earlier versions
    dropped = f", {num_dropped} clips dropped" if num_dropped else ""
    ranked_by = 4 if 4 in table["bits"] else min(table["bits"])
    return {
        "title": f"Sensitivity: {table['model']['folder']} by {table['recipe']['name']}",
        "about": (
            f"{len(units)} units at {', '.join(map(str, table['bits']))} bit, measured on "
            f"{calibration['num_held_frames']:,} frames of {calibration['num_held_scored']} held-out sequences; "
            f"Hessians from {calibration['num_used']} others{dropped}; {table['dtype']}, {table['device']}"
        ),
        "heat": heat_maps(units),
        "ranked": ranked_table(units, ranked_by, NUM_RANKED),
        "ranking": ranked_table(units, ranked_by, None),
        "together": _together_table(table),
        "left_out": _left_out(table["left_out"]),
        "curve": pareto_chart(curve) if curve else None,
        "named": _named_table(curve, table["dense_bytes"]) if curve else None,
        "provenance": _provenance(table, record),
    }


def ranked_table(units: Sequence[Mapping[str, Any]], ranked_by: int, limit: int | None) -> Table:
    """Rank the units by their damage at one width.

    Args:
        units: `units` of sensitivity.json.
        ranked_by: The width.
        limit: The most rows; None for all.

    Returns:
        The table; ties in the order of the names.
    """

    def at(unit: Mapping[str, Any], bits: int) -> Mapping[str, Any]:
        return next((one for one in unit["candidates"] if one["bits"] == bits), {})

    widths = sorted({one["bits"] for unit in units for one in unit["candidates"]})
    order = sorted(units, key=lambda unit: (-_known(at(unit, ranked_by).get("kl")), unit["name"]))
    rows = []
    for unit in order[:limit]:
        chosen = at(unit, ranked_by)
        saved = unit["dense_bytes"] - chosen["num_bytes"]
        rows.append(
            (
                unit["name"],
                *(adaptive(at(unit, bits).get("kl")) for bits in widths),
                adaptive(chosen.get("kl_standard_error")),
                adaptive(chosen.get("kl_semantic")),
                adaptive(chosen.get("kl_residual")),
                _percent(chosen.get("hidden_error")),
                _percent(chosen.get("end_drift")),
                _percent(chosen.get("end_before_drift")),
                fixed(saved / 1e6, 3),
            )
        )
    head = (
        "Linear",
        *(f"{bits} bit" for bits in widths),
        f"{ranked_by} bit: standard error",
        "Semantic",
        "Residual",
        "Hidden state, %",
        "P(end) moves at the end, points",
        "before it, points",
        "Saves, MB",
    )
    what = f"The {len(rows)} most sensitive" if len(rows) < len(units) else "All"
    return Table(caption=f"{what}, ranked at {ranked_by} bit; KL in nats per frame", head=head, rows=rows)


def _known(value: Any) -> float:
    """Rank what is not finite above everything."""
    number = finite(value)
    return float("inf") if number is None else number


def _percent(value: Any, signed: bool = False) -> str | None:
    number = finite(value)
    return None if number is None else adaptive(100 * number, signed)


def _together_table(table: Mapping[str, Any]) -> Table:
    cells = []
    for row in table["together"]:
        total, whole = finite(row["kl_sum"]), finite(row["kl"])
        share = fixed(whole / total, 2) if total and whole is not None else None
        cells.append((str(row["name"]), adaptive(total), adaptive(whole), share, _percent(row["hidden_error"])))
    if table["floor"] is not None:
        floor = table["floor"]
        alone = ("\u2013", adaptive(floor["kl"]), "\u2013", _percent(floor["hidden_error"]))
        cells.append(("nothing: bfloat16 arithmetic", *alone))
    head = ("Replaced together", "Sum of single KLs", "Measured as a whole", "Whole / sum", "Hidden state, %")
    return Table(caption="Do damages add up? Nats per frame", head=head, rows=cells)


def _left_out(reasons: Mapping[str, str]) -> Table | None:
    if not reasons:
        return None
    return Table(caption="Kept in bf16", head=("Linear", "Why"), rows=list(reasons.items()), words=2)


def _named_table(curve: Mapping[str, Any], dense_bytes: int) -> Table:
    head = ("Recipe", "Tensor bytes", "of bf16, %", "KL, added up", "KL as a whole", "No choice allowed is below")
    allowed = f"; allowed: {curve['allowed']}" if "allowed" in curve else ""  # not in those of earlier versions
    return Table(
        caption=f"On the curve, nats per frame{allowed}", head=head, rows=named_rows(curve["named"], dense_bytes)
    )


def _provenance(table: Mapping[str, Any], record: Mapping[str, Any]) -> Table:
    calibration = table["calibration"]
    facts: dict[str, Any] = {
        "Model": table["model"]["folder"],
        **{f"sha256 of {name}": digest for name, digest in table["model"]["sha256"].items()},
        "Recipe": table["recipe"]["name"],
        "Recipe's sha256": table["recipe"]["sha256"],
        **{f"Calibration: {name}": value for name, value in calibration.items() if not name.endswith("dropped")},
        **{f"Clips dropped, {why}": count for why, count in calibration.get("clips_dropped", {}).items()},
        **{f"Held out but not scored, {why}": count for why, count in calibration["dropped"].items()},
        "Schema version": table["schema_version"],
        "Metric version": table["metric_version"],
        "Device": table["device"],
        "Commit": record.get("s2quant_commit"),
        **{f"Version of {name}": version for name, version in (record.get("versions") or {}).items()},
    }
    rows = [(name, shown(value)) for name, value in facts.items()]
    return Table(caption="Provenance", head=("Fact", "Value"), rows=rows, words=2)
